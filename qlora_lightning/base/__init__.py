"""Sources of a base: its name, a GGUF to unpack, its tokenizer and fingerprint, and the cache.

Importing this imports neither torch nor transformers.
"""

from qlora_lightning.base.base_folder import BaseFolder, load_tokenizer, open_base

__all__ = ["BaseFolder", "load_tokenizer", "open_base"]
