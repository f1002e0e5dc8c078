"""What is trained: the quantized base with its adapters, its loss and its optimizer."""

from qlora_lightning.support.imports import import_bitsandbytes

import_bitsandbytes()  # before any module of this package does so, whatever a program imports first
