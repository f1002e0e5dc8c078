"""The data module: files in, batches out, for LightningCLI and for Python."""

import os
from collections.abc import Collection, Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.utils.data import DataLoader

from qlora_lightning.data.batches import Batch, EpochPlan, PackedLoader, PromptLoader, collate_rows, make_torch_loader
from qlora_lightning.data.chat.renderer import ChatRenderer
from qlora_lightning.data.chat.templates import choose_chat_template
from qlora_lightning.data.prepare import Preparation, Prepared, Prompt, divide
from qlora_lightning.data.report import DataReport
from qlora_lightning.data.rows import files
from qlora_lightning.data.rows.content import Chat, Judged, Pair
from qlora_lightning.data.rows.formats import RowConverter
from qlora_lightning.data.sample_cache import cached_samples, can_be_kept, identify
from qlora_lightning.data.samples import SampleSet
from qlora_lightning.sources.folders import load_tokenizer
from qlora_lightning.support.console import show_controls
from qlora_lightning.support.errors import UserError, bounded
from qlora_lightning.support.settings import check_arguments
from qlora_lightning.support.values import check_setting, fits

_STAGES = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ("predict",)}
_SAMPLE_SETTINGS = ("train_on", "max_length", "too_long", "deduplicate")
_BATCH_SETTINGS = ("batch_size", "tokens_per_batch", "shuffle")
# Settings that a checkpoint remembers
_REMEMBERED = ("format", "system", "on_bad_row", "val_fraction", *_SAMPLE_SETTINGS, *_BATCH_SETTINGS)
Loader = PackedLoader | DataLoader[Batch]
DataPath = str | dict[str, Any] | list[str | dict[str, Any]]


class InstructionDataModule(LightningDataModule):
    """Instruction data in packed batches without padding; the order depends only on the seed and the epoch.

    The seed comes from ``seed_everything`` (the environment variable ``PL_GLOBAL_SEED``), or else from
    ``torch.initial_seed()`` at the first ``setup``. A resumed run keeps the seed of its checkpoint.

    Args:
        train: training rows: a file (``.jsonl``, ``.json``, ``.csv``, ``.tsv``, ``.parquet``, ``.arrow``), a folder,
            a glob, a URL, a hub id, a mapping ``{path, weight, rows, format, …}``, or a list of these. With weights, an
            epoch has as many rows as all sources together, and each source gets its share. Without, it has every row
            once.
        val: validation rows; by default those in the local folders of ``train``.
        test: test rows; by default those in the local folders of ``train``.
        predict: rows that ``predict`` generates answers for; they need no answers of their own.
        format: ``auto`` (detected from the keys of the rows), ``alpaca``, ``messages``, ``sharegpt``,
            ``prompt_completion``, ``question_answer``, ``text``, ``tokens``, or a function ``row -> conversation``, in
            YAML its dotted path.
        columns: columns to rename, ``{their name: our name}``; ``null`` leaves a column out.
        roles: speaker names to rename, ``{their name: our name}``.
        system: system prompt for rows that have none; an empty one overrides the default of the chat template.
        encoding: encoding of text files without a byte order mark, such as ``cp1252``.
        chat_template: ``llama3``, ``chatml``, ``alpaca`` or a ``.jinja`` file; by default the tokenizer's own.
        template_options: values of the template's variables, such as ``{date_string: 27 Nov 2026, enable_thinking:
            false}``; they are saved in the adapter's template. A template that asks for today's date gets 26 July 2024.
        train_on: tokens to train on: ``assistant`` (every answer and its stop token), ``last`` (only the last answer)
            or ``all``.
        max_length: maximum number of tokens in a sample.
        too_long: how to treat longer samples: ``truncate`` (the oldest turns first, then the middle of the longest
            stretch that is not trained, then the end of an answer), ``drop``, or ``split`` into several.
        on_bad_row: ``error`` lists the bad rows and stops; ``skip`` leaves them out and counts them.
        drop_answers: drop rows with one of these answers, such as ``[N/A, NULL]``, in upper or lower case.
        batch_size: rows per batch on each device (default: 8).
        tokens_per_batch: token budget of a batch, which rows are packed into, instead of ``batch_size``.
        shuffle: use a new order in each epoch; ``False`` keeps the order of the files, as for a curriculum.
        deduplicate: leave out rows whose tokens and labels equal those of an earlier row in the same split.
        val_fraction: share of the training rows to hold out instead of ``val``; equal prompts stay together.
        tokenizer: hub id, folder or ``package:NAME``, or ``{name, revision, trust_remote_code}``; from Python also a
            tokenizer object. By default, it is the base's, from the Trainer's module. Without a Trainer, set it here.
        accept_changed_data: resume even if the training or validation samples are not those of the checkpoint. If the
            validation samples differ, the ranking of the best adapter starts over. This key is not written to
            config.yaml.
        max_new_tokens: maximum answer length in ``predict``.
    """

    pairs = False  # whether a row has two answers to compare, see PreferenceDataModule

    def __init__(
        self,
        train: DataPath | None = None,
        val: DataPath | None = None,
        test: DataPath | None = None,
        predict: DataPath | None = None,
        format: str | files.RowFunction = "auto",
        columns: dict[str, str | None] | None = None,
        roles: dict[str, str] | None = None,
        system: str | None = None,
        encoding: str = "utf-8",
        chat_template: str | None = None,
        template_options: dict[str, Any] | None = None,
        train_on: Literal["assistant", "last", "all"] = "assistant",
        max_length: int = 2048,
        too_long: Literal["truncate", "drop", "split"] = "truncate",
        on_bad_row: Literal["error", "skip"] = "error",
        drop_answers: list[str | None] | None = None,
        batch_size: int | None = None,
        tokens_per_batch: int | None = None,
        shuffle: bool = True,
        deduplicate: bool = False,
        val_fraction: float | None = None,
        tokenizer: str | dict[str, Any] | Any | None = None,
        accept_changed_data: bool = False,
        max_new_tokens: int = 1024,
    ) -> None:
        super().__init__()
        check_arguments("data", InstructionDataModule.__init__, locals())
        columns, roles = {} if columns is None else columns, {} if roles is None else roles
        own = {"format": format, "columns": columns, "roles": roles, "system": system, "encoding": encoding}
        for name, value in own.items():
            files.check_kind(name, value, f"data.{name}")
        expected = "a list of texts, null for NULL"
        check_setting("data.drop_answers", drop_answers, fits(drop_answers, list[str | None] | None), expected)
        self.files = {"train": train, "val": val, "test": test, "predict": predict}
        self.max_new_tokens = max_new_tokens
        self.format, self.columns, self.roles, self.system = format, columns, roles, system
        self.encoding, self.on_bad_row = encoding, on_bad_row
        self.drop_answers = ["null" if answer is None else answer.lower() for answer in drop_answers or []]
        self.chat_template, self.template_options = chat_template, template_options or {}
        self.train_on = train_on
        self.max_length, self.too_long, self.deduplicate = max_length, too_long, deduplicate
        self.batch_size, self.tokens_per_batch, self.shuffle = batch_size, tokens_per_batch, shuffle
        self.val_fraction, self.accept_changed_data = val_fraction, accept_changed_data
        self._check_settings()
        if batch_size is None and tokens_per_batch is None:
            self.batch_size = 8
        self.lenient = False  # keep what training rejects in ``faults`` instead of raising it: `inspect` shows it
        self.faults: dict[str, UserError] = {}  # by split
        self.title: str | None = None  # of the report, in place of its split
        self.samples: dict[str, SampleSet] = {}
        self.sample_sources: dict[str, list[files.Source]] = {}  # by split: what ``SampleSet.source`` counts
        self.reports: dict[str, DataReport] = {}
        self._named_tokenizer = self._tokenizer_choice = tokenizer
        self._tokenizer: Any = None
        self._renderer: ChatRenderer | None = None
        self._prompts: list[Prompt] = []
        self._seed: int | None = None
        self.holdout_seed: int | None = None  # for the validation rows held out, if not the seed of the order

    def _check_settings(self) -> None:
        def check(name: str, is_valid: bool, expected: str) -> None:
            check_setting(f"data.{name}", getattr(self, name), is_valid, expected)

        if self.val_fraction is not None:
            check("val_fraction", self.files["val"] is None, "no data.val beside it: set one of them to null")
        if self.tokens_per_batch is not None:
            check("tokens_per_batch", self.batch_size is None, "no data.batch_size beside it: both size a batch")
            check("tokens_per_batch", self.shuffle, "no `shuffle: false` beside it: packing does not keep the order")

    # ---- tokenizer, identity, rows -------------------------------------------------------------------------------

    @property
    def tokenizer(self) -> Any:
        """The tokenizer with the chosen chat template, loaded at first use."""
        if self._tokenizer is None:
            choice = self._tokenizer_choice
            expected = "a hub id, a folder or package:NAME (usually the base's)"
            check_setting("data.tokenizer", choice, choice is not None, expected)
            options = {"name": choice} if isinstance(choice, str) else choice
            tokenizer = load_tokenizer(**options) if isinstance(options, dict) else options
            self._tokenizer = choose_chat_template(tokenizer, self.chat_template, self.template_options)
        return self._tokenizer

    @property
    def renderer(self) -> ChatRenderer:
        """Renderer of conversations and prompts, with the tokenizer and the settings of this data module."""
        if self._renderer is None:
            self._renderer = ChatRenderer(self.tokenizer, train_on=self.train_on)
        return self._renderer

    @property
    def stop_ids(self) -> list[int]:
        """Token ids at which generation stops; every answer that is trained to its end ends with one of them."""
        return sorted(self.renderer.stop_ids)

    @property
    def identity(self) -> dict[str, Any]:
        """Hashes of samples, tokenizer and template; the settings that shape the batches; data sets of the hub."""
        settings = {name: getattr(self, name) for name in _REMEMBERED}
        settings["format"] = files.name_of_format(self.format)
        # only data sets of the hub have a split
        datasets = {source.path for source in self.sample_sources.get("train", ()) if source.split is not None}
        return {**identify(self.samples, self.tokenizer), "settings": settings, "datasets": sorted(datasets)}

    def load_rows(self, split: str) -> Iterable[files.Row | files.BadRow | dict[str, Any]]:
        """Return the rows of ``train``, ``val``, ``test`` or ``predict``; none if there is no such split.

        Override it to read rows from elsewhere: plain dicts work. Or to change those of ``super().load_rows(split)``:
        ``row._replace(values=…)`` is still read as its source says. It may be called again.
        """
        return (row for source in self.sources(split) for row in files.read_rows(source))

    # ---- Lightning's hooks ---------------------------------------------------------------------------------------

    def setup(self, stage: str | None = None) -> None:
        if self._seed is None:
            self._seed = int(os.environ.get("PL_GLOBAL_SEED") or torch.initial_seed() % 2**32)
            if self.trainer is not None and self.trainer.world_size > 1:
                # without seed_everything each rank has its own
                self._seed = self.trainer.strategy.broadcast(self._seed)
        self.take_tokenizer_of_base(getattr(self.trainer, "lightning_module", None))
        splits = _STAGES.get(stage or "", tuple(self.files))
        for split in splits:
            self._prepare(split)
            optional = stage is None or (stage == "fit" and split == "val")
            if not optional and split not in self.reports:
                raise UserError(f"data.{split} is null: name a file in `data.{split}`.", f"data.{split}")
        if "val" in splits and "val" not in self.samples:
            # Lightning validates if the hook is overridden, and warns of loaders without batches.
            self.val_dataloader = super().val_dataloader  # type: ignore[method-assign]

    def plan_epochs(self, split: str = "train") -> EpochPlan:
        """Return which rows of a split are in each batch of each epoch."""
        _, world_size = self._rank_and_world_size()
        plan = partial(EpochPlan, self.samples[split], seed=self._seed or 0, world_size=world_size)
        if split != "train":  # not packed: rows in their order, and without gradients they take less memory
            return plan(batch_size=self.batch_size or 8)
        # Lightning's `overfit_batches` needs the same batches in every epoch.
        shuffle = self.shuffle and not getattr(self.trainer, "overfit_batches", 0)
        return plan(self.batch_size, self.tokens_per_batch, shuffle, self.shares)

    @property
    def shares(self) -> list[float] | None:
        """The weights of the sources of the training rows; ``None`` without."""
        weights = [source.weight for source in self.sample_sources.get("train", ()) if source.weight is not None]
        return weights or None

    def count_train_batches(self) -> int:
        """Count the batches of one epoch on each rank, for schedules."""
        return len(self.plan_epochs())

    def train_dataloader(self) -> Loader:
        return self._make_loader("train")

    def val_dataloader(self) -> Loader:
        return self._make_loader("val")

    def test_dataloader(self) -> Loader:
        return self._make_loader("test")

    def predict_dataloader(self) -> PromptLoader:
        limits = self.batch_size or 8, self.stop_ids, self.max_new_tokens
        return PromptLoader(self._prompts, *limits, *self._rank_and_world_size())

    def state_dict(self) -> dict[str, Any]:
        return {} if self._seed is None else {"seed": self._seed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        stored, seed = state_dict.get("seed", self._seed), self._seed
        uses_seed = self.val_fraction is not None or (self.trainer is not None and self.trainer.training)
        if uses_seed and seed not in (stored, None) and os.environ.get("PL_GLOBAL_SEED"):
            rank_zero_info(
                f"seed_everything is {seed}, but the checkpoint's {stored} rules: the order of rows, and which of them "
                "are held out for validation, stay as they were."
            )
        self._seed = stored
        if self.val_fraction is not None and stored != seed and "train" in self.samples:
            for split in ("train", "val"):  # other rows are held out
                del self.samples[split], self.reports[split]
            self._prepare("train")

    # ---- from rows to samples ------------------------------------------------------------------------------------

    def _prepare(self, split: str) -> None:
        """Prepare a split, unless it is ready or has no rows."""
        if split == "val" and self.val_fraction is not None:
            split = "train"  # preparing it holds the validation rows out
        if split in self.reports:
            return
        sources = [] if self._has_own_rows else self.sources(split)
        if not (sources or self._has_own_rows):
            return
        samples, report = self._read(split, sources)
        if not report.rows:
            return
        try:
            report.check(skip_bad=self.on_bad_row == "skip")
        except UserError as fault:
            if not self.lenient or not report.samples:
                raise
            self.faults[split] = fault
        if split == "train" and self.val_fraction is not None:
            seed = self._seed if self.holdout_seed is None else self.holdout_seed
            self.sample_sources["val"] = self.sample_sources[split]
            for part, part_report in divide(samples, report, self.val_fraction, seed or 0):
                self.samples[part_report.split], self.reports[part_report.split] = part, part_report
                if split in self.faults:
                    self.faults[part_report.split] = self.faults[split]
                rank_zero_info(show_controls(part_report.describe()))
            return
        self.samples[split], self.reports[split] = samples, report
        if split in ("val", "test") and self._has_training_rows(split):
            report.count_overlap(samples, self.samples["train"])
        rank_zero_info(show_controls(report.describe()))

    def _has_training_rows(self, split: str) -> bool:
        """Whether there are training rows to compare with; local ones are read if they have not been yet."""
        if "train" not in self.samples and not self._has_own_rows:
            try:
                if not any(source.is_remote for source in self.sources("train")):
                    self._prepare("train")
            except UserError as error:
                rank_zero_info(f"{split} rows are not compared with the training rows: {show_controls(str(error))}")
        return "train" in self.samples

    @property
    def _has_own_rows(self) -> bool:
        return is_overridden("load_rows", self, InstructionDataModule)

    def _read(self, split: str, sources: list[files.Source]) -> Prepared:
        """Take the samples of a split from the cache, or prepare them; those of an own ``load_rows`` are not cached."""
        preparation = Preparation(self.renderer, split, self.max_length, self.too_long, self.pairs, self.drop_answers)
        prepare = partial(preparation.prepare, self._read_rows(split), self.deduplicate)
        if not self._has_own_rows:  # whose code is the user's
            is_local = not any(source.is_remote for source in sources)  # else the network takes its time
            preparation.reading = partial(bounded, f"data.{split} cannot be read", "file.unreadable", timed=is_local)
        is_ours = type(self).__module__.startswith("qlora_lightning.")  # another class may render in its own way
        if self._has_own_rows or not is_ours or split == "predict" or not all(map(can_be_kept, sources)):
            samples, report = prepare()
            sources, self._prompts = list(preparation.converters), preparation.prompts or self._prompts
        else:
            settings = {name: getattr(self, name) for name in (*_SAMPLE_SETTINGS, "drop_answers", "pairs")}
            settings |= {"stop_ids": self.stop_ids, **identify({}, self.tokenizer)}
            samples, report = cached_samples(sources, settings, prepare)
        if split == "train" and any(source.weight is not None for source in sources):
            if any(source.weight is None for source in sources):
                raise UserError("data.train: expected a weight for all of its sources, or for none.", "data.train")
            check_setting("data.shuffle", self.shuffle, self.shuffle, "no weights beside it: they mix the files")
        self.sample_sources[split] = sources
        names = [str(file) for source in sources for file in source.files or (source.path,)]
        delimiters = dict[str, list[str]]()
        for source in sources:
            for file, delimiter in files.find_delimiters(source):
                delimiters.setdefault(delimiter, []).append(file)
        return samples, replace(report, split=self.title or split, files=names, delimiters=delimiters)

    def _read_rows(self, split: str) -> Iterator[files.Row | files.BadRow]:
        """Yield the rows of ``load_rows`` with their sources; the settings of ``data:`` apply to those without."""
        source = self._make_source("load_rows")
        for number, row in enumerate(self.load_rows(split) or (), start=1):
            if isinstance(row, dict):
                if files.has_settings(self.files[split]):
                    raise UserError(
                        f"load_rows returned a plain dict, which loses the settings that data.{split} has for its "
                        "source: return `row._replace(values=…)` of a row of `super().load_rows(split)`.",
                        "load_rows.dict",
                    )
                row = files.Row(row, split, number)
            yield row if row.source else row._replace(source=source)

    def load_conversations(self, split: str, numbers: Collection[int]) -> dict[int, Chat]:
        """Read rows of a split again, as conversations by row number; of pairs the chosen one, without texts."""
        if split == "val" and self.val_fraction is not None:
            split = "train"
        conversations = dict[int, Chat]()
        for number, row in enumerate(self._read_rows(split)):
            if number in numbers and isinstance(row, files.Row) and row.source:
                match RowConverter(row.source, pairs=self.pairs).convert(row):
                    case Chat() as chat:
                        conversations[number] = chat
                    case Pair(chosen=chat) | Judged(chat=chat):
                        conversations[number] = chat
        return conversations

    def read_other_rows(self, source: str | dict[str, Any], rows: int) -> list[Batch]:
        """Return the first rows of another file as batches, with this tokenizer and template, the same on each rank."""
        names = ("encoding", "max_length", "on_bad_row")
        options: dict[str, Any] = {name: getattr(self, name) for name in names}
        entry = {"path": source} if isinstance(source, str) else source
        other = InstructionDataModule(test={"rows": rows, **entry}, tokenizer=self.tokenizer, **options)
        other.title = "forgetting"
        try:
            other.setup("test")
        except UserError as error:
            message = f"evaluation.forgetting: {str(error).removeprefix('data.test: ')}"
            raise UserError(message, "evaluation.forgetting") from error
        samples = other.samples["test"]
        return [collate_rows(samples, range(len(samples))[start : start + 8]) for start in range(0, len(samples), 8)]

    def sources(self, split: str) -> list[files.Source]:
        """Return the sources that ``data.train``, ``data.val`` etc. names, in order; none if it names nothing."""
        value: Any = self.files[split]
        if value is None and (split == "test" or (split == "val" and self.val_fraction is None)):
            value = files.find_folders(self.files["train"], split) or None
        if value is None:
            return []
        return files.find_sources(value, split, self._make_source(""))

    def _make_source(self, path: str) -> files.Source:
        """Return a source with the settings of ``data:``."""
        settings = {name: getattr(self, name) for name in ("format", "columns", "roles", "system", "encoding")}
        return files.Source(path, **settings)

    def take_tokenizer_of_base(self, module: Any) -> None:
        """Take the tokenizer of a module's base, and drop samples that were prepared with that of another base."""
        base = getattr(module, "base", None)
        if self._named_tokenizer is not None or not isinstance(base, str):
            return
        options = {name: getattr(module, name, None) for name in ("revision", "trust_remote_code")}
        choice = {"name": base, **{name: value for name, value in options.items() if value}}
        if choice != self._tokenizer_choice:
            self._tokenizer_choice, self._tokenizer, self._renderer = choice, None, None
            self.samples.clear()
            self.reports.clear()

    # ---- ranks and loaders ---------------------------------------------------------------------------------------

    def _rank_and_world_size(self) -> tuple[int, int]:
        if self.trainer is not None:
            return self.trainer.global_rank, self.trainer.world_size
        if torch.distributed.is_available() and torch.distributed.is_initialized():  # as under Fabric
            return torch.distributed.get_rank(), torch.distributed.get_world_size()
        return 0, 1

    def _make_loader(self, split: str) -> Loader:
        plan, (rank, _) = self.plan_epochs(split), self._rank_and_world_size()
        # the Trainer would ask torch's for workers, and could not save its position
        return make_torch_loader(plan, rank) if self.trainer is None else PackedLoader(plan, rank)


class PreferenceDataModule(InstructionDataModule):
    """Rows with a prompt, a ``chosen`` and a ``rejected`` answer: what :class:`PreferenceModule` trains on.

    Or, for ``objective: kto``, rows with one answer, in any conversation format, and a verdict on it: ``label``,
    true or false. The last answer is trained; a user's function returns the conversation and a bool.

    All arguments are those of :class:`InstructionDataModule`; ``format: auto`` reads TRL's and LLaMA-Factory's shapes,
    and a user's function returns two conversations that begin alike. A row is one sample with both answers, so
    ``batch_size`` counts pairs; in a batch it becomes two samples that begin with the same prompt, which is computed
    once. ``max_length`` applies to each answer with its prompt; if one answer is left out, so is its pair.
    """

    pairs = True

    def _check_settings(self) -> None:
        super()._check_settings()
        expected = "assistant or last: answers alone are compared, not prompts"
        check_setting("data.train_on", self.train_on, self.train_on != "all", expected)
        expected = "truncate or drop: pieces of rows cannot be compared"
        check_setting("data.too_long", self.too_long, self.too_long != "split", expected)
