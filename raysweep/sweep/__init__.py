"""The driver of a sweep: which studies run, in which order, and their outcomes. Only this folder imports optuna."""
