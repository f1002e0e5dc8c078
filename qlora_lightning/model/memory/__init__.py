"""The memory of a training step, planned from shapes alone, and what helps when it does not suffice."""
