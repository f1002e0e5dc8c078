"""An adapter folder and the base that it belongs to: found, compared and opened in one place."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch

from qlora_lightning.base.adapter_folder import find_adapter_folder, read_adapter_config, read_identity
from qlora_lightning.base.fingerprint import fingerprint
from qlora_lightning.base.folder import BaseFolder, open_base, read_config
from qlora_lightning.model.adapters.identity import check_identity
from qlora_lightning.model.base_model import Quantization, stored_quantization
from qlora_lightning.model.build import QLoRAModel, assemble_model
from qlora_lightning.model.device import ComputeDtype, choose_compute_dtype
from qlora_lightning.support.errors import UserError


@dataclass(frozen=True)
class AdapterSource:
    """An adapter folder, and how its base was held when it was trained.

    Attributes:
        folder: The adapter folder.
        identity: What its ``qlora_lightning.json`` says; empty where another tool wrote the folder.
        base: The base as an ordinary folder.
        quantization: How the linears were stored in training; ``None`` where the folder does not say.
        double_quant: Whether the 4-bit scales were quantized too.
        compute_dtype: Dtype of the products in training.
        is_stored_quantized: Whether the base's own folder holds quantized weights.
    """

    folder: Path
    identity: dict[str, Any]
    base: BaseFolder
    quantization: Quantization | None
    double_quant: bool
    compute_dtype: torch.dtype
    is_stored_quantized: bool


def find_adapter(folder: str | Path, base: str | None = None, revision: str | None = None) -> AdapterSource:
    """Find an adapter folder and its base, and see that they belong together; no model is loaded.

    The base is looked for by the name that it was trained under, and where that leads nowhere (it was a relative path,
    or a hub id that is not here) in the folder that it was loaded from.

    Args:
        folder: The adapter folder, or the run folder around it.
        base: Another name of the base.
        revision: Of a hub id.

    Raises:
        UserError: There is no such adapter or base, or the adapter was trained on another base.
    """
    place = find_adapter_folder(folder)
    identity = read_identity(place)
    found = _find_base(place, identity, base, revision)
    own = {"base": found.name, "fingerprint": fingerprint(found.folder)}
    check_identity(identity, own, f"The adapter folder {place}")
    quantization, double_quant = _quantization_of(place, identity, found)
    dtype = getattr(torch, str(identity.get("compute_dtype", "bfloat16")), torch.bfloat16)
    stored = read_config(found.folder, found.name).get("quantization_config") is not None
    return AdapterSource(place, identity, found, quantization, double_quant, dtype, stored)


def open_adapter(source: AdapterSource, device: torch.device | None = None, *, fast: bool = True) -> QLoRAModel:
    """Load the base of an adapter as it was trained, and put the adapter on it.

    Args:
        source: From :func:`find_adapter`.
        device: Where to; ``None``: a CUDA device where there is one, else the CPU.
        fast: Whether layers may run fused.

    Raises:
        UserError: The folder does not fit the base.
    """
    place = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    wanted: ComputeDtype = "fp32" if source.compute_dtype == torch.float32 else "auto"
    return assemble_model(
        source.base.name,
        device=place,
        compute_dtype=choose_compute_dtype(wanted, place),
        quantization=source.quantization or "nf4",
        double_quant=source.double_quant,
        revision=source.base.revision,
        trust_remote_code=False,
        cache=True,
        adapter=str(source.folder),
        adapter_options={},
        fast=fast,
    )


def _find_base(place: Path, identity: dict[str, Any], base: str | None, revision: str | None) -> BaseFolder:
    if base is not None:
        return open_base(base, revision)
    named = identity.get("base") or read_adapter_config(place).get("base_model_name_or_path")
    if not named:
        raise UserError(f"The adapter folder {place} does not name its base: name it with --base.")
    try:
        return open_base(str(named), identity.get("revision"))
    except UserError as error:
        loaded_from = identity.get("base_folder")
        if loaded_from and Path(loaded_from).is_dir():
            return open_base(loaded_from)
        raise UserError(f"The base of {place} is not found. {error} Or name it with --base.") from error


def _quantization_of(place: Path, identity: dict[str, Any], base: BaseFolder) -> tuple[Quantization | None, bool]:
    settings = read_config(base.folder, base.name).get("quantization_config")
    if settings is not None:
        kind = stored_quantization(settings)
        if kind not in get_args(Quantization) or identity.get("quantization", kind) != kind:
            raise UserError(
                f"The base {base.name} is stored quantized as {kind}, the adapter folder {place} was trained on "
                f"{identity.get('quantization', 'nf4, fp4, int8 or none')}. Name another base with --base."
            )
        return kind, bool(settings.get("bnb_4bit_use_double_quant", False))  # type: ignore[return-value]
    return identity.get("quantization"), bool(identity.get("double_quant", True))
