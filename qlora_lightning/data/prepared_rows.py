"""A data module's rows: read from files or from elsewhere, rendered, tokenized, and kept in the cache."""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule

from qlora_lightning.data.cache import Prepared, cached_samples, describe_sources
from qlora_lightning.data.chat.labels import ChatRenderer
from qlora_lightning.data.chat.tokenizer import TokenizerChoice, hash_tokenizer, load_choice, tokenizer_of_base
from qlora_lightning.data.prepare import Recipe, as_row, prepare_prompts, prepare_samples, rows_bar
from qlora_lightning.data.prompts import Prompt, as_samples
from qlora_lightning.data.report import Report
from qlora_lightning.data.rows.bad_rows import BadRow
from qlora_lightning.data.rows.readers import Row, RowReader
from qlora_lightning.data.rows.sources import RowSettings, Source, find_sources

# settings that a checkpoint remembers
MAKE_SAMPLES = ("format", "system", "train_on", "max_length", "too_long", "on_bad_row", "val_fraction")


class PreparedRows(LightningDataModule):
    """Reads the rows of a split and makes samples of them, or prompts; what it does with them is another matter.

    Its settings are those of :class:`~qlora_lightning.data.datamodule.InstructionDataModule`, which sets them.

    Attributes:
        files: What was named for each split.
        reports: What was found in the splits that are prepared.
    """

    files: dict[str, Any]
    format: str
    columns: dict[str, str | None]
    system: str | None
    chat_template: str | None
    template_options: dict[str, Any]
    train_on: Literal["assistant", "last", "all"]
    max_length: int
    too_long: Literal["truncate", "drop", "split"]
    streaming: bool
    _tokenizer_choice: TokenizerChoice

    def __init__(self) -> None:
        super().__init__()
        self.reports: dict[str, Report] = {}
        self._tokenizer: Any = None
        self._renderer: ChatRenderer | None = None
        self._prompts: list[Prompt] = []
        self._weights: list[float] | None = None  # of the sources of training rows

    @property
    def tokenizer(self) -> Any:
        """The tokenizer with the chosen chat template, loaded when it is first needed."""
        if self._tokenizer is None:
            self._tokenizer = load_choice(self._tokenizer_choice, self.chat_template, self.template_options)
        return self._tokenizer

    @property
    def renderer(self) -> ChatRenderer:
        """Renders conversations and prompts with the tokenizer and the settings of this data module."""
        if self._renderer is None:
            self._renderer = ChatRenderer(self.tokenizer, train_on=self.train_on)
        return self._renderer

    @property
    def stop_ids(self) -> list[int]:
        """Token ids at which generation stops; every answer that is trained to its end ends in one of them."""
        return sorted(self.renderer.stop_ids)

    def load_rows(self, split: str) -> Iterable[Row | BadRow | dict[str, Any]]:
        """Return the rows of ``train``, ``val``, ``test`` or ``predict``; none if there is no such split.

        Override it to take rows from elsewhere: plain dicts will do.
        """
        return (row for source in self._sources(split) for row in RowReader(source))

    def _prepare_samples(self, split: str) -> Prepared | None:
        """Take the samples of a split from the cache, or make them; rows from elsewhere are made each time."""

        def prepare(rows: Sequence[tuple[RowSettings, Iterable[Row | BadRow]]]) -> Prepared:
            with rows_bar(split, show=self._rank_and_world_size()[0] == 0) as watch:
                return prepare_samples(rows, self._recipe(), split, watch)

        if self._has_own_rows():
            own = [as_row(row, split, number) for number, row in enumerate(self.load_rows(split) or (), start=1)]
            return prepare([(self._row_settings(), own)]) if own else None
        sources = self._sources(split)
        if not sources:
            return None
        if split == "train" and sources[0].weight is not None:
            self._weights = [source.weight or 0.0 for source in sources]
        key = self._key(sources, split)
        if key is None:
            return prepare([(source.settings, RowReader(source)) for source in sources])
        label = f"{', '.join(source.path for source in sources)} ({split})"
        return cached_samples(key, label, lambda: prepare([(source.settings, RowReader(source)) for source in sources]))

    def _prepare_prompts(self) -> Prepared | None:
        rows = [as_row(row, "predict", number) for number, row in enumerate(self.load_rows("predict"), start=1)]
        if not rows:
            return None
        with rows_bar("predict", show=self._rank_and_world_size()[0] == 0) as watch:
            self._prompts, report = prepare_prompts([(self._row_settings(), rows)], self._recipe(), "predict", watch)
        return as_samples(self._prompts), report

    def _has_own_rows(self) -> bool:
        return type(self).load_rows is not PreparedRows.load_rows

    def _recipe(self) -> Recipe:
        return Recipe(self.renderer, self.max_length, self.too_long)

    def _row_settings(self) -> RowSettings:
        return RowSettings(self.format, self.columns, self.system)

    def _sources(self, split: str) -> list[Source]:
        value = self.files[split]
        return (
            []
            if value is None
            else find_sources(
                value, split, streaming=self.streaming and split == "train", settings=self._row_settings()
            )
        )

    def _key(self, sources: Sequence[Source], split: str) -> Mapping[str, Any] | None:
        """Return everything that samples depend on; None where that cannot be told."""
        tokenizer = hash_tokenizer(self._tokenizer_choice, self.chat_template)
        if tokenizer is None or "." in self.format:  # a function of the user's may depend on anything
            return None
        settings = {name: getattr(self, name) for name in ("columns", *MAKE_SAMPLES[:5])}
        key = {"sources": describe_sources(sources), "split": split}
        options = json.dumps(self.template_options, sort_keys=True, default=str)
        return {**key, "tokenizer": tokenizer, "template_options": options, **settings}

    def _tokenizer_of_trained_base(self) -> TokenizerChoice:
        """Return the tokenizer of the base of the Trainer's module; None if there is none."""
        module = getattr(self.trainer, "lightning_module", None)
        base = getattr(module, "base", None)
        if not isinstance(base, str):
            return None
        return tokenizer_of_base(base, getattr(module, "revision", None), getattr(module, "trust_remote_code", False))

    def _rank_and_world_size(self) -> tuple[int, int]:
        if self.trainer is not None:
            return self.trainer.global_rank, self.trainer.world_size
        if torch.distributed.is_available() and torch.distributed.is_initialized():  # as under Fabric
            return torch.distributed.get_rank(), torch.distributed.get_world_size()
        return 0, 1
