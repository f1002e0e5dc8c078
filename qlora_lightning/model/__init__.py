"""What is trained: the quantized base with its adapters, its loss and its optimizer."""

from qlora_lightning.heavy_imports import quick_imports

with quick_imports():  # before any module of this package imports it, whichever way a program comes here
    import bitsandbytes  # noqa: F401
