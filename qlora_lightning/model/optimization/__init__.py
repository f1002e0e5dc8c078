"""An optimizer step: its micro-batches, its gradient, its parameter groups and its schedule."""
