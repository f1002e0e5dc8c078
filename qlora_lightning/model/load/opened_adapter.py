"""An adapter folder and the base that it belongs to: found, compared and opened in one place."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch

from qlora_lightning.base.adapter_folder import find_adapter_folder, read_adapter_config, read_identity
from qlora_lightning.base.folder import BaseFolder, fingerprint, open_base, read_config
from qlora_lightning.model.adapters.identity import check_identity
from qlora_lightning.model.load.base_model import Quantization, stored_quantization
from qlora_lightning.model.load.build import LoadedModel, assemble_model
from qlora_lightning.model.load.device import ComputeDtype, choose_compute_dtype
from qlora_lightning.support.errors import UserError


@dataclass(frozen=True)
class AdapterSource:
    """An adapter folder, and how its base was held when it was trained.

    Attributes:
        identity: What its ``qlora_lightning.json`` says; empty if another tool wrote the folder.
        quantization: How the linears were stored in training; ``None`` if the folder does not say.
        is_stored_quantized: Whether the base's own folder holds quantized weights.
    """

    folder: Path
    identity: dict[str, Any]
    base: BaseFolder
    quantization: Quantization | None
    double_quant: bool
    compute_dtype: torch.dtype
    is_stored_quantized: bool

    @property
    def tokenizer_folder(self) -> Path:
        """The adapter folder, or if it holds no tokenizer the base's."""
        is_own = any((self.folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))
        return self.folder if is_own else self.base.folder


def find_adapter(folder: str | Path, base: str | None = None) -> AdapterSource:
    """Find an adapter folder (or the one in a run folder) and its base, and check that they belong together.

    The base is looked for by ``base``, else by the name that it was trained under, and if that leads nowhere (it was a
    relative path) in the folder that it was loaded from. No model is loaded.
    """
    place = find_adapter_folder(folder)
    identity = read_identity(place)
    found = _find_base(place, identity, base)
    own = {"base": found.name, "fingerprint": fingerprint(found.folder)}
    check_identity(identity, own, f"The adapter folder {place}")
    dtype = getattr(torch, identity.get("compute_dtype", "bfloat16"))
    settings = read_config(found.folder, found.name).get("quantization_config")
    if settings is None:
        quantization, double_quant = identity.get("quantization"), bool(identity.get("double_quant", True))
        return AdapterSource(place, identity, found, quantization, double_quant, dtype, is_stored_quantized=False)
    kind: Any = stored_quantization(settings)
    if kind not in get_args(Quantization) or identity.get("quantization", kind) != kind:
        raise UserError(
            f"The base {found.name} is stored quantized as {kind}, the adapter folder {place} was trained on "
            f"{identity.get('quantization', 'nf4, fp4, int8 or none')}. Name another base with --base."
        )
    double_quant = bool(settings.get("bnb_4bit_use_double_quant", False))
    return AdapterSource(place, identity, found, kind, double_quant, dtype, is_stored_quantized=True)


def open_adapter(source: AdapterSource) -> LoadedModel:
    """Load the base of an adapter as it was trained, on a CUDA device if there is one, and put the adapter on it."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    wanted: ComputeDtype = "fp32" if source.compute_dtype == torch.float32 else "auto"
    return assemble_model(
        name=source.base.name,
        device=device,
        compute_dtype=choose_compute_dtype(wanted, device),
        quantization=source.quantization or "nf4",
        double_quant=source.double_quant,
        revision=source.base.revision,
        trust_remote_code=False,
        cache=True,
        adapter=str(source.folder),
        adapter_options={},
        fast=True,
    )


def _find_base(place: Path, identity: dict[str, Any], base: str | None) -> BaseFolder:
    if base is not None:
        return open_base(base)
    loaded_from = read_adapter_config(place).get("base_model_name_or_path")
    named = identity.get("base") or loaded_from
    if not named:
        raise UserError(f"The adapter folder {place} does not name its base: name it with --base.")
    try:
        return open_base(named, identity.get("revision"))
    except UserError as error:
        if loaded_from and Path(loaded_from).is_dir():
            return open_base(loaded_from)
        raise UserError(f"The base of {place} is not found. {error} Or name it with --base.") from error
