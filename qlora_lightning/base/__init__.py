"""Where a base comes from: resolve its name, unpack a GGUF, its tokenizer, its fingerprint, and the cache.

Importing this imports neither torch nor transformers.
"""

from qlora_lightning.base.folder import BaseFolder, open_base
from qlora_lightning.base.tokenizer import load_tokenizer

__all__ = ["BaseFolder", "load_tokenizer", "open_base"]
