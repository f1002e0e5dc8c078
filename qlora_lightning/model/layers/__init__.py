"""How a LLaMA layer computes on a flat batch: attention, LoRA linears, norms and SwiGLU, fused where that may be."""
