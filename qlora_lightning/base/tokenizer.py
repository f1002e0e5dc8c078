"""The tokenizer of a base."""

from pathlib import Path
from typing import TYPE_CHECKING

from qlora_lightning.base.folder import open_base
from qlora_lightning.support.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")


def load_tokenizer(
    name: str, revision: str | None = None, trust_remote_code: bool = False
) -> "PreTrainedTokenizerFast":
    """Load the tokenizer of what ``base`` takes; a folder with nothing but a tokenizer (an adapter folder) does too.

    Args:
        name: a hub id, a folder, a ``.gguf`` file, or ``package:NAME``. Only a hub id can touch the network.
        revision: branch, tag or commit of a hub id.
        trust_remote_code: run Python code that lies beside the tokenizer.

    Raises:
        UserError: there is no tokenizer, or not a fast one (whose offsets the label masks are made from).
    """
    folder = Path(name).expanduser()
    if revision is not None or not folder.is_dir():
        folder = open_base(name, revision, weights=False).folder
    if not any((folder / file).is_file() for file in _FILES):
        raise UserError(
            f"Tokenizer {name}: found no tokenizer in {folder} (looked for {', '.join(_FILES)}). "
            "Set data.tokenizer to a hub id or folder that has one."
        )
    tokenizer = _load(folder, name, trust_remote_code)
    if not tokenizer.is_fast:
        raise UserError(
            f"Tokenizer {name}: expected a fast tokenizer, found {type(tokenizer).__name__}, written in Python. "
            "Set data.tokenizer to one with a tokenizer.json."
        )
    return tokenizer


def _load(folder: Path, name: str, trust_remote_code: bool) -> "PreTrainedTokenizerFast":
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
    # transformers and tokenizers raise OSError, ValueError, KeyError, ImportError and bare Exception for bad files.
    except Exception as error:
        first_line = str(error).strip().partition("\n")[0]
        raise UserError(
            f"Tokenizer {name}: the files in {folder} cannot be loaded ({type(error).__name__}: {first_line}). "
            "Set data.tokenizer to a folder or hub id with a tokenizer.json."
        ) from error
