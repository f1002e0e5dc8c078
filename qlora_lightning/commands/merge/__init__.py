"""``qlora-lightning merge``."""

RECORD = "merge.json"  # in every folder that this command has written
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
K_QUANTS = ("q4_k_m", "q5_k_m", "q6_k")  # made of f16 by llama.cpp's own program
