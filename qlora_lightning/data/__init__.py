"""What is trained on: file → row → conversation → sample → batch, and the data module that wires it."""
