"""Writes a whole model into a folder, whichever process it is that writes."""

from pathlib import Path
from typing import Any

from qlora_lightning.safe_file import set_usual_mode


def save_model(model: Any, folder: Path, **options: Any) -> None:
    """Write a model of transformers with its configs.

    Where several processes train together, transformers lets the first one write and the others write nothing, without
    a word. An entry of the cache is made by whichever process comes first.

    Args:
        model: what to write.
        folder: where to.
        options: of transformers' ``save_pretrained``.

    Raises:
        RuntimeError: nothing was written.
    """
    model.should_save_on_this_rank = lambda is_main_process: True  # transformers' own method asks torch for the rank
    try:
        model.save_pretrained(folder, **options)
    finally:
        del model.should_save_on_this_rank
    files = list(folder.glob("*.safetensors"))
    for file in files:
        set_usual_mode(file)
    if not files:
        raise RuntimeError(f"transformers wrote no weights into {folder}: do other processes share this training?")
