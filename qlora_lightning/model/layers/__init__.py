"""A LLaMA layer on a packed batch: attention, LoRA linears, norms and SwiGLU, fused when possible."""
