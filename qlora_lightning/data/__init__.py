"""Training data: file → row → conversation → sample → batch, and the data module that connects them."""
