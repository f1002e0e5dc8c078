"""The data module: files in, batches out, for LightningCLI and for Python alike."""

from typing import Any, Literal

from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from qlora_lightning.data.batches.loader import FabricLoader, FlatLoader
from qlora_lightning.data.batches.order import choose_seed, describe_other_seed
from qlora_lightning.data.batches.stream import StreamLoader, check_stream_length
from qlora_lightning.data.cache import Prepared, identify
from qlora_lightning.data.chat.labels import TRAIN_ON
from qlora_lightning.data.chat.lengths import check_length_settings
from qlora_lightning.data.prepare import check_combinations, check_usable, check_word, recount, refuse_unusable
from qlora_lightning.data.prepared_rows import MAKE_SAMPLES, PreparedRows
from qlora_lightning.data.prompts import PromptLoader
from qlora_lightning.data.report import Report
from qlora_lightning.data.samples import SampleSet, find_overlap, hold_out
from qlora_lightning.support.errors import UserError

_STAGES = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ("predict",)}
# settings that a checkpoint remembers, beside those that make samples
_MAKE_BATCHES = ("batch_size", "tokens_per_batch", "group_by_length", "streaming")
DataPath = str | dict[str, Any] | list[str | dict[str, Any]]


class InstructionDataModule(PreparedRows):
    """Instruction data as flat batches without padding, in an order from which a run can stop and go on exactly.

    The order is a pure function of seed and epoch. The seed is that of ``seed_everything`` (the environment variable
    ``PL_GLOBAL_SEED``), else ``torch.initial_seed()`` at the first ``setup``; a resumed run keeps the checkpoint's.

    Args:
        train: what to train on: a file (``.jsonl``, ``.json``, ``.csv``, ``.parquet``, also compressed), a folder, a
            glob, a hub id, ``{path, weight, split, name, revision}``, or a list of these. Without weights an epoch is
            every row once; with weights it has as many rows as all sources together, each source its share of them.
        val: what to validate on.
        test: what ``test`` reports on.
        predict: rows that ``predict`` answers; they may lack answers.
        format: ``auto`` (by the keys of the rows), ``alpaca``, ``messages``, ``sharegpt``, ``prompt_completion``,
            ``question_answer``, or the dotted path of a function ``row -> conversation``.
        columns: other names for columns, ``{their name: our name}``; ``null`` leaves a column out.
        system: system prompt for rows without one.
        chat_template: ``llama3``, ``chatml``, ``alpaca`` or a ``.jinja`` file; by default the tokenizer's own.
        template_options: values of the template's variables, ``{date_string: 27 Nov 2026, enable_thinking: false}``;
            they are saved inside the adapter's template. A template that asks for today's date gets 26 July 2024,
            unless ``strftime_now: 2026-11-27`` or a variable of its own names another.
        train_on: ``assistant``: every answer and its stop token; ``last``: the last answer only; ``all``: every token.
        max_length: tokens of the longest sample.
        too_long: longer ones: ``truncate``: the oldest turns go first, then the middle of the longest message (and of a
            long system message), then the end of an answer; ``drop``; or ``split`` into pieces.
        on_bad_row: ``error``: list the bad rows and stop; ``skip``: leave them out and count them.
        batch_size: rows per micro-batch on each device; 8 by default.
        tokens_per_batch: tokens per micro-batch instead, a budget that rows are packed into.
        group_by_length: put rows of like length into a micro-batch.
        val_fraction: share of the training rows to validate on instead of ``val``; the same contents stay together.
        streaming: read the training rows while training, without end: for data larger than memory or disk.
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
        system: str | None = None,
        chat_template: str | None = None,
        template_options: dict[str, Any] | None = None,
        train_on: Literal["assistant", "last", "all"] = "assistant",
        max_length: int = 2048,
        too_long: Literal["truncate", "drop", "split"] = "truncate",
        on_bad_row: Literal["error", "skip"] = "error",
        batch_size: int | None = None,
        tokens_per_batch: int | None = None,
        group_by_length: bool = False,
        val_fraction: float | None = None,
        streaming: bool = False,
        tokenizer: str | dict[str, Any] | Any | None = None,
        accept_changed_data: bool = False,
    ) -> None:
        super().__init__()
        check_word("on_bad_row", on_bad_row, ("error", "skip"))
        check_word("train_on", train_on, TRAIN_ON)
        check_length_settings(max_length, too_long)
        own_rows = self._has_own_rows()
        check_combinations(val, val_fraction, batch_size, tokens_per_batch, group_by_length, streaming, own_rows)
        self.files = {"train": train, "val": val, "test": test, "predict": predict}
        self.format, self.columns, self.system = format, columns or {}, system
        self.chat_template, self.template_options = chat_template, template_options or {}
        self.train_on = train_on
        self.max_length, self.too_long, self.on_bad_row = max_length, too_long, on_bad_row
        self.batch_size = 8 if batch_size is None and tokens_per_batch is None else batch_size
        self.tokens_per_batch, self.group_by_length = tokens_per_batch, group_by_length
        self.val_fraction, self.streaming = val_fraction, streaming
        self.accept_changed_data = accept_changed_data
        self.lenient = False  # `inspect` looks at what training refuses
        self.samples: dict[str, SampleSet] = {}
        self._named_tokenizer = self._tokenizer_choice = tokenizer
        self._seed: int | None = None
        self._pool: Prepared | None = None  # training rows before validation rows are held out

    @property
    def identity(self) -> dict[str, Any]:
        """Hashes of training and validation samples, tokenizer and template, and the settings that made batches."""
        settings = {name: getattr(self, name) for name in (*MAKE_SAMPLES, *_MAKE_BATCHES)}
        return {**identify(self.samples, self.tokenizer), "settings": settings}

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

    def _take_tokenizer(self, choice: Any) -> None:
        """Take the tokenizer of a module's base; what was prepared with that of another base is made again."""
        if choice is None or choice == self._tokenizer_choice:
            return
        self._tokenizer_choice, self._tokenizer, self._renderer, self._pool = choice, None, None, None
        self.samples.clear()
        self.reports.clear()

    def count_train_batches(self) -> int:
        """Count the micro-batches of one epoch on each rank: what a schedule is planned with."""
        return len(self.train_dataloader())

    @override
    def train_dataloader(self) -> FlatLoader | StreamLoader:
        if self.streaming:
            return self._make_stream()
        # `overfit_batches` is Lightning's wish for the same batches in every epoch.
        shuffle = not getattr(self.trainer, "overfit_batches", 0)
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

    def _prepare(self, split: str) -> None:
        """Prepare a split unless it is ready or there is none."""
        if split in self.reports:
            return
        if split == "val" and self.val_fraction is not None:
            self._prepare("train")  # which holds the validation rows out
            return
        if split == "train" and self.streaming and self.files[split] is not None:
            stream = self._make_stream(length=1 if self.trainer is None else None)
            self.samples[split], self.reports[split] = stream.first_block()
            rank_zero_info(f"streaming, its first rows are checked; {self.reports[split].describe()}")
            return
        prepared = self._prepare_prompts() if split == "predict" else self._prepare_samples(split)
        if prepared is None:
            return
        samples, report = prepared
        refuse_unusable(report, skip=self.on_bad_row == "skip" or self.lenient)
        if not self.lenient:
            check_usable(report)
        if split == "train" and self.val_fraction is not None:
            self._pool = prepared
            self._divide(samples, report)
            return
        self.samples[split], self.reports[split] = samples, report
        if split != "train" and "train" in self.samples and split != "predict":
            report.overlap, report.overlap_pairs = find_overlap(self.samples["train"], samples)
        rank_zero_info(report.describe())

    def _divide(self, samples: SampleSet, report: Report) -> None:
        """Hold validation rows out of the training rows."""
        self.samples["train"], self.samples["val"] = hold_out(samples, self.val_fraction or 0.0, self._seed or 0)
        for split in ("train", "val"):
            self.reports[split] = recount(split, self.samples[split], report)
            rank_zero_info(self.reports[split].describe())

    def _make_loader(self, split: str, shuffle: bool = False, **settings: Any) -> FlatLoader:
        rank, world_size = self._rank_and_world_size()
        loader = FlatLoader if self.trainer is not None else FabricLoader
        return loader(
            self.samples[split],
            self.batch_size,
            self._seed or 0,
            shuffle,
            rank,
            world_size,
            tokens_per_batch=self.tokens_per_batch,
            **settings,
        )

    def _make_stream(self, length: int | None = None) -> StreamLoader:
        if length is None:
            trainer: Any = self.trainer
            steps = -1 if trainer is None else trainer.max_steps
            accumulate, overfits = (
                (1, 0) if trainer is None else (trainer.accumulate_grad_batches, trainer.overfit_batches)
            )
            length = check_stream_length(steps, accumulate, bool(overfits))
        rank, world_size = self._rank_and_world_size()
        return StreamLoader(
            self._sources("train"),
            self._recipe(),
            length,
            self.batch_size,
            self.tokens_per_batch,
            self._seed or 0,
            self.on_bad_row == "skip",
            rank,
            world_size,
        )
