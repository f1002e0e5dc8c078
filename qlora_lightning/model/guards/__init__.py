"""Checks of the setup of a run, and of each step, so that it does not train for nothing."""
