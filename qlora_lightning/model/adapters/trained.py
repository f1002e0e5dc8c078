"""Load a trained adapter and its base in the form that they had during training."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from qlora_lightning.model.adapters.identity import check_identity
from qlora_lightning.model.load.base_model import Quantization, stored_quantization
from qlora_lightning.model.self_check import check_device
from qlora_lightning.sources import folders
from qlora_lightning.support.console import say
from qlora_lightning.support.errors import UserError

Module = TypeVar("Module")
_NAME_IT = "name it with --base, or in Python with from_run(…, base=…)."


@dataclass(frozen=True)
class AdapterSource:
    """An adapter folder, and its base in the form that it had during training."""

    folder: Path
    identity: dict[str, Any]  # from ``qlora_lightning.json``; empty if another tool wrote the folder
    base: folders.BaseFolder
    quantization: Quantization | None  # None if the folder does not say
    double_quant: bool
    compute_dtype: str  # torch's name
    tokenizer_folder: Path  # the adapter folder, or the base's if the adapter folder has no tokenizer
    data_settings: dict[str, Any]  # how rows were rendered during training


def find_adapter(named: str | Path, base: str | None = None) -> AdapterSource:
    """Find an adapter folder (or the one in a run folder) and its base, and check that they belong together.

    The base is ``base`` if given, or else the one named in training. If that is not found (it may be a relative path),
    it is the folder that the base was loaded from. No model is loaded.
    """
    folder = folders.find_adapter_folder(named)
    identity = folders.read_identity(folder)
    if identity.get("own_base"):
        raise UserError(
            f"The adapter folder {folder} was trained on a base made by build_model of its class, which commands "
            "cannot make: open it in Python with from_run of that class.",
            "adapter.base",
        )
    source = _find_base(folder, identity) if base is None else folders.open_base(base)
    base_identity: dict[str, Any] = {"base": source.name, "fingerprint": folders.fingerprint(source.folder)}
    stored = folders.read_config(source.folder, source.name).get("quantization_config")
    if stored is not None:
        base_identity["quantization"], base_identity["double_quant"] = stored_quantization(stored)
    check_identity(identity, base_identity, f"The adapter folder {folder}")
    settings = identity | base_identity
    has_tokenizer = any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))
    return AdapterSource(
        folder,
        identity,
        source,
        quantization=settings.get("quantization"),
        double_quant=settings.get("double_quant", True),
        compute_dtype=identity.get("compute_dtype", "bfloat16"),
        tokenizer_folder=folder if has_tokenizer else source.folder,
        data_settings=(identity.get("data") or {}).get("settings") or {},
    )


def open_adapter(source: AdapterSource, kind: type[Module], **settings: Any) -> Module:
    """Load an adapter on its base in the form used for training, on a CUDA device if available.

    Args:
        source: Adapter and base.
        kind: QLoRAModule or a subclass.
        settings: Additional arguments for the class; they override those from training.
    """
    if source.quantization is None:
        say(f"{source.folder} does not say how its base was quantized in training: it is loaded in nf4.")
    trained = {
        "base": source.base.name,
        "revision": source.base.revision,
        "quantization": source.quantization or "nf4",
        "double_quant": source.double_quant,
        "compute_dtype": "fp32" if source.compute_dtype == "float32" else "auto",
    }
    return _open(kind, source.folder, trained | settings)


def open_run(named: str | Path, kind: type[Module], makes_base: bool, base: str | None, **settings: Any) -> Module:
    """Load the adapter of a run folder, or an adapter folder, with the class that trained it.

    If the class ``makes_base`` with its own ``build_model``, the base is compared with the one from training when it is
    made.
    """
    folder = folders.find_adapter_folder(named)
    identity = folders.read_identity(folder)
    if not (makes_base and identity.get("own_base")):
        return open_adapter(find_adapter(folder, base), kind, **settings)
    trained = {
        name: identity[name] for name in ("base", "revision", "quantization", "double_quant") if name in identity
    }
    return _open(kind, folder, trained | ({} if base is None else {"base": base}) | settings)


def _open(kind: type[Module], folder: Path, settings: Mapping[str, Any]) -> Module:
    make: Any = kind
    module = make(**{"adapter": str(folder), **settings})
    module.to("cuda" if torch.cuda.is_available() else "cpu")
    module.configure_model()
    module.fill_own_tensors()
    check_device(module, None)
    opened: Module = module.eval()
    return opened


def _find_base(adapter: Path, identity: dict[str, Any]) -> folders.BaseFolder:
    loaded_from = folders.read_adapter_config(adapter).get("base_model_name_or_path")
    name = identity.get("base") or loaded_from
    if not name:
        raise UserError(f"The adapter folder {adapter} does not name its base: {_NAME_IT}")
    try:
        return folders.open_base(name, identity.get("revision"))
    except UserError as error:
        if loaded_from and Path(loaded_from).is_dir():
            return folders.open_base(loaded_from)
        raise UserError(f"The base of {adapter} is not found. {error} Or {_NAME_IT}") from error
