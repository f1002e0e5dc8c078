"""What a run was, in words for a person: headings, each with a line."""

from collections.abc import Iterator, Mapping
from typing import Any

from qlora_lightning.evaluation.names import describe_metric
from qlora_lightning.report.judged import BASE, describe_rows, is_of_fit, is_of_test, judged, score_names
from qlora_lightning.report.results import find_results, main_score, write_result
from qlora_lightning.report.run import Run
from qlora_lightning.report.settings import flatten, write_setting
from qlora_lightning.report.ticks import write_number

Facts = list[tuple[str, str]]

STATUS = {
    "finished": "finished",
    "stopped": "stopped by a signal",
    "failed": "ended by an error",
    "running": "still going",
    "killed": "killed: it ended without a word",
    "unknown": "of an earlier version, which wrote no manifest",
}
_GIB = 1024**3
_HASH = 16  # digits shown of one; manifest.json has all


def headline(run: Run) -> Facts:
    """Give the figures at the top of the page, each with what it is."""
    found, score, test = find_results(run), main_score(run), is_of_test(run)
    figures: Facts = [*_before_and_after(run, found)]
    if not is_of_fit(run) and found["val_loss"] is not None:
        figures.append((f"{found['val_loss']:.3f}", "validation loss, best"))
    accuracy = found["test_token_accuracy" if test else "token_accuracy"]
    if score is None and accuracy is not None:
        figures.append((f"{accuracy:.1%}", f"token accuracy, {'test' if test else 'validation'}"))
    planned = (run.manifest.get("progress") or {}).get("planned_steps")
    if found["steps"] is not None:
        of = f" of {planned:,}" if planned and planned != found["steps"] else ""
        figures.append((f"{found['steps']:,.0f}{of}", "optimizer steps"))
    if found["minutes"] is not None:
        figures.append((word_seconds(60 * found["minutes"]), "wall time of the fit"))
    if found["tokens_per_second"] is not None:
        figures.append((write_result(found["tokens_per_second"], "whole"), "tokens/s, median"))
    if found["peak_memory_gib"] is not None:
        figures.append((f"{write_result(found['peak_memory_gib'], 'number')} GiB", "peak memory, with loading"))
    return figures


def _before_and_after(run: Run, found: Mapping[str, float | None]) -> Iterator[tuple[str, str]]:
    """Yield the loss, and the score that counts most, of base and adapter."""
    score, base = main_score(run), judged(run, "loss", BASE)
    split, name = ("test", "test_loss") if is_of_test(run) else ("validation", "val_loss")
    if not is_of_fit(run) and not is_of_test(run):
        name = "evaluated_loss"
    rows = f" of {describe_rows(run)}" if name == "evaluated_loss" else ""
    loss = found.get(name)
    if loss is not None:
        before, sides = ("", "") if base is None else (f"{base:.3f} → ", ", base → adapter")
        yield f"{before}{loss:.3f}", f"{f'loss{rows}' if rows else f'{split} loss'}{sides}"
    share = None if score is None else found[score]
    if score is not None and share is not None:
        base = judged(run, score_names(run)[0], BASE)
        before, sides = ("", "") if base is None else (f"{base:.0%} → ", ", base → adapter")
        yield f"{before}{share:.0%}", f"{describe_metric(score_names(run)[0])}{rows}{sides}"


def word_subject(run: Run) -> str:
    """Say in a sentence what was trained on what."""
    flat, base = flatten(run.config), _base(run)
    name, files = base.get("base") or flat.get("model.base"), _files(run).get("train")
    adapter = run.manifest.get("adapter") or run.adapter.get("adapter") or {}
    rank = adapter.get("rank", flat.get("model.rank"))
    trained = f"LoRA of rank {rank}" if rank else "Adapters"
    on = f" on {name}" if name else ""
    rows = ((run.manifest.get("data") or {}).get("splits") or {}).get("train", {}).get("rows")
    begun = flat.get("model.adapter")
    went_on = f", going on from {begun}" if begun else ""
    data = f", trained on {write_setting(files)}" if files else ""
    return f"{trained}{on}{went_on}{data}{f' ({rows:,} rows)' if rows else ''}."


def training_facts(run: Run) -> Facts:
    """Tell base, adapter, data, length and settings of the training."""
    manifest = run.manifest
    applied = (manifest.get("data") or {}).get("settings") or {}  # null has become what it stands for
    flat = {**flatten(run.config), **flatten(applied, "data.")}
    base, adapter = _base(run), manifest.get("adapter") or run.adapter.get("adapter") or {}
    parameters, progress = manifest.get("parameters") or {}, manifest.get("progress") or {}
    facts: Facts = []
    if base or "model.base" in flat:
        facts.append(("base", _word_base(base, flat)))
    if adapter:
        facts.append(("adapter", _word_adapter(adapter, parameters)))
    if flat.get("model.adapter"):
        facts.append(("began from", str(flat["model.adapter"])))
    facts += [(split, write_setting(file)) for split, file in _files(run).items()]
    if progress:
        parts = [f"{progress['steps']:,} optimizer steps"]
        for name, words in (("tokens", "tokens"), ("labelled_tokens", "labelled tokens")):
            if progress.get(name) is not None:
                parts.append(f"{progress[name]:,} {words}")
        facts.append(("trained", ", ".join(parts)))
    if manifest.get("stopped_early"):
        facts.append(("stopped early", str(manifest["stopped_early"])))
    for heading, names in _SETTINGS.items():
        told = [
            f"{_short_name(name)} {write_setting(flat[name])}" for name in names if flat.get(name) not in (None, -1)
        ]
        facts += [(heading, ", ".join(told))] if told else []
    extras = [*_word_extras(flat), *_word_callbacks(run.config)]
    facts += [("extras", ", ".join(extras))] if extras else []
    best = manifest.get("best")
    if best:
        facts.append(("best checkpoint", f"{best['checkpoint']}, {best['monitor']} {best['value']:.4f}"))
    return facts


_SETTINGS = {
    "optimization": (
        *("model.learning_rate", "model.schedule", "model.warmup_ratio", "model.optimizer", "model.weight_decay"),
        "trainer.gradient_clip_val",
    ),
    "batches": (
        *("data.batch_size", "data.tokens_per_batch", "trainer.accumulate_grad_batches", "data.max_length"),
        *("data.group_by_length", "gradient_checkpointing.enabled"),
    ),
    "length": ("trainer.max_epochs", "trainer.max_steps"),
}


_EXTRAS = {"model.neftune_alpha": "NEFTune alpha", "model.loraplus_ratio": "LoRA+ ratio", "ema.decay": "EMA decay"}


def _word_extras(flat: Mapping[str, Any]) -> Iterator[str]:
    for name, words in _EXTRAS.items():
        is_off = flat.get(f"{name.partition('.')[0]}.enabled") is False
        if flat.get(name) is not None and not is_off:
            yield f"{words} {write_setting(flat[name])}"


def _word_callbacks(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield the callbacks that the config names, with what it says of them."""
    named = (config.get("trainer") or {}).get("callbacks") or []
    for each in named if isinstance(named, list) else [named]:
        if isinstance(each, Mapping) and each.get("class_path"):
            arguments = [f"{name} {write_setting(value)}" for name, value in (each.get("init_args") or {}).items()]
            kind = str(each["class_path"]).rpartition(".")[2]
            yield f"{kind} ({', '.join(arguments)})" if arguments else kind


def machine_facts(run: Run) -> Facts:
    """Tell the machine, its memory and how the processes worked together."""
    device, peaks = run.manifest.get("device") or {}, run.manifest.get("peak_memory_gib") or {}
    facts: Facts = []
    if device:
        facts.append(("device", f"{device['name']}, {device['memory_gib']:.0f} GiB"))
        if device["kind"] != "cpu":
            facts.append(("processor", str(device["processor"])))
        facts.append(("threads", f"{device['threads']} on {device['cores']} cores"))
        several = f", strategy {device['strategy']}" if device["processes"] > 1 else ""
        facts.append(("processes", f"{device['processes']} on {device['nodes']} machine(s){several}"))
    facts += [
        (name.removesuffix("_gib").replace("_", " "), f"{gib:.2f} GiB")
        for name, gib in sorted(peaks.items())
        if gib is not None
    ]
    for side in ("predicted", "measured"):
        size = (run.plan.get(side) or {}).get("peak_bytes")
        facts += [(f"peak, {side}", f"{size / _GIB:.2f} GiB")] if size else []
    return facts


def version_facts(run: Run) -> Facts:
    """Tell what it takes to do the same again: fingerprints, seed, versions, the code's commit."""
    manifest, base = run.manifest, _base(run)
    facts: Facts = []
    if base.get("fingerprint"):
        facts.append(("fingerprint of the base", str(base["fingerprint"])[:_HASH]))
    hashes = (manifest.get("data") or {}).get("hashes") or {}
    facts += [(f"hash of {name.replace('_', ' ')}", str(value)[:_HASH]) for name, value in hashes.items()]
    if manifest.get("seed") is not None:
        facts.append(("seed", str(manifest["seed"])))
    git = manifest.get("git")
    if git:
        branch = f" on {git['branch']}" if git.get("branch") else ""
        facts.append(("git", f"{git['commit'][:_HASH]}{branch}{', with changes' if git['dirty'] else ''}"))
    packages = manifest.get("packages") or {}
    if packages:
        facts.append(("packages", ", ".join(f"{name} {version}" for name, version in packages.items())))
    if manifest.get("python"):
        platform = manifest.get("platform")
        facts.append(("python", f"{manifest['python']}{f' on {platform}' if platform else ''}"))
    return facts


def word_seconds(seconds: float) -> str:
    """Word a duration: ``42 s``, ``4.1 min``, ``3.5 h``."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{write_number(float(f'{seconds / 60:.2g}'))} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _short_name(name: str) -> str:
    """A setting by its own name, or by that of the callback that it switches on."""
    section, _, own = name.rpartition(".")
    return section if own == "enabled" else own


def _word_base(base: Mapping[str, Any], flat: Mapping[str, Any]) -> str:
    name = base.get("base") or flat.get("model.base")
    revision = base.get("revision") or flat.get("model.revision")
    kind = base.get("quantization") or flat.get("model.quantization")
    double = " with double quantization" if base.get("double_quant") and kind in ("nf4", "fp4") else ""
    dtype = f", computed in {base['compute_dtype']}" if base.get("compute_dtype") else ""
    return f"{name}{f' at {revision}' if revision else ''}, {kind}{double}{dtype}"


def _word_adapter(adapter: Mapping[str, Any], parameters: Mapping[str, Any]) -> str:
    parts = [f"{name} {adapter[name]}" for name in ("rank", "alpha", "dropout") if adapter.get(name) is not None]
    targets, layers = adapter.get("target_modules") or [], adapter.get("layers") or []
    parts += [f"on {', '.join(targets)} of {len(layers)} layers"] if targets else []
    told = [", ".join(parts)] if parts else []
    if parameters.get("all") and parameters.get("trainable") is not None:
        share = parameters["trainable"] / parameters["all"]
        told.append(f"{parameters['trainable']:,} of {parameters['all']:,} parameters ({share:.2%})")
    return ": ".join(told)


def _base(run: Run) -> Mapping[str, Any]:
    return run.manifest.get("base") or run.adapter


def _files(run: Run) -> dict[str, Any]:
    named = (run.manifest.get("data") or {}).get("files")
    files: Mapping[str, Any] = (run.config.get("data") or {}) if named is None else named
    return {split: files[split] for split in ("train", "val") if files.get(split) is not None}
