"""The config of a base, without its weights and without the network."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_lightning.base.find import BaseSource, is_hub_id, resolve_base
from qlora_lightning.base.folder import check_model_folder
from qlora_lightning.base.gguf import find_unpacked
from qlora_lightning.commands.recipes import recipes_folder
from qlora_lightning.support.errors import UserError


@dataclass(frozen=True)
class BaseConfig:
    """What a base looks like.

    Attributes:
        config: transformers' config.
        origin: Where it comes from, in words.
    """

    config: Any
    origin: str


def find_config(name: str, revision: str | None = None, trust_remote_code: bool = False) -> BaseConfig:
    """Find the config of whatever ``model.base`` takes.

    A hub id is looked up in the hub's local cache, then among the shapes that travel with the recipes. Of a GGUF that
    is not unpacked yet only the header is read.

    Raises:
        UserError: There is no such base, it is none that can be trained here, or its config would have to be fetched.
    """
    if is_hub_id(name):
        return _find_of_hub(name, revision, trust_remote_code)
    source = resolve_base(name, revision)
    folder = source.path if source.kind == "folder" else find_unpacked(source)
    if folder is None:
        return BaseConfig(_read_gguf(source), f"the header of {source.path.name}")
    check_model_folder(folder, name, weights=False)
    return BaseConfig(_read(folder, name, trust_remote_code), str(folder / "config.json"))


def list_shapes() -> list[str]:
    """Name the shapes that travel with the recipes."""
    return sorted(file.parent.name for file in (recipes_folder() / "shapes").glob("*/config.json"))


def find_in_hub_cache(name: str, file: str, revision: str | None) -> Path | None:
    """Find a file of a hub id in the hub's local cache; ``None`` where it would have to be fetched."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, file, revision=revision)
    return Path(found) if isinstance(found, str) else None


def _find_of_hub(name: str, revision: str | None, trust_remote_code: bool) -> BaseConfig:
    found = find_in_hub_cache(name, "config.json", revision)
    if found is not None:
        folder = found.parent
        check_model_folder(folder, name, weights=False)
        return BaseConfig(_read(folder, name, trust_remote_code), "config.json in the hub's local cache")
    for shape in list_shapes():
        if shape in name.lower():  # Llama-3.1-8B-Instruct, Meta-Llama-3.1-8B, …
            config = _read(recipes_folder() / "shapes" / shape, name, trust_remote_code)
            return BaseConfig(config, f"the shape of {shape} that comes with the package")
    raise UserError(
        f"Base {name} is a hub id, of which plan fetches nothing, and its config.json is not in the hub's local cache. "
        f"Fetch it with `hf download {name} config.json`, or name a folder with a config.json as model.base. "
        f"Shapes known without it: {', '.join(list_shapes())}."
    )


def _read(folder: Path, name: str, trust_remote_code: bool) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
    # Each of its checks raises a class of its own.
    except Exception as error:
        first_line = str(error).strip().partition("\n")[0]
        raise UserError(f"Base {name}: transformers cannot use {folder / 'config.json'}: {first_line}") from error


def _read_gguf(source: BaseSource) -> Any:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(source.path.parent, gguf_file=source.path.name, local_files_only=True)
    # gguf, numpy and transformers raise ValueError, KeyError, struct.error and others, wherever the file breaks off.
    except Exception as error:
        first_line = str(error).strip().partition("\n")[0]
        raise UserError(
            f"Base {source.name}: {source.path} cannot be read as a GGUF model ({type(error).__name__}: {first_line})."
        ) from error
    if config.model_type != "llama":
        raise UserError(
            f"Base {source.name}: expected a GGUF of a LLaMA-family model, found model type {config.model_type!r}."
        )
    return config
