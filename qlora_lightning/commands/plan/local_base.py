"""The config and the tokenizer of a base, without its weights and without the network."""

from pathlib import Path
from typing import Any

from qlora_lightning.base.find import is_hub_id, resolve_base
from qlora_lightning.base.folder import check_model_folder
from qlora_lightning.base.gguf import find_unpacked
from qlora_lightning.commands.recipes import recipes_folder
from qlora_lightning.support.errors import UserError

_SMALL = 1_000_000_000  # bytes of a GGUF that is unpacked for the tokenizer inside, which `fit` would do too


def find_config(name: str, revision: str | None = None, trust_remote_code: bool = False) -> tuple[Any, str]:
    """Find the config of whatever ``model.base`` takes.

    A hub id is looked up in the hub's local cache, then among the shapes that come with the recipes. Of a GGUF that is
    not unpacked yet only the header is read.

    Returns:
        transformers' config, and where it comes from in words.
    """
    folder = _find_folder(name, "config.json", revision)
    if folder is not None:
        check_model_folder(folder, name, weights=False)
        return _read_config(name, folder, trust_remote_code=trust_remote_code), str(folder / "config.json")
    if not is_hub_id(name):
        file, _ = resolve_base(name, revision)
        config = _read_config(name, file.parent, gguf_file=file.name)
        if config.model_type != "llama":
            raise UserError(f"Base {name}: expected a GGUF of a LLaMA-family model, found type {config.model_type!r}.")
        return config, f"the header of {file.name}"
    shapes = {file.parent.name: file.parent for file in sorted((recipes_folder() / "shapes").glob("*/config.json"))}
    for shape, folder in shapes.items():
        if shape in name.lower():  # Llama-3.1-8B-Instruct, Meta-Llama-3.1-8B, …
            return _read_config(name, folder), f"the shape of {shape} that comes with the package"
    raise UserError(
        f"Base {name}: its config.json is not in the hub's local cache, and plan fetches nothing. Fetch it with `hf "
        f"download {name} config.json`, or name a folder with a config.json as model.base. Shapes known without it: "
        f"{', '.join(shapes)}."
    )


def find_tokenizer(choice: Any) -> Any:
    """Turn ``data.tokenizer`` into a choice that is loaded without fetching anything.

    Raises:
        UserError: it would have to be fetched, or to be unpacked from a large file.
    """
    settings = choice if isinstance(choice, dict) else {"name": choice}
    name, revision = settings.get("name"), settings.get("revision")
    if not isinstance(name, str):
        return choice
    folder = _find_folder(name, "tokenizer.json", revision)
    if folder is not None:
        return {**settings, "name": str(folder), "revision": None}
    if is_hub_id(name):
        raise UserError(f"The tokenizer of {name} is not in the hub's local cache, and plan fetches nothing.")
    file, _ = resolve_base(name, revision)
    if file.stat().st_size > _SMALL:
        raise UserError(f"The tokenizer is inside {file.name}, which `fit` unpacks first.")
    return choice


def _find_folder(name: str, file: str, revision: str | None) -> Path | None:
    """Find the local folder with a file of a base; None if it would have to be fetched or unpacked."""
    if is_hub_id(name):
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(name, file, revision=revision)
        return Path(found).parent if isinstance(found, str) else None
    path, _ = resolve_base(name, revision)
    return path if path.is_dir() else find_unpacked(path)


def _read_config(name: str, folder: Path, **options: Any) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, **options)
    except Exception as error:  # each check of transformers, gguf and numpy raises a class of its own
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"Base {name}: transformers cannot use the config in {folder}: {reason}") from error
