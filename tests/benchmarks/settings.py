"""What both sides do: the same sizes, rates and limits, read by ours.py and peer.py alike."""

BATCH_SIZE = 8
MAX_LENGTH = 512
RANK = 8
ALPHA = 16
LEARNING_RATE = 2e-4  # falls linearly to 0, without warm-up
GRADIENT_CLIP = 0.3
SEED = 0
ALL_LAYERS = 32  # of Llama-3.1-8B
