"""Reads an adapter folder: what it says it belongs to, and its tensors, onto a base."""

import json
import warnings
from pathlib import Path
from typing import Any

import peft
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from qlora_lightning.errors import UserError
from qlora_lightning.model.adapters import all_names_of_trainable_tensors, load_adapters
from qlora_lightning.model.checkpoint_format import check_version


def read_identity(folder: Path) -> dict[str, Any]:
    """Read what an adapter folder says it belongs to; nothing where other tools wrote the folder.

    Raises:
        UserError: The folder is not a whole adapter folder with a LoRA in it, or a newer version wrote it.
    """
    missing = [name for name in ("adapter_config.json", "adapter_model.safetensors") if not (folder / name).is_file()]
    if missing:
        raise UserError(
            f"{folder} is not an adapter folder: expected adapter_config.json and adapter_model.safetensors in it, "
            f"missing {' and '.join(missing)}."
        )
    kind = _read_json(folder / "adapter_config.json").get("peft_type")
    if kind != "LORA":
        raise UserError(f"{folder} holds an adapter of peft_type {kind}: expected LORA.")
    identity = _read_json(folder / "qlora_lightning.json") if (folder / "qlora_lightning.json").is_file() else {}
    check_version(identity.get("format_version", 1), f"The adapter folder {folder}")
    return identity


def open_adapter_folder(base: PreTrainedModel, folder: Path) -> peft.PeftModel:
    """Put the adapter of a folder on the base, to go on training it; every tensor must find its place.

    Raises:
        UserError: The folder does not fit the base, or a file in it is damaged.
    """
    try:
        with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
            stored = set(file.keys())
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Found missing adapter keys")  # told below
            model = load_adapters(base, str(folder))
    except (SafetensorError, OSError, RuntimeError, ValueError, TypeError, KeyError) as error:
        reason = " ".join(str(error).strip().splitlines()[-1:]).strip().rstrip(".")
        raise UserError(
            f"The adapter folder {folder} cannot be put on this base: {reason}. Name the base that "
            "it was trained on, or copy the folder again if a file in it is damaged."
        ) from error
    tensors = all_names_of_trainable_tensors(model)
    own = peft.get_peft_model_state_dict(model, state_dict=dict(tensors), save_embedding_layers=False).keys()
    if own != stored:
        shown = ", ".join(sorted(own ^ stored)[:3])
        raise UserError(
            f"The adapter folder {folder} does not fit this base: {len(own - stored)} tensors are missing in it and "
            f"{len(stored - own)} are foreign ({shown}, …). Name the base that it was trained on."
        )
    return model


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file} is not JSON, or it is cut off: {error}. Copy the adapter folder again.") from error
    if not isinstance(content, dict):
        raise UserError(f"{file}: expected a JSON object, found {type(content).__name__}.")
    return content
