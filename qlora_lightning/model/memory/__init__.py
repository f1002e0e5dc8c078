"""Plan the memory of a training step from shapes only."""
