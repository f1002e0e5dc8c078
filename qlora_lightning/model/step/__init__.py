"""A training step: batches, their layout, the loss at the head, the window and the optimizer."""
