"""Where a base comes from: resolve its name, unpack a GGUF, its tokenizer, its fingerprint, and the cache.

Importing this imports neither torch nor transformers.
"""

from qlora_lightning.base.cache import CacheEntry, cache_root, cached_folder, clear_entries, list_entries
from qlora_lightning.base.find import BaseSource, resolve_base
from qlora_lightning.base.fingerprint import fingerprint
from qlora_lightning.base.folder import BaseFolder, check_model_folder, open_base, read_config, weight_files
from qlora_lightning.base.gguf import unpack_gguf
from qlora_lightning.base.tensors import format_bytes
from qlora_lightning.base.tokenizer import load_tokenizer

__all__ = [
    "BaseFolder",
    "BaseSource",
    "CacheEntry",
    "cache_root",
    "cached_folder",
    "check_model_folder",
    "clear_entries",
    "fingerprint",
    "format_bytes",
    "list_entries",
    "load_tokenizer",
    "open_base",
    "read_config",
    "resolve_base",
    "unpack_gguf",
    "weight_files",
]
