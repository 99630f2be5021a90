"""Training loops and their parts: torch only, no Ray, so that they run on any machine."""
