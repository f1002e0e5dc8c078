"""What is trained on: file -> row -> conversation -> sample -> batch, and the data module that wires it.

Names are imported when they are first used, so that ``import qlora_lightning.data`` loads neither torch nor Lightning.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qlora_lightning.data.batches.collate import Batch, collate
    from qlora_lightning.data.batches.loader import FlatLoader
    from qlora_lightning.data.batches.order import epoch_order, rank_batches
    from qlora_lightning.data.batches.prompt_loader import PromptBatch, PromptLoader
    from qlora_lightning.data.batches.stream import StreamLoader
    from qlora_lightning.data.chat.renderer import ChatRenderer, Rendered
    from qlora_lightning.data.datamodule import InstructionDataModule
    from qlora_lightning.data.reading.bad_rows import BadRow, RowFault
    from qlora_lightning.data.reading.reader import Row, RowReader, read_rows
    from qlora_lightning.data.reading.sources import Source, find_sources
    from qlora_lightning.data.rows.formats import Conversation, Message
    from qlora_lightning.data.samples.report import Report
    from qlora_lightning.data.samples.sample import Sample
    from qlora_lightning.data.samples.sample_set import SampleSet

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
    "BadRow": "reading.bad_rows",
    "Batch": "batches.collate",
    "ChatRenderer": "chat.renderer",
    "Conversation": "rows.formats",
    "FlatLoader": "batches.loader",
    "InstructionDataModule": "datamodule",
    "Message": "rows.formats",
    "PromptBatch": "batches.prompt_loader",
    "PromptLoader": "batches.prompt_loader",
    "Rendered": "chat.renderer",
    "Report": "samples.report",
    "Row": "reading.reader",
    "RowFault": "reading.bad_rows",
    "RowReader": "reading.reader",
    "Sample": "samples.sample",
    "SampleSet": "samples.sample_set",
    "Source": "reading.sources",
    "StreamLoader": "batches.stream",
    "collate": "batches.collate",
    "epoch_order": "batches.order",
    "find_sources": "reading.sources",
    "rank_batches": "batches.order",
    "read_rows": "reading.reader",
}


def __getattr__(name: str) -> Any:
    """Import a public name from the file that defines it."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
