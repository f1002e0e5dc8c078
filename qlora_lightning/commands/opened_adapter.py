"""An adapter folder and its base, found and loaded as they were trained: for ``chat`` and ``merge``."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qlora_lightning.base.adapter_folder import find_adapter_folder, read_adapter_config, read_identity
from qlora_lightning.base.base_folder import BaseFolder, fingerprint, open_base, read_config
from qlora_lightning.model.adapters.identity import check_identity
from qlora_lightning.model.adapters.inject import trainable_tensors
from qlora_lightning.model.load.base_model import Quantization, stored_quantization
from qlora_lightning.model.load.build import assemble_model
from qlora_lightning.model.load.machine import ComputeDtype, choose_compute_dtype
from qlora_lightning.support.console import say
from qlora_lightning.support.errors import UserError


@dataclass(frozen=True)
class AdapterSource:
    """An adapter folder, and how its base was held in training.

    Attributes:
        identity: What its ``qlora_lightning.json`` says; empty if another tool wrote the folder.
        quantization: ``None`` if the folder does not say.
        tokenizer_folder: The adapter folder, or if it holds no tokenizer the base's.
    """

    folder: Path
    identity: dict[str, Any]
    base: BaseFolder
    quantization: Quantization | None
    double_quant: bool
    compute_dtype: torch.dtype
    tokenizer_folder: Path


def find_adapter(named: str | Path, base: str | None = None) -> AdapterSource:
    """Find an adapter folder (or the one in a run folder) and its base, and check that they belong together.

    The base is looked for by ``base``, else by the name that it was trained under, and if that leads nowhere (it was a
    relative path) in the folder that it was loaded from. No model is loaded.
    """
    folder = find_adapter_folder(named)
    identity = read_identity(folder)
    source = _find_base(folder, identity) if base is None else open_base(base)
    current: dict[str, Any] = {"base": source.name, "fingerprint": fingerprint(source.folder)}
    settings = read_config(source.folder, source.name).get("quantization_config")
    if settings is not None:
        current["quantization"], current["double_quant"] = stored_quantization(settings)
    check_identity(identity, current, f"The adapter folder {folder}")
    held = identity | current
    has_tokenizer = any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))
    return AdapterSource(
        folder,
        identity,
        source,
        quantization=held.get("quantization"),
        double_quant=held.get("double_quant", True),
        compute_dtype=getattr(torch, identity.get("compute_dtype", "bfloat16")),
        tokenizer_folder=folder if has_tokenizer else source.folder,
    )


def open_adapter(source: AdapterSource) -> tuple[Any, dict[str, Any]]:
    """Load the base of an adapter as it was held in training, on a CUDA device if there is one, and put that on it."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if source.quantization is None:
        say(f"{source.folder} does not say how its base was held in training: it is loaded in nf4.")
    wanted: ComputeDtype = "fp32" if source.compute_dtype == torch.float32 else "auto"
    model_type = read_config(source.base.folder, source.base.name).get("model_type")
    dtype = choose_compute_dtype(wanted, device, model_type)
    model, identity = assemble_model(
        name=source.base.name,
        device=device,
        compute_dtype=dtype,
        quantization=source.quantization or "nf4",
        double_quant=source.double_quant,
        revision=source.base.revision,
        adapter=str(source.folder),
        adapter_options={},
        fast=True,
    )
    for name, parameter in trainable_tensors(model).items():
        if ".lora_" not in name:  # whole modules, which nothing casts where no autocast is
            parameter.data = parameter.data.to(dtype)
    return model, identity


def _find_base(adapter: Path, identity: dict[str, Any]) -> BaseFolder:
    loaded_from = read_adapter_config(adapter).get("base_model_name_or_path")
    name = identity.get("base") or loaded_from
    if not name:
        raise UserError(f"The adapter folder {adapter} does not name its base: name it with --base.")
    try:
        return open_base(name, identity.get("revision"))
    except UserError as error:
        if loaded_from and Path(loaded_from).is_dir():
            return open_base(loaded_from)
        raise UserError(f"The base of {adapter} is not found. {error} Or name it with --base.") from error
