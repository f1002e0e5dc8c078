"""``qlora-lightning merge``."""

RECORD = "merge.json"  # in every folder that this command has written
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
K_QUANTS = ("q4_k_m", "q5_k_m", "q6_k")  # quantized from f16 by llama.cpp's own program
# Share that is kept of an adapter's gain in loss, for GSM8K on SmolLM2-135M: the table is in ../README.md.
KEPT = {"f16": "100 %", "q8_0": "99.8 %", "q6_k": "99.4 %", "q5_k_m": "96.2 %", "q4_k_m": "96.8 %"}
