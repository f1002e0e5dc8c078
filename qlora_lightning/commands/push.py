"""``qlora-lightning push``: an adapter folder to the Hugging Face hub, when it is asked for, and nothing else."""

import json
import os
import re
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from qlora_lightning.base.adapter_folder import find_adapter_folder, read_identity
from qlora_lightning.base.tensors import format_bytes
from qlora_lightning.commands.options import OptionParser, confirm
from qlora_lightning.support.errors import UserError

_DESCRIPTION = """Upload an adapter folder to the Hugging Face hub, in one commit.

Only the files of an adapter folder go, and a folder that holds others is refused. The card names the repository
instead of the folder, and where base and earlier adapter lay on this machine is left out; a base that was not loaded
from the hub is named by --base. It says what will be uploaded, and asks."""
_EPILOG = """examples:
  qlora-lightning push --adapter runs/mine/adapter --repo me/mine --private
  qlora-lightning push --adapter runs/quickstart/adapter --repo me/calendar-adapter --yes \\
    --base HuggingFaceTB/SmolLM2-135M-Instruct

It uses the token of `hf auth login` or of HF_TOKEN."""
_CARD, _CONFIG, _IDENTITY = "README.md", "adapter_config.json", "qlora_lightning.json"
_WEIGHTS = "adapter_model.safetensors"
_NEEDED = (_CONFIG, _WEIGHTS, _IDENTITY)
# what AdapterCheckpoint and the tokenizers of transformers write
_KNOWN = {
    *_NEEDED,
    _CARD,
    "generation_config.json",
    "chat_template.jinja",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
}
_REPO = re.compile(r"\w([\w.-]*\w)?/\w([\w.-]*\w)?", re.ASCII)


def main(argv: list[str], api: Any = None) -> int:
    """Upload an adapter folder; return the exit code.

    Args:
        argv: The options.
        api: Stands in for huggingface_hub's ``HfApi()``.

    Raises:
        UserError: The folder is odd, the upload is not confirmed, or the hub refuses it.
    """
    arguments = _parser().parse_args(argv)
    if not _REPO.fullmatch(arguments.repo):
        raise UserError(f"--repo is {arguments.repo!r}: expected OWNER/NAME, such as me/calendar-adapter.")
    if arguments.base is not None and not _REPO.fullmatch(arguments.base):
        raise UserError(f"--base is {arguments.base!r}: expected the base's OWNER/NAME on the hub.")
    contents = read_folder(find_adapter_folder(arguments.adapter), arguments.repo, arguments.base)
    _show(contents, arguments.repo, arguments.private)
    if _is_offline():
        raise UserError("HF_HUB_OFFLINE is set, and uploading needs the hub: unset it, and run this again.")
    if not arguments.yes and not confirm("Upload?", "Uploading"):
        print("Nothing uploaded.")
        return 1
    print(f"Uploaded: {_upload(contents, arguments.repo, arguments.private, api)}")
    return 0


def read_folder(folder: Path, repo: str, base: str | None = None) -> dict[str, bytes]:
    """Read what is to be uploaded: the files as they are, but for what names this machine's folders.

    Args:
        folder: An adapter folder.
        repo: Takes the folder's place in the card.
        base: Takes the base's place, where that is not named as on the hub.

    Raises:
        UserError: It is no adapter folder of ours, or holds something else too.
    """
    identity = read_identity(folder)
    missing = [name for name in _NEEDED if not (folder / name).is_file()]
    if missing:
        raise UserError(
            f"{folder} was not written by qlora_lightning: {', '.join(missing)} is missing. Nothing is sent."
        )
    if "quantization" not in identity:
        raise UserError(f"{folder / _IDENTITY} is damaged: quantization is missing. Copy the adapter folder again.")
    odd = sorted(entry.name for entry in folder.iterdir() if entry.name not in _KNOWN or not _is_plain_file(entry))
    if odd:
        raise UserError(
            f"{folder} holds {', '.join(odd[:5])}, which no adapter folder does: only what a run wrote is uploaded. "
            "Move it elsewhere."
        )
    empty = [file.name for file in folder.iterdir() if not file.stat().st_size]
    if empty:
        raise UserError(f"{folder / empty[0]} is empty: copy the adapter folder again. Nothing is sent.")
    # here, so that --help and mistakes answer at once
    from qlora_lightning.model.adapters.folder import describe_card, read_tensors

    read_tensors(folder)
    contents = {file.name: file.read_bytes() for file in sorted(folder.iterdir())}
    config = json.loads(contents[_CONFIG])
    named = base or config.get("base_model_name_or_path") or ""
    if base is None and _is_local(named, str(identity.get("base_folder"))):
        raise UserError(
            f"The base of {folder} is {named or 'not named'}, on this machine: others could not load the adapter, and "
            "the path would be uploaded. Name the base as on the hub: --base OWNER/NAME."
        )
    contents[_CONFIG] = _to_json({**config, "base_model_name_or_path": named})
    local = ("base_folder", "trained_from")
    identity = {name: value for name, value in identity.items() if name not in local} | {"base": named}
    contents[_IDENTITY] = _to_json(identity)
    contents[_CARD] = describe_card(repo, identity).encode()
    return contents


def _is_local(base: str, folder: str) -> bool:
    """Whether a base is a folder of this machine, perhaps seen from another working directory, and no hub id."""
    return not _REPO.fullmatch(base) or Path(base).exists() or f"/{folder}".endswith(f"/{base}")


def _to_json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()


def _is_plain_file(entry: Path) -> bool:
    return entry.is_file() and not entry.is_symlink()


def _upload(contents: dict[str, bytes], repo: str, private: bool, api: Any) -> str:
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import LocalTokenNotFoundError

    api = HfApi() if api is None else api
    added = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=content) for name, content in contents.items()]
    try:
        api.create_repo(repo_id=repo, private=private, exist_ok=True)
        api.create_commit(repo_id=repo, operations=added, commit_message="LoRA adapter of qlora_lightning")
    except LocalTokenNotFoundError as error:
        raise UserError("There is no token for the hub: log in by `hf auth login`, or set HF_TOKEN.") from error
    except Exception as error:  # the hub raises classes of its own, of its HTTP library, OSError and ValueError
        reason = " ".join(str(error).split())
        raise UserError(f"The hub did not take {repo}, of which nothing was sent: {reason[:300]}") from error
    return f"https://huggingface.co/{repo}"


def _show(contents: dict[str, bytes], repo: str, private: bool) -> None:
    table = Table(title=f"To {repo} ({'private' if private else 'public'})", title_justify="left")
    table.add_column("file")
    table.add_column("size", justify="right")
    for name, content in contents.items():
        table.add_row(name, format_bytes(len(content)))
    Console(highlight=False).print(table)


def _is_offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def _parser() -> OptionParser:
    parser = OptionParser("push", _DESCRIPTION, _EPILOG)
    add = parser.add_argument
    add("--adapter", required=True, metavar="DIR", help="the adapter folder, or the run folder around it")
    add("--repo", required=True, metavar="OWNER/NAME", help="where to; made if it is not there")
    add("--base", metavar="OWNER/NAME", help="the base's name on the hub, if it was loaded from elsewhere")
    add("--private", action="store_true", help="make the repository private if it is made")
    add("--yes", action="store_true", help="do not ask")
    return parser
