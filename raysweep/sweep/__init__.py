"""The driver of a sweep: which studies run, in which order, and what they leave. Only here optuna and ray.tune."""
