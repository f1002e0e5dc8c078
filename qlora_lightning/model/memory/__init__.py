"""The memory of a training step, planned from shapes alone."""
