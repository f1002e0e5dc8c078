"""What is checked so that a run does not train for nothing: its setup, and each step."""
