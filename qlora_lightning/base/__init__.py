"""Where a base comes from: resolve its name, unpack a GGUF, its tokenizer, its fingerprint, and the cache.

Importing this imports neither torch nor transformers.
"""

from qlora_lightning.base.base_folder import BaseFolder, open_base
from qlora_lightning.base.byte_size import format_bytes
from qlora_lightning.base.cache import cache_root, cached_folder
from qlora_lightning.base.cache_clear import ClearReport, clear_entries, list_entries
from qlora_lightning.base.cache_entry import CacheEntry
from qlora_lightning.base.fingerprint import fingerprint
from qlora_lightning.base.model_folder import check_model_folder, read_config, weight_files
from qlora_lightning.base.resolve import BaseSource, resolve_base
from qlora_lightning.base.tokenizer import load_tokenizer
from qlora_lightning.base.unpack import unpack_gguf

__all__ = [
    "BaseFolder",
    "BaseSource",
    "CacheEntry",
    "ClearReport",
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
