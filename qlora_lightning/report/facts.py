"""What a run was, in words for a person: figures, what to do next, and facts with their headings."""

import shlex
import statistics
import textwrap
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

import yaml

from qlora_lightning.evaluation.scores import describe_metric
from qlora_lightning.report.results import Table, find_figures, read_evaluation
from qlora_lightning.report.run import Run
from qlora_lightning.report.verdict import Verdict

Facts = list[tuple[str, str]]
STATUS = {
    "finished": "finished",
    "stopped": "stopped by a signal",
    "failed": "ended by an error",
    "running": "still training",
    "killed": "killed: nothing wrote how it ended",
}
_HASH = 16  # digits shown of one; manifest.json has all
_NOT_SHOWN = "trainer.default_root_dir"  # differs between any two runs, and changes nothing
_SETTINGS = (
    *("model.learning_rate", "model.schedule", "model.warmup_ratio", "model.optimizer", "model.weight_decay"),
    *("model.neftune_alpha", "model.loraplus_ratio", "trainer.gradient_clip_val"),
    *("trainer.accumulate_grad_batches", "data.batch_size", "data.tokens_per_batch"),
    *("data.max_length", "gradient_checkpointing.enabled", "trainer.max_epochs", "trainer.max_steps"),
)


def subject(run: Run) -> str:
    """Describe in a sentence what was trained on what."""
    flat, files, data = flatten(run.config), _files(run).get("train"), run.manifest.get("data") or {}
    name = _base(run).get("base") or flat.get("model.base")
    rank = (run.manifest.get("adapter") or {}).get("rank") or flat.get("model.rank")
    rows = ((data.get("splits") or {}).get("train") or {}).get("rows")
    trained = f"LoRA of rank {rank}" if rank else "An adapter"
    begun = f", continued from {flat['model.adapter']}" if flat.get("model.adapter") else ""
    trained_on = f", trained on {format_setting(files)}" if files else ""
    return f"{trained}{f' on {name}' if name else ''}{begun}{trained_on}{f' ({rows:,} rows)' if rows else ''}."


def headline(run: Run) -> Facts:
    """Return the figures at the top of the page, each with what it is."""
    evaluation, figures = read_evaluation(run), find_figures(run)
    shown: Facts = []
    for metric in ("loss", *evaluation.scores[:1]):
        if metric in evaluation.metrics:
            base, adapter, _ = (side.value for side in evaluation.metrics[metric])
            form = ".3f" if metric == "loss" else ".0%"
            words = f"{evaluation.split} loss" if metric == "loss" else describe_metric(metric)
            shown.append((f"{base:{form}} → {adapter:{form}}", f"{words}, base\u00a0→\u00a0adapter"))
    if "val_loss" in figures and (evaluation.split == "test" or not shown):
        shown.append((f"{figures['val_loss'].value:.3f}", "validation loss, best"))
    planned = (run.manifest.get("progress") or {}).get("planned_steps")
    for name in ("steps", "minutes", "tokens_per_second", "peak_memory_gib"):
        if name in figures:
            of = f" of {planned:,}" if name == "steps" and planned and planned != figures[name].value else ""
            shown.append((f"{figures[name]}{of}", figures[name].heading))
    return shown


def next_steps(run: Run, verdict: Verdict) -> Facts:
    """Return the commands that follow from a verdict, each with what it is for."""
    folder, command = shlex.quote(str(run.folder)), run.manifest.get("command")
    if verdict.kind == "diverged":
        rate, again = flatten(run.config).get("model.learning_rate"), run.manifest.get("reproduce")
        if not again or not rate:
            return []
        return [("start again with a lower learning rate", f"{again} --model.learning_rate {rate / 3:.1g}")]
    if run.status in ("stopped", "failed", "killed") and str(command).startswith("qlora-lightning fit"):
        words = shlex.split(str(command))
        for number in reversed(range(len(words))):
            if words[number].startswith("--ckpt_path"):
                del words[number : number + (1 if "=" in words[number] else 2)]
        return [("resume it, from the same working folder", shlex.join([*words, "--ckpt_path", "last"]))]
    if run.status != "finished":
        return []
    data = run.config.get("data") or {}
    steps = [("talk to it", f"qlora-lightning chat --adapter {folder}/adapter")]
    if data.get("val") or data.get("test") or data.get("val_fraction"):
        split = " --split test" if data.get("test") else ""
        evaluate = f"qlora-lightning evaluate --adapter {folder}/adapter{split} --out {folder}-evaluated"
        steps.append(("evaluate it, with its hardest rows", evaluate))
    if verdict.kind in ("learned", "unknown"):
        merge = f"qlora-lightning merge --adapter {folder}/adapter --out {folder}-merged"
        steps.append(("merge it, to serve it", merge))
    return steps


def training_facts(run: Run) -> Facts:
    """Return base, adapter, data, length and settings of the training."""
    manifest, progress, best = run.manifest, run.manifest.get("progress") or {}, run.manifest.get("best")
    applied = (manifest.get("data") or {}).get("settings") or {}  # null has become what it stands for
    flat = {**flatten(run.config), **flatten(applied, "data.")}
    counts = {"optimizer steps": "steps", "tokens": "tokens", "labelled tokens": "labelled_tokens"}
    trained = [f"{progress[name]:,} {words}" for words, name in counts.items() if progress.get(name) is not None]
    values = {name.removesuffix(".enabled").rpartition(".")[2]: flat.get(name) for name in _SETTINGS}
    settings = [f"{name} {format_setting(value)}" for name, value in values.items() if value not in (None, -1)]
    facts = [
        ("base", _describe_base(_base(run), flat)),
        ("adapter", _describe_adapter(run)),
        ("continued from", flat.get("model.adapter")),
        *((split, format_setting(file)) for split, file in _files(run).items()),
        ("settings", ", ".join(settings)),
        ("trained", ", ".join(trained)),
        ("stopped early", manifest.get("stopped_early")),
        ("best checkpoint", best and f"{best['checkpoint']}, {best['monitor']} {best['value']:.4f}"),
    ]
    return [(heading, text) for heading, text in facts if text]


def _describe_base(base: Mapping[str, Any], flat: Mapping[str, Any]) -> str:
    known = {name: base.get(name) or flat.get(f"model.{name}") for name in ("base", "revision", "quantization")}
    if not known["base"]:
        return ""
    revision = f" at {known['revision']}" if known["revision"] else ""
    double = " with double quantization" if base.get("double_quant") and known["quantization"] in ("nf4", "fp4") else ""
    dtype = f", computed in {base['compute_dtype']}" if base.get("compute_dtype") else ""
    return f"{known['base']}{revision}, {known['quantization']}{double}{dtype}"


def _describe_adapter(run: Run) -> str:
    adapter = run.manifest.get("adapter") or {}
    parts = [f"{name} {adapter[name]}" for name in ("rank", "alpha", "dropout") if adapter.get(name) is not None]
    if adapter.get("target_modules"):
        parts.append(f"on {', '.join(adapter['target_modules'])} of {len(adapter.get('layers') or [])} layers")
    parameters = run.manifest.get("parameters") or {}
    trainable, total = parameters.get("trainable"), parameters.get("all")
    share = f"{trainable:,} of {total:,} parameters ({trainable / total:.2%})" if trainable and total else ""
    return ": ".join(filter(None, [", ".join(parts), share]))


def data_table(run: Run) -> Table:
    """Return what became of the rows of each split, and why some were left out."""
    splits: Mapping[str, Any] = (run.manifest.get("data") or {}).get("splits") or {}
    reports = list(splits.values())
    reasons = dict.fromkeys(reason for report in reports for reason in report.get("dropped") or {})
    counts: dict[str, list[int]] = {
        "rows read": [report["rows"] for report in reports],
        "− bad rows": [report["bad_rows"] for report in reports],
        **{f"− {reason}": [(report.get("dropped") or {}).get(reason, 0) for report in reports] for reason in reasons},
        "samples": [report["samples"] for report in reports],
        "tokens": [report["tokens"] for report in reports],
        "labelled tokens": [report["labelled"] for report in reports],
        "samples cut to max_length": [report["shortened"] for report in reports],
        "labelled tokens cut away": [report["lost_labels"] for report in reports],
        "rows equal to an earlier one": [report["duplicates"] for report in reports],
        "rows that are trained on too, so that the loss is too good": [report["overlap"] for report in reports],
    }
    rows = [(heading, [(f"{count:,}", "") for count in found]) for heading, found in counts.items() if any(found)]
    files = [textwrap.shorten(", ".join(report.get("files") or []), 200, placeholder=" …") for report in reports]
    if any(files):
        rows.insert(0, ("read from", [(names, "") for names in files]))
    return ["", *splits], rows


def machine_facts(run: Run) -> Facts:
    """Return the machine, and how its processes worked together."""
    device = run.manifest.get("device")
    if not device:
        return []
    several = f", strategy {device['strategy']}" if device["processes"] > 1 else ""
    processor = "" if device["kind"] == "cpu" else f" beside {device['processor']}"
    return [
        ("device", f"{device['name']}, {device['memory_gib']:.0f} GiB{processor}"),
        ("threads", f"{device['threads']} on {device['cores']} cores"),
        ("processes", f"{device['processes']} on {device['nodes']} machine(s){several}"),
    ]


def version_facts(run: Run) -> Facts:
    """Return what it takes to do the same again: fingerprints, seed, versions, the code's commit."""
    manifest, git = run.manifest, run.manifest.get("git") or {}
    hashes = {"fingerprint of the base": _base(run).get("fingerprint")}
    hashes |= {f"hash of {name}": value for name, value in ((manifest.get("data") or {}).get("hashes") or {}).items()}
    changed = ", with changes" if git.get("dirty") else ""
    commit = f"{git['commit'][:_HASH]} on {git['branch'] or 'no branch'}{changed}" if git else ""
    facts = [
        *((name.replace("_", " "), str(value)[:_HASH]) for name, value in hashes.items() if value),
        ("seed", str(manifest.get("seed", ""))),
        ("git", commit),
        ("packages", ", ".join(f"{name} {version}" for name, version in (manifest.get("packages") or {}).items())),
        ("python", " on ".join(filter(None, [manifest.get("python"), manifest.get("platform")]))),
    ]
    return [(heading, text) for heading, text in facts if text]


def update_map(run: Run) -> tuple[list[int], list[tuple[str, list[tuple[float, str]]]]]:
    """Return the decoder layers, and for each kind of module a cell per layer: opacity and ‖ΔW‖/‖W‖ in words."""
    updates = run.manifest.get("adapter_updates") or {}
    every = [update for own in updates.values() for update in own if update["layer"] is not None]
    layers = sorted({update["layer"] for update in every})
    largest = max((update["ratio"] for update in every), default=0.0) or 1.0
    rows = []
    for kind, own in updates.items():
        ratios = {update["layer"]: update["ratio"] for update in own}
        cells = [
            (round(ratios[layer] / largest, 2), f"{kind} of layer {layer}: {ratios[layer]:.2%}")
            if layer in ratios
            else (0.0, "")
            for layer in layers
        ]
        rows.append((kind, cells))
    return layers, rows


def update_table(run: Run) -> Table:
    """Return median and largest ‖ΔW‖/‖W‖ and the effective rank of each kind of module."""
    rows = []
    for kind, own in (run.manifest.get("adapter_updates") or {}).items():
        most = max(own, key=lambda update: update["ratio"])
        where = "" if most["layer"] is None else f" in layer {most['layer']}"
        ratio, used, rank = (
            statistics.median(update[name] for update in own) for name in ("ratio", "effective_rank", "rank")
        )
        cells = [f"{ratio:.2%}", f"{most['ratio']:.2%}{where}", f"{used:.1f} of {rank:.0f}"]
        rows.append((kind, [(cell, "") for cell in cells]))
    return ["", "‖ΔW‖/‖W‖, median", "largest", "effective rank, median"], rows


def attempt_table(run: Run) -> Table:
    """Return when and how a run that was resumed began and ended, each time."""
    rows = []
    for attempt in run.manifest.get("lives") or []:  # the key that manifests have
        started = str(attempt.get("started") or "").replace("T", " ").replace("+00:00", " UTC")
        steps = f"{attempt.get('from_step') or 0:,} to {attempt.get('to_step') or 0:,}"
        took = str(timedelta(seconds=round(attempt.get("seconds") or 0)))
        rows.append((started, [(steps, ""), (took, ""), (attempt.get("error") or attempt.get("status") or "", "")]))
    return ["started", "steps", "took", "ended"], rows


def difference_table(runs: Sequence[Run]) -> Table:
    """Return the settings in which runs differ."""
    differences = find_differences([run.config for run in runs])
    rows = [(name, [(format_setting(value), "") for value in values]) for name, values in differences.items()]
    return ["", *(run.name for run in runs)], rows


def find_differences(configs: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Return each setting in which configs differ, with its value in each; ``None`` if one lacks it."""
    flat = [flatten(config) for config in configs]
    names = dict.fromkeys(name for config in flat for name in config if name != _NOT_SHOWN)
    columns = {name: [config.get(name) for config in flat] for name in names}
    return {name: values for name, values in columns.items() if any(value != values[0] for value in values)}


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return ``{"model.rank": 8, …}`` of a nested config; lists and empty sections stay as they are."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        flat |= flatten(value, f"{name}.") if isinstance(value, Mapping) and value else {name: value}
    return flat


def format_setting(value: Any) -> str:
    """Return a setting as YAML, in one line."""
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=float("inf"))
    return text.removesuffix("\n").removesuffix("\n...")


def _base(run: Run) -> Mapping[str, Any]:
    return run.manifest.get("base") or {}


def _files(run: Run) -> dict[str, Any]:
    files = (run.manifest.get("data") or {}).get("files") or run.config.get("data") or {}
    return {split: files[split] for split in ("train", "val") if files.get(split) is not None}
