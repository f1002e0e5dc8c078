"""What is trained on: file -> row -> conversation -> sample -> batch, and the data module that wires it.

Names are imported when they are first used, so that ``import qlora_lightning.data`` loads neither torch nor Lightning.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qlora_lightning.data.bad_rows import BadRow, RowFault
    from qlora_lightning.data.batches import Batch, collate
    from qlora_lightning.data.chat import ChatRenderer, Rendered
    from qlora_lightning.data.datamodule import InstructionDataModule
    from qlora_lightning.data.formats import Conversation, Message
    from qlora_lightning.data.lengths import fit_length
    from qlora_lightning.data.loader import FlatLoader
    from qlora_lightning.data.order import epoch_order, rank_batches
    from qlora_lightning.data.prompts import PromptBatch, PromptLoader
    from qlora_lightning.data.reader import Row, RowReader, read_rows
    from qlora_lightning.data.report import Report
    from qlora_lightning.data.sample_set import SampleSet
    from qlora_lightning.data.samples import Sample
    from qlora_lightning.data.sources import Source, find_sources
    from qlora_lightning.data.stream import StreamLoader

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
    "fit_length",
    "rank_batches",
    "read_rows",
)

_HOMES = {
    "BadRow": "bad_rows",
    "Batch": "batches",
    "ChatRenderer": "chat",
    "Conversation": "formats",
    "FlatLoader": "loader",
    "InstructionDataModule": "datamodule",
    "Message": "formats",
    "PromptBatch": "prompts",
    "PromptLoader": "prompts",
    "Rendered": "chat",
    "Report": "report",
    "Row": "reader",
    "RowFault": "bad_rows",
    "RowReader": "reader",
    "Sample": "samples",
    "SampleSet": "sample_set",
    "Source": "sources",
    "StreamLoader": "stream",
    "collate": "batches",
    "epoch_order": "order",
    "find_sources": "sources",
    "fit_length": "lengths",
    "rank_batches": "order",
    "read_rows": "reader",
}


def __getattr__(name: str) -> Any:
    """Import a public name from the file that defines it."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
