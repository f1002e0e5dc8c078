"""A row of any known shape as a checked conversation."""
