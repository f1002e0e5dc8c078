"""The rows of any data file as prompt and completion, the form that both sides read."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from qlora_lightning.data.batches.order import epoch_order
from qlora_lightning.data.rows.conversation import Conversation
from qlora_lightning.data.rows.formats import RowConverter
from qlora_lightning.data.rows.readers import read_rows
from qlora_lightning.data.rows.sources import RowSettings
from qlora_lightning.support.errors import UserError
from tests.benchmarks.settings import SEED


def read_pairs(file: str, rows: int) -> list[dict[str, Conversation]]:
    """Read the first rows of a file that ``InstructionDataModule`` reads; what follows the last answer is left out.

    Raises:
        UserError: the file or a row of it cannot be used.
    """
    first = read_rows(file)[:rows]
    converter = RowConverter(RowSettings())
    converter.check(first)
    pairs = []
    for row in first:
        try:
            pairs.append(_divide(converter.convert(row).messages))
        except UserError as error:
            raise UserError(f"{row.where}: {error}") from error
    return pairs


def order_as_trained(pairs: list[dict[str, Conversation]]) -> list[dict[str, Conversation]]:
    """Put pairs in the order that our side's first epoch takes, for a peer that reads its file from top to bottom."""
    return [pairs[at] for at in epoch_order(len(pairs), SEED, 0)]


def write_pairs(pairs: Iterable[dict[str, Any]], file: Path) -> None:
    """Write JSON lines."""
    file.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")


def _divide(conversation: Conversation) -> dict[str, Conversation]:
    last = max(at for at, message in enumerate(conversation) if message["role"] == "assistant")
    if conversation[last].get("train") is False:
        raise UserError("the last answer has train: false; expected one that both sides train on.")
    return {"prompt": conversation[:last], "completion": [conversation[last]]}
