"""What is trained: the quantized base with its adapters, its loss and its optimizer."""
