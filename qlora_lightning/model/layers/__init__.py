"""A LLaMA layer on a flat batch: attention, LoRA linears, norms and SwiGLU, fused if possible."""
