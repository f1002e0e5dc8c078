"""Tensor files: how they are opened and written, how sizes are formatted; and the label that is ignored."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich import filesize

from qlora_lightning.support.errors import UserError, explaining
from qlora_lightning.support.files import raising_os_errors

GIB = 2**30
IGNORED = -100  # label of a token that is not predicted; torch's cross entropy skips it


def format_bytes(count: int) -> str:
    """Format a number of bytes in decimal units, as file managers and model hubs do: ``98 MB``, ``5.6 GB``."""
    return filesize.decimal(count, precision=1 if 1e9 <= count < 1e11 else 0)


def format_gib(count: float) -> str:
    """Format a number of bytes in binary units, as memory is sold: ``5.30 GiB``."""
    return f"{count / GIB:.2f} GiB"


def open_tensors(file: Path) -> Any:
    """Open a safetensors file with ``safe_open``, which checks its header and length."""
    from safetensors import safe_open

    with explaining(f"{file} is not a whole safetensors file: download or save it again", "tensors.damaged"):
        return safe_open(file, "pt")


def tensor_names(file: Path) -> list[str]:
    """Return the names of the tensors in a safetensors file."""
    return list(open_tensors(file).keys())


def check_loaded(report: Mapping[str, Any], source: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Reject what was loaded from a source that holds other tensors than its config describes.

    ``report`` is the loading info of transformers, which draws what is missing at random, and only warns.
    """
    faults = {
        "missing": report["missing_keys"],
        "of another shape": {name for name, *_ in report["mismatched_keys"]},
        # but masks of attention, which some old files hold: `bias` has four dimensions, `masked_bias` none
        "left over": {
            name
            for name in report["unexpected_keys"]
            if not (name.endswith((".bias", ".masked_bias")) and len(shapes.get(name, ())) in (0, 4))
        },
    }
    texts = [f"{fault}: {', '.join(sorted(names)[:3])} ({len(names)})" for fault, names in faults.items() if names]
    if texts:
        raise UserError(
            f"{source} does not hold the tensors that its config describes; {'; '.join(texts)}. Correct its "
            "config.json, or download or save it again.",
            "base.tensors",
        )


def save_model(model: Any, folder: Path, **options: Any) -> None:
    """Write a transformers model and its configs by ``save_pretrained`` with ``options``, in any process.

    If several processes train together, transformers silently writes in the first one only, but any of them may build
    an entry of the cache.
    """
    model.should_save_on_this_rank = lambda is_main_process: True  # transformers' own method asks torch for the rank
    try:
        with raising_os_errors():
            model.save_pretrained(folder, **options)
    finally:
        del model.should_save_on_this_rank
