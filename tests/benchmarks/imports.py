"""Imports all that a run imports, and notes how long that took: the part of a start that is not ours to shorten."""

# ruff: noqa: F401
from qlora_lightning.support.imports import quick_imports
from tests.benchmarks.children import seconds_since_spawn

with quick_imports():
    import bitsandbytes
    import lightning
    import peft
    import torch
    from transformers import AutoTokenizer
    from transformers.models.llama import modeling_llama

    import qlora_lightning.callbacks
    import qlora_lightning.data.datamodule
    import qlora_lightning.model.module

SECONDS = seconds_since_spawn()
