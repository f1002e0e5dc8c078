"""What a run was, in words for a person: figures, findings, what to do next, and facts with their headings."""

import shlex
import statistics
from collections.abc import Iterator, Mapping, Sequence
from math import isnan
from typing import Any

import yaml

from qlora_lightning.base.tensors import format_gib
from qlora_lightning.evaluation.scores import describe_metric
from qlora_lightning.report.charts import running_mean
from qlora_lightning.report.results import (
    ADAPTER,
    BASE,
    describe_rows,
    difference,
    find_results,
    is_of_fit,
    is_of_run,
    is_of_test,
    main_score,
    measured,
    score_names,
    write_result,
)
from qlora_lightning.report.run import Run

Facts = list[tuple[str, str]]
STATUS = {
    "finished": "finished",
    "stopped": "stopped by a signal",
    "failed": "ended by an error",
    "running": "still training",
    "killed": "killed: nothing wrote how it ended",
    "unknown": "of a version that wrote no manifest",
}
_HASH = 16  # digits shown of one; manifest.json has all
_NOT_SHOWN = ("trainer.default_root_dir",)  # differs between any two runs, and changes nothing
_LITTLE, _MUCH = 1e-3, 0.5  # median ‖ΔW‖/‖W‖
_SPARSE, _FULL = 0.5, 0.85  # share of the rank that is used; a random update uses about 0.9


def headline(run: Run) -> Facts:
    """Return the figures at the top of the page, each with what it is."""
    found, score = find_results(run), main_score(run)
    prefix = "test_" if is_of_test(run) else "val_" if is_of_fit(run) else "evaluated_"
    rows = {"test_": "test ", "val_": "validation ", "evaluated_": ""}[prefix]
    where = "" if rows else f" of {describe_rows(run)}"
    figures: Facts = []
    if (loss := found.get(f"{prefix}loss")) is not None:
        base = measured(run, "loss", BASE)
        before, sides = ("", "") if base is None else (f"{base:.3f} → ", ", base\u00a0→\u00a0adapter")
        figures.append((f"{before}{loss:.3f}", f"{rows}loss{where}{sides}"))
    if score is not None and (share := found[score]) is not None:
        name = score_names(run)[0]
        base = measured(run, name, BASE)
        before, sides = ("", "") if base is None else (f"{base:.0%} → ", ", base\u00a0→\u00a0adapter")
        figures.append((f"{before}{share:.0%}", f"{describe_metric(name)}{where}{sides}"))
    if prefix != "val_" and found["val_loss"] is not None:
        figures.append((f"{found['val_loss']:.3f}", "validation loss, best"))
    planned = (run.manifest.get("progress") or {}).get("planned_steps")
    if found["steps"] is not None:
        of = f" of {planned:,}" if planned and planned != found["steps"] else ""
        figures.append((f"{found['steps']:,.0f}{of}", "optimizer steps"))
    for name, words in (
        ("minutes", "wall time of the fit"),
        ("tokens_per_second", "tokens/s, median"),
        ("peak_memory_gib", f"peak memory of the {_memory_owner(run)}"),
    ):
        if found[name] is not None:
            figures.append((write_result(name, found[name]), words))
    return figures


def findings(run: Run) -> list[str]:
    """Report in a few sentences whether the run learned, whether it is better than the base, and what its ranks did."""
    return [*_learned(run), *_against_base(run), *_updated(run)]


def next_steps(run: Run) -> Facts:
    """Return the commands that usually follow, each with what it is for."""
    folder, command = shlex.quote(str(run.folder)), run.manifest.get("command")
    if run.status in ("stopped", "failed", "killed") and command:
        again = command if "--ckpt_path" in command else f"{command} --ckpt_path last"
        return [("resume it, from the same working folder", again)]
    if run.status not in ("finished", "unknown"):
        return []
    data = run.config.get("data") or {}
    split = " --split test" if data.get("test") else ""
    evaluate = f"qlora-lightning evaluate --adapter {folder}/adapter{split} --out {folder}-evaluated"
    steps = [
        ("talk to it", f"qlora-lightning chat --adapter {folder}/adapter"),
        ("evaluate it, with its hardest rows", evaluate),
        ("merge it, to serve it", f"qlora-lightning merge --adapter {folder}/adapter --out {folder}-merged"),
    ]
    return steps if data.get("val") or data.get("test") or data.get("val_fraction") else [steps[0], steps[2]]


def subject(run: Run) -> str:
    """Describe in a sentence what was trained on what."""
    flat, base = flatten(run.config), _base(run)
    name, files = base.get("base") or flat.get("model.base"), _files(run).get("train")
    rank = (run.manifest.get("adapter") or {}).get("rank") or flat.get("model.rank")
    rows = (((run.manifest.get("data") or {}).get("splits") or {}).get("train") or {}).get("rows")
    trained = f"LoRA of rank {rank}" if rank else "An adapter"
    begun = f", continued from {flat['model.adapter']}" if flat.get("model.adapter") else ""
    data = f", trained on {write_setting(files)}" if files else ""
    return f"{trained}{f' on {name}' if name else ''}{begun}{data}{f' ({rows:,} rows)' if rows else ''}."


def training_facts(run: Run) -> Facts:
    """Return base, adapter, data, length and settings of the training."""
    manifest, progress = run.manifest, run.manifest.get("progress") or {}
    applied = (manifest.get("data") or {}).get("settings") or {}  # null has become what it stands for
    flat = {**flatten(run.config), **flatten(applied, "data.")}
    base, adapter = _base(run), manifest.get("adapter") or run.adapter.get("adapter") or {}
    facts: Facts = []
    if base or "model.base" in flat:
        facts.append(("base", _describe_base(base, flat)))
    if adapter:
        facts.append(("adapter", _describe_adapter(adapter, manifest.get("parameters") or {})))
    if flat.get("model.adapter"):
        facts.append(("continued from", str(flat["model.adapter"])))
    facts += [(split, write_setting(file)) for split, file in _files(run).items()]
    if progress:
        counts = {"optimizer steps": "steps", "tokens": "tokens", "labelled tokens": "labelled_tokens"}
        known = [f"{progress[name]:,} {words}" for words, name in counts.items() if progress.get(name) is not None]
        facts.append(("trained", ", ".join(known)))
    if manifest.get("stopped_early"):
        facts.append(("stopped early", str(manifest["stopped_early"])))
    for heading, names in _SETTINGS.items():
        values = {name.removesuffix(".enabled").rpartition(".")[2]: flat.get(name) for name in names}
        known = [f"{name} {write_setting(value)}" for name, value in values.items() if value not in (None, -1)]
        facts += [(heading, ", ".join(known))] if known else []
    best = manifest.get("best")
    if best:
        facts.append(("best checkpoint", f"{best['checkpoint']}, {best['monitor']} {best['value']:.4f}"))
    return facts


_SETTINGS = {
    "optimization": (
        *("model.learning_rate", "model.schedule", "model.warmup_ratio", "model.optimizer", "model.weight_decay"),
        *("trainer.gradient_clip_val", "model.neftune_alpha", "model.loraplus_ratio", "ema.decay"),
    ),
    "batches": (
        *("data.batch_size", "data.tokens_per_batch", "trainer.accumulate_grad_batches", "data.max_length"),
        *("data.group_by_length", "gradient_checkpointing.enabled"),
    ),
    "length": ("trainer.max_epochs", "trainer.max_steps"),
}


def data_rows(run: Run) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """Return the splits, and under each heading the count of each; why rows were left out is indented."""
    splits: Mapping[str, Any] = (run.manifest.get("data") or {}).get("splits") or {}
    reports = list(splits.values())
    reasons = dict.fromkeys(reason for report in reports for reason in report.get("dropped") or {})
    counts: dict[str, list[int]] = {
        "rows read": [report["rows"] for report in reports],
        "  − bad rows": [report["bad_rows"] for report in reports],
        **{f"  − {reason}": [(each.get("dropped") or {}).get(reason, 0) for each in reports] for reason in reasons},
        "samples": [report["samples"] for report in reports],
        "tokens": [report["tokens"] for report in reports],
        "labelled tokens": [report["labelled"] for report in reports],
        "samples cut to max_length": [report["shortened"] for report in reports],
        "labelled tokens cut away": [report["lost_labels"] for report in reports],
        "rows equal to an earlier one": [report["duplicates"] for report in reports],
        "rows that are trained on too": [report["overlap"] for report in reports],
    }
    rows = [(heading, [f"{count:,}" for count in found]) for heading, found in counts.items() if any(found)]
    return list(splits), rows


def data_warnings(run: Run) -> list[str]:
    """Return a sentence for each thing in the data that makes results doubtful."""
    splits: Mapping[str, Any] = (run.manifest.get("data") or {}).get("splits") or {}
    return [
        sentence.format(f"{report[name]:,}", split)
        for split, report in splits.items()
        for name, sentence in (
            ("bad_rows", "{} bad rows of {} were left out."),
            ("overlap", "{} rows of {} are trained on too: its loss is too good."),
            ("lost_labels", "max_length cut {} labelled tokens away from {}."),
        )
        if report[name]
    ]


def machine_facts(run: Run) -> Facts:
    """Return the machine, its memory and how the processes worked together."""
    device, facts = run.manifest.get("device") or {}, list[tuple[str, str]]()
    if device:
        facts.append(("device", f"{device['name']}, {device['memory_gib']:.0f} GiB"))
        if device["kind"] != "cpu":
            facts.append(("processor", str(device["processor"])))
        several = f", strategy {device['strategy']}" if device["processes"] > 1 else ""
        facts.append(("threads", f"{device['threads']} on {device['cores']} cores"))
        facts.append(("processes", f"{device['processes']} on {device['nodes']} machine(s){several}"))
    peak = find_results(run)["peak_memory_gib"]
    if peak is not None:
        facts.append(("peak memory", f"{peak:.2f} GiB: the most that the {_memory_owner(run)} held at one time"))
    planned, steps = ((run.plan.get(side) or {}).get("peak_bytes") for side in ("predicted", "measured"))
    if planned and steps:
        facts.append(
            ("peak of the steps", f"{format_gib(steps)}, planned {format_gib(planned)}; without loading the base")
        )
    return facts


def version_facts(run: Run) -> Facts:
    """Return what it takes to do the same again: fingerprints, seed, versions, the code's commit."""
    manifest, base = run.manifest, _base(run)
    hashes = {"fingerprint of the base": base.get("fingerprint")}
    hashes |= {f"hash of {name}": value for name, value in ((manifest.get("data") or {}).get("hashes") or {}).items()}
    facts = [(name.replace("_", " "), str(value)[:_HASH]) for name, value in hashes.items() if value]
    if manifest.get("seed") is not None:
        facts.append(("seed", str(manifest["seed"])))
    if git := manifest.get("git"):
        branch = f" on {git['branch']}" if git.get("branch") else ""
        facts.append(("git", f"{git['commit'][:_HASH]}{branch}{', with changes' if git['dirty'] else ''}"))
    if packages := manifest.get("packages"):
        facts.append(("packages", ", ".join(f"{name} {version}" for name, version in packages.items())))
    if manifest.get("python"):
        facts.append(("python", " on ".join(filter(None, [manifest["python"], manifest.get("platform")]))))
    return facts


def update_table(run: Run) -> tuple[list[int], list[tuple[str, list[tuple[str, str]], list[str]]]]:
    """Return the decoder layers, and a row of the heat map and table of ‖ΔW‖/‖W‖ for each kind of module.

    A row holds the kind, a cell for each layer (opacity, description), and median and largest ‖ΔW‖/‖W‖ and the median
    effective rank in words.
    """
    updates = run.manifest.get("adapter_updates") or {}
    every = [update for own in updates.values() for update in own]
    layers = sorted({update["layer"] for update in every if update["layer"] is not None})
    largest = max((update["ratio"] for update in every), default=0.0) or 1.0
    rows = []
    for kind, own in updates.items():
        by_layer = {update["layer"]: update for update in own}
        cells = [("0", "")] * len(layers)
        for place, layer in enumerate(layers):
            if layer in by_layer:
                ratio = by_layer[layer]["ratio"]
                cells[place] = (f"{ratio / largest:.2f}", f"{kind} of layer {layer}: {ratio:.2%}")
        most = max(own, key=lambda update: update["ratio"])
        where = "" if most["layer"] is None else f" in layer {most['layer']}"
        used, rank = (statistics.median(update[name] for update in own) for name in ("effective_rank", "rank"))
        median = statistics.median(update["ratio"] for update in own)
        rows.append((kind, cells, [f"{median:.2%}", f"{most['ratio']:.2%}{where}", f"{used:.1f} of {rank:.0f}"]))
    return layers, rows


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return ``{"model.rank": 8, …}`` of a nested config; lists and empty sections stay as they are."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        flat |= flatten(value, f"{name}.") if isinstance(value, Mapping) and value else {name: value}
    return flat


def find_differences(configs: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Return each setting in which configs differ, with its value in each; ``None`` if one lacks it."""
    flat = [flatten(config) for config in configs]
    names = dict.fromkeys(name for config in flat for name in config if name not in _NOT_SHOWN)
    columns = {name: [config.get(name) for config in flat] for name in names}
    return {name: values for name, values in columns.items() if any(value != values[0] for value in values)}


def write_setting(value: Any) -> str:
    """Write a setting as YAML, in one line."""
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=float("inf"))
    return text.removesuffix("\n").removesuffix("\n...")


def _learned(run: Run) -> Iterator[str]:
    points, kind = run.metrics.get("val_loss", []), "Validation"
    if not points:
        points, kind = running_mean(run.metrics.get("train_loss", [])), "Training"
    if (len(points) < 2 and kind == "Training") or not points:
        return
    base = measured(run, "loss", BASE) if kind == "Validation" and is_of_fit(run) else None
    first, origin = (points[0][1], "") if base is None else (base, " of the base")
    last_step, last = points[-1]
    best_step, best = min(points, key=lambda point: point[1])
    if best >= first:
        yield f"It did not learn: the {kind.lower()} loss never fell below {first:.3f}{origin or ', its first'}."
        return
    yield f"It learned: the {kind.lower()} loss fell from {first:.3f}{origin} to {best:.3f} at step {best_step:,.0f}."
    if kind == "Validation" and last > 1.02 * best:
        yield (
            f"The validation loss rose again, to {last:.3f} at step {last_step:,.0f}: fewer epochs, a lower learning "
            "rate or more rows may do better. The adapter folder holds the best."
        )
    elif kind == "Validation" and len(points) > 1 and points[-2][1] > 1.02 * last:
        yield "The validation loss was still falling at the end: more steps may do better."


def _against_base(run: Run) -> Iterator[str]:
    name = score_names(run)[0] if main_score(run) else "loss"
    base, adapter, gain = measured(run, name, BASE), measured(run, name, ADAPTER), difference(run, name)
    if not is_of_run(run) or base is None or adapter is None or gain is None:
        return
    factor, unit = (1, "") if name == "loss" else (100, " points")
    sign = -1 if name == "loss" else 1
    low, high = sorted((sign * factor * gain.low, sign * factor * gain.high))
    digits = 3 if name == "loss" else 1
    reach = "" if isnan(low) else f" (95 % interval {low:.{digits}f} to {high:.{digits}f})".replace("-", "−")
    words = "lower" if name == "loss" else "higher"
    amount = f"{sign * factor * gain.value:.{digits}f}{unit}".replace("-", "−")
    found = f"{describe_metric(name)} {amount} {words}{reach} on {describe_rows(run)}."
    if low <= 0 <= high:
        yield f"It is not clearly better than the base: {found}"
    else:
        yield f"It is {'better' if sign * gain.value > 0 else 'worse'} than the base: {found}"


def _updated(run: Run) -> Iterator[str]:
    """Report what the size of the updates and the directions they use mean for the settings."""
    updates = [update for own in (run.manifest.get("adapter_updates") or {}).values() for update in own]
    nonzero = [update for update in updates if update["ratio"]]
    if not nonzero:
        yield from ["The adapter changes nothing: every update is zero."] if updates else []
        return
    ratio = statistics.median(update["ratio"] for update in nonzero)
    used = statistics.median(update["effective_rank"] / update["rank"] for update in nonzero)
    rank = statistics.median_high(update["rank"] for update in nonzero)
    if ratio < _LITTLE:
        yield f"It hardly changed the base (median ‖ΔW‖/‖W‖ {ratio:.2%}): more steps or a higher learning rate may do."
    elif ratio > _MUCH:
        yield (
            f"It changed the base very far (median ‖ΔW‖/‖W‖ {ratio:.0%}), which may have lost what the base knew: "
            "compare both on other tasks."
        )
    if rank > 1 and used > _FULL:
        yield f"It uses its rank to the full ({used:.0%} of {rank}): twice the rank may learn more."
    elif rank > 1 and used < _SPARSE:
        yield f"It uses {used:.0%} of its rank of {rank}: half the rank may learn as much."


def _describe_base(base: Mapping[str, Any], flat: Mapping[str, Any]) -> str:
    name = base.get("base") or flat.get("model.base")
    revision = base.get("revision") or flat.get("model.revision")
    kind = base.get("quantization") or flat.get("model.quantization")
    double = " with double quantization" if base.get("double_quant") and kind in ("nf4", "fp4") else ""
    dtype = f", computed in {base['compute_dtype']}" if base.get("compute_dtype") else ""
    return f"{name}{f' at {revision}' if revision else ''}, {kind}{double}{dtype}"


def _describe_adapter(adapter: Mapping[str, Any], parameters: Mapping[str, Any]) -> str:
    parts = [f"{name} {adapter[name]}" for name in ("rank", "alpha", "dropout") if adapter.get(name) is not None]
    targets, layers = adapter.get("target_modules") or [], adapter.get("layers") or []
    parts += [f"on {', '.join(targets)} of {len(layers)} layers"] if targets else []
    trainable, total = parameters.get("trainable"), parameters.get("all")
    share = f"{trainable:,} of {total:,} parameters ({trainable / total:.2%})" if trainable and total else ""
    return ": ".join(filter(None, [", ".join(parts), share]))


def _memory_owner(run: Run) -> str:
    return "process" if (run.manifest.get("device") or {}).get("kind", "cpu") == "cpu" else "GPU"


def _base(run: Run) -> Mapping[str, Any]:
    return run.manifest.get("base") or run.adapter


def _files(run: Run) -> dict[str, Any]:
    files = (run.manifest.get("data") or {}).get("files") or run.config.get("data") or {}
    return {split: files[split] for split in ("train", "val") if files.get(split) is not None}
