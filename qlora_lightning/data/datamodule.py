"""The data module: files in, batches out, for LightningCLI and for Python alike."""

import os
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from qlora_lightning.data.bad_rows import BadRow, refuse
from qlora_lightning.data.chat import ChatRenderer
from qlora_lightning.data.loader import FlatLoader
from qlora_lightning.data.prepare import Recipe, Report, Watch, count_samples, prepare_prompts, prepare_samples
from qlora_lightning.data.progress import watch_rows
from qlora_lightning.data.prompts import Prompt, PromptLoader
from qlora_lightning.data.reader import Row, read_rows
from qlora_lightning.data.samples import Sample
from qlora_lightning.data.split import hold_out
from qlora_lightning.errors import UserError

_STAGES = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ("predict",)}


class InstructionDataModule(LightningDataModule):
    """Instruction data as flat batches without padding, in an order from which a run can stop and go on exactly.

    The order is a pure function of seed and epoch. The seed is that of ``seed_everything`` (the environment variable
    ``PL_GLOBAL_SEED``), else ``torch.initial_seed()`` at the first ``setup``; a resumed run keeps the checkpoint's.

    Args:
        train: file to train on, ``.jsonl`` or ``.json``.
        val: file to validate on.
        test: file that ``test`` reports on.
        predict: file whose rows ``predict`` answers; its rows may lack answers.
        format: ``auto``, ``alpaca``, ``messages``, ``prompt_completion``, or the dotted path of a function
            ``row -> conversation``.
        max_length: tokens; longer samples are shortened, out of the middle of the prompt first.
        batch_size: rows per micro-batch on each device.
        tokenizer: hub id, folder or ``package:NAME``; from Python also a tokenizer object.
        val_fraction: share of the training rows to validate on instead of ``val``; the same contents stay together.
        system: system prompt for rows without one.
        train_on: ``assistant``: every answer and its stop token; ``last``: the last answer only; ``all``: every token.
        on_bad_row: ``error``: list the bad rows and stop; ``skip``: leave them out and count them.
    """

    def __init__(
        self,
        train: str | None = None,
        val: str | None = None,
        test: str | None = None,
        predict: str | None = None,
        format: str = "auto",
        max_length: int = 2048,
        batch_size: int = 8,
        tokenizer: str | Any | None = None,
        val_fraction: float | None = None,
        system: str | None = None,
        train_on: Literal["assistant", "last", "all"] = "assistant",
        on_bad_row: Literal["error", "skip"] = "error",
    ) -> None:
        super().__init__()
        if on_bad_row not in ("error", "skip"):
            raise UserError(f"on_bad_row: expected error or skip, found {on_bad_row!r}.")
        if val is not None and val_fraction is not None:
            raise UserError(
                "val and val_fraction are both given: keep one, the file or the share of the training rows."
            )
        self.files = {"train": train, "val": val, "test": test, "predict": predict}
        self.format = format
        self.max_length = max_length
        self.batch_size = batch_size
        self.val_fraction = val_fraction
        self.system = system
        self.train_on = train_on
        self.on_bad_row = on_bad_row
        self.reports: dict[str, Report] = {}
        self._tokenizer_name = tokenizer
        self._tokenizer: Any = None
        self._renderer: ChatRenderer | None = None
        self._seed: int | None = None
        self._samples: dict[str, list[Sample]] = {}
        self._prompts: list[Prompt] = []
        self._pool: list[Sample] = []  # training rows before validation rows are held out
        self._formats: list[str] = []
        self._bad: list[BadRow] = []

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, loaded when it is first needed."""
        if self._tokenizer is None:
            self._tokenizer = self._load_tokenizer()
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

    def load_rows(self, split: str) -> Sequence[Row | dict[str, Any]]:
        """Return the rows of ``train``, ``val``, ``test`` or ``predict``; none if there is no such split.

        Override it to take rows from elsewhere: plain dicts will do.
        """
        file = self.files[split]
        return [] if file is None else read_rows(file, self._bad)

    @override
    def setup(self, stage: str | None = None) -> None:
        if self._seed is None:
            self._seed = self._choose_seed()
        needed = _STAGES.get(stage or "", tuple(self.files))
        for split in needed:
            self._prepare(split)
            optional = stage is None or (stage == "fit" and split == "val")
            if not optional and split not in self.reports:
                raise UserError(f"{split} rows are needed, but none are given: name a file in `data.{split}`.")
        if "val" in needed and "val" not in self._samples:
            # Lightning validates wherever the hook is overridden, and warns of loaders without batches.
            self.val_dataloader = super().val_dataloader  # type: ignore[method-assign]

    def count_train_batches(self) -> int:
        """Count the micro-batches of one epoch on each rank: what a schedule is planned with."""
        return len(self._make_loader("train"))

    @override
    def train_dataloader(self) -> FlatLoader:
        # `overfit_batches` is Lightning's wish for the same batches in every epoch.
        return self._make_loader("train", shuffle=not getattr(self.trainer, "overfit_batches", 0))

    @override
    def val_dataloader(self) -> FlatLoader:
        return self._make_loader("val")

    @override
    def test_dataloader(self) -> FlatLoader:
        return self._make_loader("test")

    @override
    def predict_dataloader(self) -> PromptLoader:
        return PromptLoader(self._prompts, self.batch_size, self.stop_ids, *self._rank_and_world_size())

    @override
    def state_dict(self) -> dict[str, Any]:
        return {} if self._seed is None else {"seed": self._seed}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._seed = state_dict.get("seed", self._seed)
        if self._pool:
            self._divide()

    def _prepare(self, split: str) -> None:
        """Prepare a split unless it is ready or there is none."""
        if split in self.reports:
            return
        if split == "val" and self.val_fraction is not None:
            self._prepare("train")  # which holds the validation rows out
            return
        self._bad = []
        rows = [_as_row(row, split, number) for number, row in enumerate(self.load_rows(split), start=1)]
        if not rows:
            refuse(self._bad)
            return
        unread = list(self._bad)
        recipe = Recipe(self.renderer, self.format, self.system, self.max_length)
        if split == "predict":
            self._prompts, report = prepare_prompts(rows, recipe, self._bad, self._watch(split))
        else:
            self._samples[split], report = prepare_samples(rows, recipe, self._bad, self._watch(split))
        report.add_unread(unread)
        if self.on_bad_row == "error" or report.dropped.total() == report.rows:
            refuse(self._bad, skippable=self.on_bad_row == "error")
        self.reports[split] = report
        rank_zero_info(report.describe(split))
        if split == "train" and self.val_fraction is not None:
            self._pool, self._formats = self._samples["train"], report.formats
            self._divide()

    def _divide(self) -> None:
        training, validation = hold_out(self._pool, self.val_fraction or 0.0, self._seed or 0)
        self._samples.update(train=training, val=validation)
        for split in ("train", "val"):
            self.reports[split] = count_samples(self._samples[split], self._formats)
            rank_zero_info(self.reports[split].describe(f"{split} after the split"))

    def _make_loader(self, split: str, shuffle: bool = False) -> FlatLoader:
        rank, world_size = self._rank_and_world_size()
        return FlatLoader(self._samples[split], self.batch_size, self._seed or 0, shuffle, rank, world_size)

    def _rank_and_world_size(self) -> tuple[int, int]:
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)

    def _choose_seed(self) -> int:
        seed = int(os.environ.get("PL_GLOBAL_SEED") or torch.initial_seed())
        if self.trainer is not None and self.trainer.world_size > 1:
            seed = self.trainer.strategy.broadcast(seed)  # without seed_everything each process may have its own
        return seed

    def _load_tokenizer(self) -> Any:
        if self._tokenizer_name is None:
            raise UserError("tokenizer: expected a hub id, a folder or package:NAME, found none (the base's, usually).")
        if not isinstance(self._tokenizer_name, str):
            return self._tokenizer_name
        from qlora_lightning.base.tokenizer import load_tokenizer

        return load_tokenizer(self._tokenizer_name)

    def _watch(self, split: str) -> Watch:
        rank, _ = self._rank_and_world_size()

        def watch(rows: Sequence[Row]) -> Iterable[Row]:
            return watch_rows(rows, split) if rank == 0 else rows

        return watch


def _as_row(row: Row | dict[str, Any], split: str, number: int) -> Row:
    """Give a plain dict a place, so that messages can name it."""
    if isinstance(row, Row):
        return row
    if not isinstance(row, dict):
        raise UserError(f"load_rows({split!r}): expected rows or dicts, found {type(row).__name__} as row {number}.")
    return Row(row, split, number)
