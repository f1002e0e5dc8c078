"""The config and the tokenizer of a base, without its weights and without the network."""

from pathlib import Path
from typing import Any

from qlora_lightning.base.find import is_hub_id, resolve_base
from qlora_lightning.base.folder import check_model_folder
from qlora_lightning.base.gguf import find_unpacked
from qlora_lightning.commands.recipes import recipes_folder
from qlora_lightning.support.errors import UserError

_SMALL = 1_000_000_000  # bytes of a GGUF that is unpacked here, which `fit` would do too, for the tokenizer inside


def find_config(name: str, revision: str | None = None, trust_remote_code: bool = False) -> tuple[Any, str]:
    """Find the config of whatever ``model.base`` takes.

    A hub id is looked up in the hub's local cache, then among the shapes that travel with the recipes. Of a GGUF that
    is not unpacked yet only the header is read.

    Returns:
        transformers' config, and where it comes from in words.
    """

    def read(folder: Path, **options: Any) -> Any:
        from transformers import AutoConfig

        try:
            return AutoConfig.from_pretrained(folder, local_files_only=True, **options)
        except Exception as error:  # each check of transformers, gguf and numpy raises a class of its own
            first_line = str(error).strip().partition("\n")[0]
            raise UserError(f"Base {name}: transformers cannot use the config in {folder}: {first_line}") from error

    if is_hub_id(name):
        found = find_in_hub_cache(name, "config.json", revision)
        if found is not None:
            check_model_folder(found.parent, name, weights=False)
            config = read(found.parent, trust_remote_code=trust_remote_code)
            return config, "config.json in the hub's local cache"
        shapes = list_shapes()
        for shape in shapes:
            if shape in name.lower():  # Llama-3.1-8B-Instruct, Meta-Llama-3.1-8B, …
                return read(recipes_folder() / "shapes" / shape), f"the shape of {shape} that comes with the package"
        raise UserError(
            f"Base {name} is a hub id, of which plan fetches nothing, and its config.json is not in the hub's local "
            f"cache. Fetch it with `hf download {name} config.json`, or name a folder with a config.json as "
            f"model.base. Shapes known without it: {', '.join(shapes)}."
        )
    source = resolve_base(name, revision)
    folder = source.path if source.kind == "folder" else find_unpacked(source)
    if folder is not None:
        check_model_folder(folder, name, weights=False)
        return read(folder, trust_remote_code=trust_remote_code), str(folder / "config.json")
    config = read(source.path.parent, gguf_file=source.path.name)
    if config.model_type != "llama":
        raise UserError(f"Base {name}: expected a GGUF of a LLaMA-family model, found type {config.model_type!r}.")
    return config, f"the header of {source.path.name}"


def list_shapes() -> list[str]:
    """Return the names of the shapes that travel with the recipes."""
    return sorted(file.parent.name for file in (recipes_folder() / "shapes").glob("*/config.json"))


def find_in_hub_cache(name: str, file: str, revision: str | None) -> Path | None:
    """Find a file of a hub id in the hub's local cache; ``None`` if it would have to be fetched."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, file, revision=revision)
    return Path(found) if isinstance(found, str) else None


def find_tokenizer(choice: Any) -> tuple[Any, str | None]:
    """Turn ``data.tokenizer`` into a choice that fetches nothing; return it, and why there is none."""
    settings = choice if isinstance(choice, dict) else {"name": choice}
    name, revision = settings.get("name"), settings.get("revision")
    if not isinstance(name, str):
        return choice, None
    if is_hub_id(name):
        file = find_in_hub_cache(name, "tokenizer.json", revision)
        if file is None:
            return choice, f"The tokenizer of {name} is not in the hub's local cache, and plan fetches nothing."
        return {**settings, "name": str(file.parent), "revision": None}, None
    if Path(name).expanduser().is_dir():
        return choice, None
    try:
        source = resolve_base(name, revision)
    except UserError as error:
        return choice, str(error)
    if find_unpacked(source) is None and source.path.stat().st_size > _SMALL:
        return choice, f"The tokenizer is inside {source.path.name}, which `fit` unpacks first."
    return choice, None
