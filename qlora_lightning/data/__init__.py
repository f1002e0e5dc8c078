"""What is trained on: file -> row -> conversation -> sample -> batch, and the data module that wires it.

Names are imported when they are first used, so that ``import qlora_lightning.data`` loads neither torch nor Lightning.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qlora_lightning.data.batches.collate import Batch as Batch
    from qlora_lightning.data.batches.collate import collate as collate
    from qlora_lightning.data.batches.loader import FlatLoader as FlatLoader
    from qlora_lightning.data.batches.order import epoch_order as epoch_order
    from qlora_lightning.data.batches.order import rank_batches as rank_batches
    from qlora_lightning.data.batches.stream import StreamLoader as StreamLoader
    from qlora_lightning.data.chat.labels import ChatRenderer as ChatRenderer
    from qlora_lightning.data.chat.labels import Rendered as Rendered
    from qlora_lightning.data.datamodule import InstructionDataModule as InstructionDataModule
    from qlora_lightning.data.prompts import PromptBatch as PromptBatch
    from qlora_lightning.data.prompts import PromptLoader as PromptLoader
    from qlora_lightning.data.report import Report as Report
    from qlora_lightning.data.rows.bad_rows import BadRow as BadRow
    from qlora_lightning.data.rows.bad_rows import RowFault as RowFault
    from qlora_lightning.data.rows.conversation import Conversation as Conversation
    from qlora_lightning.data.rows.conversation import Message as Message
    from qlora_lightning.data.rows.readers import Row as Row
    from qlora_lightning.data.rows.readers import RowReader as RowReader
    from qlora_lightning.data.rows.readers import read_rows as read_rows
    from qlora_lightning.data.rows.sources import Source as Source
    from qlora_lightning.data.rows.sources import find_sources as find_sources
    from qlora_lightning.data.samples import Sample as Sample
    from qlora_lightning.data.samples import SampleSet as SampleSet

_NAMES = {
    "batches.collate": "Batch collate",
    "batches.loader": "FlatLoader",
    "batches.order": "epoch_order rank_batches",
    "batches.stream": "StreamLoader",
    "chat.labels": "ChatRenderer Rendered",
    "datamodule": "InstructionDataModule",
    "prompts": "PromptBatch PromptLoader",
    "report": "Report",
    "rows.bad_rows": "BadRow RowFault",
    "rows.conversation": "Conversation Message",
    "rows.readers": "Row RowReader read_rows",
    "rows.sources": "Source find_sources",
    "samples": "Sample SampleSet",
}
_HOMES = {name: home for home, names in _NAMES.items() for name in names.split()}
__all__ = tuple(sorted(_HOMES))


def __getattr__(name: str) -> Any:
    """Import a public name from the file that defines it."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
