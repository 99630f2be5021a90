"""Training loops and what they need: torch only, no Ray, so that they run by themselves on any machine."""
