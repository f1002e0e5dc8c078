"""The data module: files in, batches out, for LightningCLI and for Python alike."""

import copy
import json
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from qlora_lightning.data.batches.loader import FabricLoader, FlatLoader
from qlora_lightning.data.batches.order import choose_seed, describe_other_seed
from qlora_lightning.data.batches.stream import StreamLoader
from qlora_lightning.data.cache import Prepared, cached_samples, describe_sources, identify
from qlora_lightning.data.chat.labels import TRAIN_ON, ChatRenderer
from qlora_lightning.data.chat.lengths import TOO_LONG
from qlora_lightning.data.chat.render import REASONING
from qlora_lightning.data.chat.tokenizer import TokenizerChoice, hash_tokenizer, load_choice, tokenizer_of_base
from qlora_lightning.data.prepare import Recipe, Rows, prepare_prompts, prepare_samples, watch_rows
from qlora_lightning.data.prompts import Prompt, PromptLoader, as_samples
from qlora_lightning.data.report import Report
from qlora_lightning.data.rows.bad_rows import BadRow
from qlora_lightning.data.rows.readers import Row, RowReader
from qlora_lightning.data.rows.sources import RowSettings, Source, find_sources
from qlora_lightning.data.samples import SampleSet, find_duplicates, find_overlap, hold_out
from qlora_lightning.support.errors import UserError

_STAGES = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ("predict",)}
_SAMPLE_SETTINGS = ("train_on", "reasoning", "max_length", "too_long", "deduplicate")
# Settings that a checkpoint remembers; one that it lacks had its default.
_REMEMBERED = (
    *("format", "system", "on_bad_row", "val_fraction", *_SAMPLE_SETTINGS),
    *("batch_size", "tokens_per_batch", "group_by_length", "shuffle", "streaming", "shuffle_buffer"),
)
DataPath = str | dict[str, Any] | list[str | dict[str, Any]]


class InstructionDataModule(LightningDataModule):
    """Instruction data as flat batches without padding, in an order from which a run can stop and go on exactly.

    The order is a pure function of seed and epoch. The seed is that of ``seed_everything`` (the environment variable
    ``PL_GLOBAL_SEED``), else ``torch.initial_seed()`` at the first ``setup``; a resumed run keeps the checkpoint's.

    Args:
        train: what to train on: a file (``.jsonl``, ``.json``, ``.csv``, ``.tsv``, ``.parquet``, ``.arrow``, also
            compressed), a folder, a glob, a URL, a hub id, a mapping ``{path, weight, rows, format, …}``, or a list of
            these. Without weights an epoch is every row once; with weights it has as many rows as all sources
            together, each source its share of them.
        val: what to validate on.
        test: what ``test`` reports on.
        predict: rows that ``predict`` answers; they may lack answers.
        format: ``auto`` (by the keys of the rows), ``alpaca``, ``messages``, ``sharegpt``, ``prompt_completion``,
            ``question_answer``, ``glaive``, ``text``, ``segments``, ``tokens``, or the dotted path of a function
            ``row -> conversation``.
        columns: other names for columns, ``{their name: our name}``; ``null`` leaves a column out.
        roles: other names of who speaks, ``{their name: our name}``.
        system: system prompt for rows without one.
        encoding: of text files: ``latin-1`` for example.
        chat_template: ``llama3``, ``chatml``, ``chatml-tools``, ``alpaca`` or a ``.jinja`` file; by default the
            tokenizer's own.
        template_options: values of the template's variables, ``{date_string: 27 Nov 2026, enable_thinking: false}``;
            they are saved inside the adapter's template. A template that asks for today's date gets 26 July 2024,
            unless ``strftime_now: 2026-11-27`` or a variable of its own names another.
        reasoning: of earlier turns: ``template`` (as the chat template has it at inference), ``keep`` or ``drop``.
        train_on: ``assistant``: every answer and its stop token; ``last``: the last answer only; ``all``: every token.
        max_length: tokens of the longest sample.
        too_long: longer ones: ``truncate``: the oldest turns go first, then the middle of the longest message (and of a
            long system message), then the end of an answer; ``drop``; or ``split`` into pieces.
        on_bad_row: ``error``: list the bad rows and stop; ``skip``: leave them out and count them.
        batch_size: rows per micro-batch on each device; 8 by default.
        tokens_per_batch: tokens per micro-batch instead, a budget that rows are packed into.
        group_by_length: put rows of like length into a micro-batch.
        shuffle: another order in each epoch; ``False``: the order of the files in every epoch, as for a curriculum.
        deduplicate: leave out rows whose tokens and labels equal those of an earlier row of the same split.
        val_fraction: share of the training rows to validate on instead of ``val``; the same contents stay together.
        streaming: read the training rows while training, without end: for data larger than memory or disk.
        shuffle_buffer: rows of a stream that are shuffled together.
        tokenizer: hub id, folder or ``package:NAME``, or ``{name, revision, trust_remote_code}``; from Python also a
            tokenizer object. By default the base's, which the Trainer's module names; without a Trainer name it here.
        accept_changed_data: resume from a checkpoint although training or validation samples differ now. It is not
            written to config.yaml. If validation samples differ, the ranking of the best adapter starts over.
    """

    def __init__(
        self,
        train: DataPath | None = None,
        val: DataPath | None = None,
        test: DataPath | None = None,
        predict: DataPath | None = None,
        format: str = "auto",
        columns: dict[str, str | None] | None = None,
        roles: dict[str, str] | None = None,
        system: str | None = None,
        encoding: str = "utf-8",
        chat_template: str | None = None,
        template_options: dict[str, Any] | None = None,
        reasoning: Literal["template", "keep", "drop"] = "template",
        train_on: Literal["assistant", "last", "all"] = "assistant",
        max_length: int = 2048,
        too_long: Literal["truncate", "drop", "split"] = "truncate",
        on_bad_row: Literal["error", "skip"] = "error",
        batch_size: int | None = None,
        tokens_per_batch: int | None = None,
        group_by_length: bool = False,
        shuffle: bool = True,
        deduplicate: bool = False,
        val_fraction: float | None = None,
        streaming: bool = False,
        shuffle_buffer: int = 1_000,
        tokenizer: str | dict[str, Any] | Any | None = None,
        accept_changed_data: bool = False,
    ) -> None:
        super().__init__()
        self.files = {"train": train, "val": val, "test": test, "predict": predict}
        self.format, self.columns, self.roles, self.system = format, columns or {}, roles or {}, system
        self.encoding = encoding
        self.chat_template, self.template_options = chat_template, template_options or {}
        self.reasoning, self.train_on = reasoning, train_on
        self.max_length, self.too_long, self.on_bad_row = max_length, too_long, on_bad_row
        self.batch_size, self.tokens_per_batch = batch_size, tokens_per_batch
        self.group_by_length, self.shuffle, self.deduplicate = group_by_length, shuffle, deduplicate
        self.val_fraction = val_fraction
        self.streaming, self.shuffle_buffer = streaming, shuffle_buffer
        self.accept_changed_data = accept_changed_data
        self._check_settings()
        if batch_size is None and tokens_per_batch is None:
            self.batch_size = 8
        self.lenient = False  # `inspect` looks at what training refuses
        self.samples: dict[str, SampleSet] = {}
        self.reports: dict[str, Report] = {}
        self._named_tokenizer = self._tokenizer_choice = tokenizer
        self._tokenizer: Any = None
        self._renderer: ChatRenderer | None = None
        self._prompts: list[Prompt] = []
        self._weights: list[float] | None = None  # of the sources of training rows
        self._seed: int | None = None
        self._pool: Prepared | None = None  # training rows before validation rows are held out

    def _check_settings(self) -> None:
        for name, known in (
            ("on_bad_row", ("error", "skip")),
            ("train_on", TRAIN_ON),
            ("too_long", TOO_LONG),
            ("reasoning", REASONING),
        ):
            if getattr(self, name) not in known:
                words = f"{', '.join(known[:-1])} or {known[-1]}"
                raise UserError(f"{name}: expected {words}, found {getattr(self, name)!r}.")
        for name, least in (("batch_size", 1), ("tokens_per_batch", 1), ("shuffle_buffer", 1), ("max_length", 2)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"{name}: expected at least {least}, found {value}.")
        for contradicts, message in (
            (
                self.files["val"] is not None and self.val_fraction is not None,
                "val and val_fraction are both given: keep one, the file or the share of the training rows.",
            ),
            (
                self.val_fraction is not None and not 0 < self.val_fraction < 1,
                f"data.val_fraction is {self.val_fraction or 0:g}: expected a share of the training rows between 0 and "
                "1. For no validation set it to null; for validation rows of their own name a file in data.val.",
            ),
            (
                self.batch_size is not None and self.tokens_per_batch is not None,
                "batch_size and tokens_per_batch are both given: keep one, rows or tokens per micro-batch.",
            ),
            (
                not self.shuffle and self.group_by_length,
                "shuffle: false keeps the order of the files, which group_by_length changes: leave one of them out.",
            ),
            (
                not self.shuffle and self.tokens_per_batch is not None,
                "shuffle: false keeps the order of the files, which packing into tokens_per_batch changes: use "
                "batch_size instead.",
            ),
            (
                self.streaming and self.val_fraction is not None,
                "val_fraction needs all rows, which streaming never has: name validation rows in data.val.",
            ),
            (
                self.streaming and self._has_own_rows(),
                "streaming reads the files of data.train itself, so load_rows cannot be overridden beside it.",
            ),
            (
                self.streaming and self.group_by_length,
                "group_by_length needs all rows, which streaming never has: use tokens_per_batch instead.",
            ),
            (self.streaming and self.deduplicate, "deduplicate needs all rows, which streaming never has."),
        ):
            if contradicts:
                raise UserError(message)

    # ---- what it is made with ------------------------------------------------------------------------------------

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
            self._renderer = ChatRenderer(self.tokenizer, train_on=self.train_on, reasoning=self.reasoning)
        return self._renderer

    @property
    def stop_ids(self) -> list[int]:
        """Token ids at which generation stops; every answer that is trained to its end ends in one of them."""
        return sorted(self.renderer.stop_ids)

    @property
    def identity(self) -> dict[str, Any]:
        """Hashes of training and validation samples, tokenizer and template, and the settings that made batches."""
        return {
            **identify(self.samples, self.tokenizer),
            "settings": {name: getattr(self, name) for name in _REMEMBERED},
        }

    def load_rows(self, split: str) -> Iterable[Row | BadRow | dict[str, Any]]:
        """Return the rows of ``train``, ``val``, ``test`` or ``predict``; none if there is no such split.

        Override it to take rows from elsewhere: plain dicts work.
        """
        return (row for source in self.sources(split) for row in RowReader(source))

    # ---- Lightning's hooks ---------------------------------------------------------------------------------------

    @override
    def setup(self, stage: str | None = None) -> None:
        if self._seed is None:
            self._seed = choose_seed(self.trainer)
        if self._named_tokenizer is None:
            self._take_tokenizer(self._tokenizer_of_trained_base())
        needed = _STAGES.get(stage or "", tuple(self.files))
        for split in needed:
            self._prepare(split)
            optional = stage is None or (stage == "fit" and split == "val")
            if not optional and split not in self.reports:
                raise UserError(f"{split} rows are needed, but none are given: name a file in `data.{split}`.")
        if "val" in needed and "val" not in self.samples:
            # Lightning validates wherever the hook is overridden, and warns of loaders without batches.
            self.val_dataloader = super().val_dataloader  # type: ignore[method-assign]

    def count_train_batches(self) -> int:
        """Count the micro-batches of one epoch on each rank: what a schedule is planned with."""
        return len(self.train_dataloader())

    @override
    def train_dataloader(self) -> FlatLoader | StreamLoader:
        if self.streaming:
            return self._make_stream(self._stream_length())
        # `overfit_batches` is Lightning's wish for the same batches in every epoch.
        shuffle = self.shuffle and not getattr(self.trainer, "overfit_batches", 0)
        return self._make_loader("train", shuffle, group_by_length=self.group_by_length, weights=self._weights)

    @override
    def val_dataloader(self) -> FlatLoader:
        return self._make_loader("val")

    @override
    def test_dataloader(self) -> FlatLoader:
        return self._make_loader("test")

    @override
    def predict_dataloader(self) -> PromptLoader:
        return PromptLoader(self._prompts, self.batch_size or 8, self.stop_ids, *self._rank_and_world_size())

    @override
    def state_dict(self) -> dict[str, Any]:
        return {} if self._seed is None else {"seed": self._seed}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        words = describe_other_seed(state_dict.get("seed"), self._seed)
        if words and (self.val_fraction is not None or (self.trainer is not None and self.trainer.training)):
            rank_zero_info(words)
        self._seed = state_dict.get("seed", self._seed)
        if self._pool is not None:
            self._divide(*self._pool)

    # ---- from rows to samples ------------------------------------------------------------------------------------

    def _prepare(self, split: str) -> None:
        """Prepare a split unless it is ready or there is none."""
        if split in self.reports:
            return
        if split == "val" and self.val_fraction is not None:
            self._prepare("train")  # which holds the validation rows out
            return
        if split == "train" and self.streaming:
            self._check_stream()
            return
        prepared = self._prepare_prompts() if split == "predict" else self._prepare_samples(split)
        if prepared is None:
            return
        samples, report = prepared
        report.check_bad(skip=self.on_bad_row == "skip" or self.lenient)
        report.check_left()
        if not self.lenient:
            report.check_usable()
        if split == "train" and self.val_fraction is not None:
            self._pool = prepared
            self._divide(samples, report)
            return
        self.samples[split], self.reports[split] = samples, report
        if split in ("val", "test") and "train" in self.samples:
            report.overlap, report.overlap_pairs = find_overlap(self.samples["train"], samples)
        rank_zero_info(report.describe())

    def _prepare_samples(self, split: str) -> Prepared | None:
        """Take the samples of a split from the cache, or make them; rows from elsewhere are made each time."""
        sources = [] if self._has_own_rows() else self.sources(split)
        if not sources and not self._has_own_rows():
            return None
        if split == "train" and sources and sources[0].weight is not None:
            if not self.shuffle:
                raise UserError("shuffle: false keeps the order of the files, which weights mix: leave them out.")
            self._weights = [source.weight or 0.0 for source in sources]

        def prepare() -> Prepared:
            with watch_rows(split, show=self._rank_and_world_size()[0] == 0) as watch:
                return prepare_samples(self._read(split, sources), self._recipe(), split, watch, self.deduplicate)

        key = self._key(sources)
        if key is None:
            samples, report = prepare()
        else:
            label = ", ".join(source.path for source in sources)
            samples, report = cached_samples(key, label, prepare)
        report.split = split
        return (samples, report) if report.rows else None

    def _prepare_prompts(self) -> Prepared | None:
        sources = [] if self._has_own_rows() else self.sources("predict")
        if not sources and not self._has_own_rows():
            return None
        with watch_rows("predict", show=self._rank_and_world_size()[0] == 0) as watch:
            self._prompts, report = prepare_prompts(self._read("predict", sources), self._recipe(), "predict", watch)
        return (as_samples(self._prompts), report) if report.rows else None

    def _divide(self, samples: SampleSet, whole: Report) -> None:
        """Hold validation rows out of the training rows; what became of rows before is reported with those."""
        self.samples["train"], self.samples["val"] = hold_out(samples, self.val_fraction or 0.0, self._seed or 0)
        left_out = sum(whole.dropped.values()) + whole.bad_rows
        for split, more in (("train", left_out), ("val", 0)):
            rows = len(set(self.samples[split].row_ids.tolist()))
            report = copy.deepcopy(whole) if split == "train" else Report(split, formats=list(whole.formats))
            report.rows = rows + more
            report.count_samples(self.samples[split])
            report.duplicates, report.duplicate_pairs = find_duplicates(self.samples[split])
            self.reports[split] = report
            rank_zero_info(report.describe())

    def _has_own_rows(self) -> bool:
        return type(self).load_rows is not InstructionDataModule.load_rows

    def _read(self, split: str, sources: Sequence[Source]) -> list[tuple[RowSettings, Rows]]:
        """Return the rows of each source, and how they are read; rows from elsewhere are one source."""
        if self._has_own_rows():
            rows = enumerate(self.load_rows(split) or (), start=1)
            return [(self._row_settings(), (_as_row(row, split, number) for number, row in rows))]
        return [(source.settings, RowReader(source)) for source in sources]

    def _recipe(self) -> Recipe:
        return Recipe(self.renderer, self.max_length, self.too_long)

    def _row_settings(self) -> RowSettings:
        return RowSettings(self.format, self.columns, self.system, self.roles)

    def sources(self, split: str) -> list[Source]:
        """Return what ``data.train`` or a neighbour names, in its order; none if it names nothing."""
        value = self.files[split]
        if value is None:
            return []
        streaming = self.streaming and split == "train"
        return find_sources(value, split, streaming=streaming, settings=self._row_settings(), encoding=self.encoding)

    def _key(self, sources: Sequence[Source]) -> dict[str, Any] | None:
        """Return everything that samples depend on; None if nobody can tell."""
        tokenizer = hash_tokenizer(self._tokenizer_choice, self.chat_template)
        # a function of the user's may depend on anything
        if not sources or tokenizer is None or any("." in source.settings.format for source in sources):
            return None
        return {
            "sources": describe_sources(sources),
            "tokenizer": tokenizer,
            "template_options": json.dumps(self.template_options, sort_keys=True, default=str),
            **{name: getattr(self, name) for name in _SAMPLE_SETTINGS},
        }

    # ---- the tokenizer of a module's base, ranks, loaders --------------------------------------------------------

    def _take_tokenizer(self, choice: TokenizerChoice) -> None:
        """Take the tokenizer of a module's base; what was prepared with that of another base is made again."""
        if choice is None or choice == self._tokenizer_choice:
            return
        self._tokenizer_choice, self._tokenizer, self._renderer, self._pool = choice, None, None, None
        self.samples.clear()
        self.reports.clear()

    def _tokenizer_of_trained_base(self) -> TokenizerChoice:
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

    def _make_loader(self, split: str, shuffle: bool = False, **settings: Any) -> FlatLoader:
        kind = FlatLoader if self.trainer is not None else FabricLoader
        ranks = self._rank_and_world_size()
        budget = self.tokens_per_batch
        return kind(
            self.samples[split], self.batch_size, self._seed or 0, shuffle, *ranks, tokens_per_batch=budget, **settings
        )

    def _check_stream(self) -> None:
        """Read the first rows of the stream; there may be no length yet, without a Trainer."""
        if self.files["train"] is None:
            return
        stream = self._make_stream(1 if self.trainer is None else self._stream_length())
        self.samples["train"], self.reports["train"] = stream.first_block()
        rank_zero_info(f"streaming, its first rows are checked; {self.reports['train'].describe()}")

    def _stream_length(self) -> int:
        """Return the micro-batches of the run on each rank."""
        trainer: Any = self.trainer
        if trainer is None or trainer.max_steps < 1:
            raise UserError("data.streaming: a stream has no end, so trainer.max_steps must say where to stop.")
        if trainer.overfit_batches:
            raise UserError("data.streaming: trainer.overfit_batches wants the same batches again: leave one out.")
        return int(trainer.max_steps * trainer.accumulate_grad_batches)

    def _make_stream(self, length: int) -> StreamLoader:
        rank, world_size = self._rank_and_world_size()
        return StreamLoader(
            self.sources("train"),
            self._recipe(),
            length,
            self.batch_size,
            self.tokens_per_batch,
            self._seed or 0,
            self.on_bad_row == "skip",
            rank,
            world_size,
            self.shuffle,
            self.shuffle_buffer,
            self._agree,
        )

    def _agree(self, count: int) -> int:
        """Return the largest of the counts that the ranks call this with."""
        _, world_size = self._rank_and_world_size()
        counts: list[int] = [count] * world_size
        if world_size > 1:
            torch.distributed.all_gather_object(counts, count)
        return max(counts)


def _as_row(row: Row | BadRow | dict[str, Any], split: str, number: int) -> Row | BadRow:
    """Return a plain dict as a row with a place, so that messages can name it."""
    if isinstance(row, Row | BadRow):
        return row
    if not isinstance(row, dict):
        raise UserError(f"load_rows({split!r}): expected rows or dicts, found {type(row).__name__} as row {number}.")
    return Row(row, split, number)
