"""The merge from end to end: find, plan, write beside, check, give it its name."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from qlora_lightning.base.cache import EntryCheck
from qlora_lightning.base.tensors import format_bytes
from qlora_lightning.commands.merge.arguments import DTYPES, Options
from qlora_lightning.commands.merge.check import Checker
from qlora_lightning.commands.merge.gguf_adapter import write_adapter
from qlora_lightning.commands.merge.gguf_model import GGUFModelWriter
from qlora_lightning.commands.merge.gguf_tokenizer import split_of_base
from qlora_lightning.commands.merge.report import MAX_KL, MIN_TOP1, Report, Verdict
from qlora_lightning.commands.merge.rows import find_config, load_rows
from qlora_lightning.commands.merge.staging import (
    RECORD,
    list_files,
    staged_file,
    staged_folder,
)
from qlora_lightning.commands.merge.ways import Ways
from qlora_lightning.commands.merge.write import RoundingShards, TensorSink, write_companions, write_tensors
from qlora_lightning.commands.output import write_json
from qlora_lightning.model.opened_adapter import AdapterSource, find_adapter
from qlora_lightning.model.weights.merging import MergedWeights, MergePlan, plan_merge
from qlora_lightning.support.errors import UserError

_GGUF = "gguf"  # a folder of its own: beside a tokenizer's files transformers misreads the tokenizer in a GGUF
_ONTO = {"dequantized": "onto the dequantized base that it was trained on", "original": "onto the original weights"}


def merge(options: Options) -> None:
    """Do what the command line asks for.

    Raises:
        UserError: The adapter, the base or an option cannot be used, or the merged model disagrees with them.
    """
    source = find_adapter(options.adapter, options.base)
    weights = Ways(source, options.onto)
    EntryCheck(source.base.folder, source.base.name).wait()  # of an unpacked GGUF
    plan = plan_merge(source.base.folder, source.folder)
    title = f"{Path(source.identity.get('base', source.base.name)).name} {source.folder.absolute().parent.name}"
    if options.adapter_gguf is not None:
        with staged_file(options.adapter_gguf) as file:
            write_adapter(file, plan, title)
        print(f"Adapter alone: {options.adapter_gguf}")
    if options.out is not None:
        _merge_model(options, options.out, source, plan, weights, title)


def _merge_model(options: Options, out: Path, source: AdapterSource, plan: MergePlan, ways: Ways, title: str) -> None:
    dtype: torch.dtype = getattr(torch, DTYPES[options.dtype])
    batches = _rows(options, source, plan) if options.rows else []
    report = Report(
        {
            "adapter": str(source.folder),
            "base": source.identity.get("base", source.base.name),
            "fingerprint": source.identity.get("fingerprint"),
            "out": str(out),
            "onto": options.onto,
            "dtype": DTYPES[options.dtype],
        }
    )
    began = time.monotonic()
    with staged_folder(out, options.force) as folder:
        write_companions(source, folder, dtype, out, _ONTO[options.onto])
        sinks: list[TensorSink] = [RoundingShards(folder, dtype)]
        if options.gguf is not None:
            file = folder / _GGUF / f"model-{options.gguf}.gguf"
            file.parent.mkdir()
            split = split_of_base(source.base)
            sinks.append(GGUFModelWriter(file, plan, options.gguf, folder, title, split))
        with _bar("merging", len(plan.shapes)) as advance:
            write_tensors(plan, MergedWeights(plan, ways.chosen), sinks, advance)
        if batches:
            _check(options, source, plan, ways, folder, batches, report)
        report.facts["files"] = {name: (folder / name).stat().st_size for name in list_files(folder)}
        report.facts["seconds"] = round(time.monotonic() - began, 1)
        write_json(folder / RECORD, report.as_json())
        report.print(Console(highlight=False))
        faults = [verdict.fault for verdict in report.verdicts if verdict.fault]
        if faults:
            raise UserError(
                f"The merged model is not kept: it says something else than base and adapter ({'; '.join(faults)}). "
                "Merge in fp32 or onto the dequantized base, or allow more with --max-kl."
            )
    if options.json is not None:
        write_json(options.json, report.as_json())
    for name, size in report.facts["files"].items():
        if name.endswith((".safetensors", ".gguf")):
            print(f"{out / name}  {format_bytes(size)}")


def _check(
    options: Options,
    source: AdapterSource,
    plan: MergePlan,
    ways: Ways,
    folder: Path,
    batches: list[Mapping[str, Any]],
    report: Report,
) -> None:
    """Judge what was written, and both ways in fp32 for comparison."""
    chosen, stored = options.onto, options.dtype
    exact = chosen == "dequantized" and stored == "fp32"
    allowed = MAX_KL["original" if chosen == "original" else "exact" if exact else "rounded"]
    allowed = allowed if options.max_kl is None else options.max_kl
    onto_original = ways.original if source.quantization != "none" else None  # there both ways are one
    passes = 2 + (options.gguf is not None) + (ways.dequantized is not None) + (onto_original is not None)
    with _bar("checking", passes * plan.config.num_hidden_layers) as advance:
        checker = Checker(plan, ways.trained, batches, advance)
        report.rows = sum(len(batch["row_ids"]) for batch in batches)
        report.labelled_tokens, report.reference_loss = len(checker.labels), checker.reference.loss
        told = report.verdicts.append
        if ways.dequantized is not None:
            found = checker.judge_merge(ways.dequantized, source.base)
            # the merge itself, whatever is written: were this not so, the arithmetic would be wrong
            told(Verdict("onto dequantized, fp32", found, MAX_KL["exact"], MIN_TOP1))
        if onto_original is not None:
            told(Verdict("onto original, fp32", checker.judge_merge(onto_original, source.base)))
        name = f"written: onto {chosen}, {stored}"
        told(Verdict(name, checker.judge_folder(folder), allowed, MIN_TOP1 if exact else 0.0))
        if options.gguf is not None:
            file = folder / _GGUF / f"model-{options.gguf}.gguf"
            told(Verdict(f"written: {file.name}", checker.judge_gguf(file), max(allowed, MAX_KL["rounded"])))


def _rows(options: Options, source: AdapterSource, plan: MergePlan) -> list[Mapping[str, Any]]:
    config = find_config(source.folder, options.config)
    return load_rows(config, options.overrides, options.rows, plan.config.vocab_size)


@contextlib.contextmanager
def _bar(description: str, total: int) -> Iterator[Callable[[], None]]:
    """Give what is told of every step that is done; the bar stands on standard error and is gone at the end."""
    columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.0f} %"), TimeElapsedColumn()
    console = Console(stderr=True)
    if not console.is_terminal:
        console.print(f"{description} …")  # a bar would not show in a file, and this may take long
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(description, total=total)
        yield lambda: progress.advance(task)
