"""A micro-batch as the model takes it: its shape, its filling, the tokens that labels need, the names of its rows."""
