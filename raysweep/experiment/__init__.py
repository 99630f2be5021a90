"""The experiment file: YAML in, a frozen and validated Experiment out. No torch here."""
