"""Downloads from the Hugging Face hub, with its errors in one sentence each."""

from pathlib import Path

from qlora_lightning.errors import UserError

_SMALL_FILES = [
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "*.jinja",
    "*.py",  # never run unless trust_remote_code
]
_WEIGHTS = ["*.safetensors", "model.safetensors.index.json"]
# Second copies of the same weights in other layouts, which would double the download.
_OTHER_LAYOUTS = ["*/*.safetensors", "consolidated*.safetensors"]


def download_snapshot(name: str, revision: str | None, *, weights: bool) -> Path:
    """Return the local snapshot of a hub model, downloading what is missing; its folder's name is the commit.

    ``HF_HUB_OFFLINE`` and the hub's other variables are honoured.

    Raises:
        UserError: offline, not found, gated, no network, or a full disk.
    """
    from huggingface_hub import snapshot_download

    patterns = _SMALL_FILES + (_WEIGHTS if weights else [])
    try:
        folder = snapshot_download(name, revision=revision, allow_patterns=patterns, ignore_patterns=_OTHER_LAYOUTS)
    # The hub raises classes of its own, of its HTTP library, OSError and ValueError: each means "no base" here.
    except Exception as error:
        raise UserError(_explain(error, name, revision)) from error
    return Path(folder)


def _explain(error: Exception, name: str, revision: str | None) -> str:
    from huggingface_hub import constants, errors

    if isinstance(error, errors.GatedRepoError):
        return (
            f"Base {name} is gated on the Hugging Face hub: ask for access at https://huggingface.co/{name}, then "
            "log in with `hf auth login` or set HF_TOKEN."
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"Base {name} is not a folder or file here, and not found on the Hugging Face hub (or private: log in with "
            "`hf auth login`). Check the spelling."
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"Base {name} has no revision {revision!r} on the Hugging Face hub. Check model.revision."
    if constants.HF_HUB_OFFLINE:
        return (
            f"Base {name} is not whole in the hub's local cache, and HF_HUB_OFFLINE forbids the download. "
            "Unset HF_HUB_OFFLINE, or give a folder, a .gguf file or package:NAME."
        )
    if isinstance(error, errors.LocalEntryNotFoundError | ConnectionError):
        return (
            f"Base {name} is not in the hub's local cache, and the Hugging Face hub cannot be reached. Check the "
            "network, or give a folder, a .gguf file or package:NAME."
        )
    first_line = str(error).strip().partition("\n")[0]
    return f"Base {name} could not be downloaded: {type(error).__name__}: {first_line}"
