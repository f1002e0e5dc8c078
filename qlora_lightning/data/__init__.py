"""What is trained on: file -> row -> conversation -> sample -> batch, and the data module that wires it.

Names are imported when they are first used, so that ``import qlora_lightning.data`` loads neither torch nor Lightning.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qlora_lightning.data.batches.collate import Batch, collate
    from qlora_lightning.data.batches.loader import FlatLoader
    from qlora_lightning.data.batches.order import epoch_order, rank_batches
    from qlora_lightning.data.batches.stream import StreamLoader
    from qlora_lightning.data.chat.labels import ChatRenderer, Rendered
    from qlora_lightning.data.datamodule import InstructionDataModule
    from qlora_lightning.data.prompts import PromptBatch, PromptLoader
    from qlora_lightning.data.report import Report
    from qlora_lightning.data.rows.bad_rows import BadRow, RowFault
    from qlora_lightning.data.rows.conversation import Conversation, Message
    from qlora_lightning.data.rows.readers import Row, RowReader, read_rows
    from qlora_lightning.data.rows.sources import Source, find_sources
    from qlora_lightning.data.samples import Sample, SampleSet

__all__ = (
    "BadRow",
    "Batch",
    "ChatRenderer",
    "Conversation",
    "FlatLoader",
    "InstructionDataModule",
    "Message",
    "PromptBatch",
    "PromptLoader",
    "Rendered",
    "Report",
    "Row",
    "RowFault",
    "RowReader",
    "Sample",
    "SampleSet",
    "Source",
    "StreamLoader",
    "collate",
    "epoch_order",
    "find_sources",
    "rank_batches",
    "read_rows",
)

_HOMES = {
    "BadRow": "rows.bad_rows",
    "Batch": "batches.collate",
    "ChatRenderer": "chat.labels",
    "Conversation": "rows.conversation",
    "FlatLoader": "batches.loader",
    "InstructionDataModule": "datamodule",
    "Message": "rows.conversation",
    "PromptBatch": "prompts",
    "PromptLoader": "prompts",
    "Rendered": "chat.labels",
    "Report": "report",
    "Row": "rows.readers",
    "RowFault": "rows.bad_rows",
    "RowReader": "rows.readers",
    "Sample": "samples",
    "SampleSet": "samples",
    "Source": "rows.sources",
    "StreamLoader": "batches.stream",
    "collate": "batches.collate",
    "epoch_order": "batches.order",
    "find_sources": "rows.sources",
    "rank_batches": "batches.order",
    "read_rows": "rows.readers",
}


def __getattr__(name: str) -> Any:
    """Import a public name from the file that defines it."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
