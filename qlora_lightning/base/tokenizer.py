"""The tokenizer of a base."""

from pathlib import Path
from typing import TYPE_CHECKING

from qlora_lightning.base.folder import open_base
from qlora_lightning.support.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def load_tokenizer(
    name: str, revision: str | None = None, trust_remote_code: bool = False
) -> "PreTrainedTokenizerFast":
    """Load the tokenizer of what ``base`` takes; a folder with nothing but a tokenizer (an adapter folder) works too.

    Args:
        name: a hub id, a folder, a ``.gguf`` file, or ``package:NAME``. Only a hub id can touch the network.
        revision: branch, tag or commit of a hub id.
        trust_remote_code: run Python code that lies beside the tokenizer.

    Raises:
        UserError: there is no tokenizer, or not a fast one (whose offsets the label masks are made from).
    """
    from transformers import AutoTokenizer

    folder = Path(name).expanduser()
    if revision is not None or not folder.is_dir():
        folder = open_base(name, revision, weights=False).folder
    remedy = "Set data.tokenizer to a folder or hub id with a tokenizer.json."
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
    # transformers and tokenizers raise OSError, ValueError, KeyError, ImportError and bare Exception for bad files.
    except Exception as error:
        first_line = str(error).strip().partition("\n")[0]
        raise UserError(
            f"Tokenizer {name}: none can be loaded from {folder} ({type(error).__name__}: {first_line}). {remedy}"
        ) from error
    if not tokenizer.is_fast:
        found = type(tokenizer).__name__
        raise UserError(f"Tokenizer {name}: expected a fast tokenizer, found {found}, written in Python. {remedy}")
    return tokenizer
