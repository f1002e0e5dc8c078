"""Files of tensors: how they are opened and written, and how their sizes are shown; and the label of no token."""

from pathlib import Path
from typing import Any

from rich import filesize

from qlora_lightning.support.errors import UserError
from qlora_lightning.support.files import raising_os_errors

GIB = 2**30
IGNORED = -100  # as a label: nothing is to be predicted; torch's cross entropy skips it


def format_bytes(count: int) -> str:
    """Format a number of bytes in decimal units, as file managers and model hubs do: ``98 MB``, ``5.6 GB``."""
    return filesize.decimal(count, precision=1 if 1e9 <= count < 1e11 else 0)


def format_gib(count: float) -> str:
    """Format a number of bytes as memory is sold: ``5.30 GiB``."""
    return f"{count / GIB:.2f} GiB"


def open_tensors(file: Path) -> Any:
    """Open a safetensors file by ``safe_open``, which checks its header and its length."""
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(file, "pt")
    except SafetensorError as error:
        raise UserError(f"{file} is not a whole safetensors file ({error}). Download or save it again.") from error


def tensor_names(file: Path) -> list[str]:
    """Return the names of the tensors in a safetensors file."""
    return list(open_tensors(file).keys())


def save_model(model: Any, folder: Path, **options: Any) -> None:
    """Write a model of transformers with its configs, by ``save_pretrained`` with those options, in any process.

    Of processes that train together, transformers lets the first one alone write, without a word. An entry of the
    cache is made by whichever process comes first.
    """
    model.should_save_on_this_rank = lambda is_main_process: True  # transformers' own method asks torch for the rank
    try:
        with raising_os_errors():
            model.save_pretrained(folder, **options)
    finally:
        del model.should_save_on_this_rank
