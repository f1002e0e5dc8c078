"""What is trained: the quantized base with its adapters, its loss and its optimizer."""

from qlora_lightning.support.imports import quick_imports

# Before any module of this package imports it, whichever way a program comes here.
with quick_imports():
    import bitsandbytes  # noqa: F401
