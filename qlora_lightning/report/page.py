"""The page of a run, or of several side by side: its words, its tables, and the HTML file made of them."""

import shlex
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import yaml

from qlora_lightning.report import figures
from qlora_lightning.report.assessment import Assessment, assess
from qlora_lightning.report.charts import COLOURS, charts_of, draw
from qlora_lightning.report.run_files import Run, read_run
from qlora_lightning.support.console import count_of, show_controls
from qlora_lightning.support.files import ADAPTER_FOLDER, CHECKPOINTS, IDENTITY, PAGE, resolve_unnamed, write_whole
from qlora_lightning.version import __version__

Facts = list[tuple[str, str]]
_NOT_SHOWN = "trainer.default_root_dir"  # differs between any two runs, without effect
_SETTINGS = (
    *("model.learning_rate", "model.schedule", "model.warmup", "model.optimizer", "model.weight_decay"),
    *("model.neftune_alpha", "model.loraplus_ratio", "trainer.gradient_clip_val"),
    *("trainer.accumulate_grad_batches", "data.batch_size", "data.tokens_per_batch"),
    *("data.max_length", "gradient_checkpointing.enabled", "trainer.max_epochs", "trainer.max_steps"),
)


def write_run_page(folder: Path) -> Path:
    """Write ``report.html`` into a run folder."""
    write_whole(folder / PAGE, render_report([read_run(folder)]))
    return folder / PAGE


def render_report(runs: Sequence[Run]) -> str:
    """Return the page of one run, or of several side by side; every text from outside is escaped."""
    import jinja2  # here, so that a fit starts without it

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.ChainableUndefined,  # a manifest may lack anything
        finalize=lambda value: show_controls(value) if type(value) is str else value,
    )
    environment.filters["pairs"] = lambda facts: ", ".join(f"{name} {fact}" for name, fact in (facts or {}).items())
    environment.filters["yaml"] = lambda config: yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True)
    return environment.get_template("report.html").render(
        runs=runs,
        charts=[(chart, draw(chart)) for chart in charts_of(runs)],
        colours=COLOURS,
        assessment=assess(runs[0]) if len(runs) == 1 else None,
        version=__version__,
        **{function.__name__: function for function in _CALLED},
    )


def describe_run(run: Run) -> str:
    """Describe in a sentence what was trained on what."""
    base, adapter, data = (run.manifest[name] for name in ("base", "adapter", "data"))
    files, rows = _files(run).get("train"), ((data.get("splits") or {}).get("train") or {}).get("rows")
    model = f"LoRA of rank {adapter['rank']} on {base.get('base')}" if adapter.get("rank") else "An adapter"
    paths = " and ".join(str(source["path"]) for source in _sources(files))
    return f"{model}, trained on {count_of(rows, 'row') + ' of ' if rows else ''}{paths}." if paths else f"{model}."


def next_steps(run: Run, assessment: Assessment) -> Facts:
    """Return the commands that follow from an assessment, each with its purpose."""
    folder, reproduce = shlex.quote(str(resolve_unnamed(run.folder))), run.manifest.get("reproduce")

    def start_again(kind: str, factor: float) -> Facts:
        rates = [factor * rate for _, rate in run.metrics.get("learning_rate", [])]
        if not reproduce or not rates:
            return []
        return [(f"start again with a {kind} learning rate", f"{reproduce} --model.learning_rate {max(rates):.1g}")]

    if assessment.kind == "diverged":
        return start_again("lower", 1 / 3)
    has_checkpoint = any((run.folder / CHECKPOINTS).glob("*.ckpt"))
    if run.status != "finished" and has_checkpoint and reproduce:
        purpose = "resume it" if run.status != "running" else "resume it if it was killed"
        resume = f"qlora-lightning fit --config {folder}/config.yaml --ckpt_path last"
        return [(f"{purpose}, from the same working folder", resume)]
    if run.status != "finished" or not (run.folder / ADAPTER_FOLDER / IDENTITY).exists():
        return []
    commands = start_again("higher", 3) if assessment.kind == "not learned" else []
    if assessment.kind in ("learned", "unknown"):
        commands.append(("talk to it", f"qlora-lightning chat --adapter {folder}/adapter"))
    data, splits = run.config.get("data") or {}, run.manifest["data"].get("splits") or {}
    options = "--rows 0"  # there are no rows to check a merge on
    if run.config and ("val" in splits or data.get("test")):  # a script has no config
        options = f"--config {folder}/config.yaml"
        split = " --split test" if data.get("test") else ""
        evaluate = f"qlora-lightning evaluate --adapter {folder}/adapter {options}{split} --out {folder}-evaluated"
        commands.append(("evaluate it, with its hardest rows", evaluate))
    if assessment.kind == "learned":
        merge = f"qlora-lightning merge --adapter {folder}/adapter --out {folder}-merged {options}"
        commands.append(("merge it, to serve it", merge))
    return commands


def training_facts(run: Run) -> Facts:
    """Return base, adapter, data, length and settings of the training."""
    manifest, progress, best = run.manifest, run.manifest["progress"], run.manifest["best"]
    applied = manifest["data"].get("settings") or {}  # null is replaced by its meaning
    flat = {**flatten(run.config), **flatten(applied, "data.")}
    counts = {"optimizer steps": "steps", "planned": "planned_steps", "tokens": "tokens"}
    counts |= {"labeled tokens": "labelled_tokens", "rows": "rows"}
    trained = [f"{progress[name]:,} {label}" for label, name in counts.items() if progress.get(name) is not None]
    base, adapter, parameters = (manifest[key] for key in ("base", "adapter", "parameters"))
    trainable, total = parameters.get("trainable") or 0, parameters.get("all") or 0
    facts = [
        ("base", _list_settings(base, ("base", "revision", "quantization", "double_quant", "compute_dtype"))),
        ("adapter", _list_settings(adapter, ("rank", "alpha", "dropout", "target_modules"))),
        ("parameters", total and f"{trainable:,} of {total:,} ({trainable / total:.2%})"),
        ("continued from", flat.get("model.adapter")),
        *((split, "; ".join(map(_describe_source, _sources(files)))) for split, files in _files(run).items()),
        ("settings", _list_settings(flat, _SETTINGS)),
        ("trained", ", ".join(trained)),
        ("best checkpoint", best and f"{best.get('checkpoint')}, {best.get('monitor')} {best.get('value') or 0:.4f}"),
    ]
    return [(heading, text) for heading, text in facts if text]


def _list_settings(values: Mapping[str, Any], names: Sequence[str]) -> str:
    settings = {name.removesuffix(".enabled").rpartition(".")[2]: values.get(name) for name in names}
    return ", ".join(f"{name} {format_setting(value)}" for name, value in settings.items() if value not in (None, -1))


def attempts_table(run: Run) -> figures.PageTable:
    """Return start, length and end of each attempt of a run that was resumed."""
    rows = []
    for attempt in run.manifest.get("attempts") or []:
        steps = f"{attempt['from_step']:,} to {attempt['to_step']:,}"
        duration, started = timedelta(seconds=round(attempt["seconds"])), attempt["started"].replace("T", " ")
        rows.append([started, steps, str(duration), attempt.get("error") or attempt["status"]])
    return ["started", "steps", "took", "ended"], rows if len(rows) > 1 else []


def difference_table(runs: Sequence[Run]) -> figures.PageTable:
    """Return the settings in which runs differ."""
    differences = find_differences([run.config for run in runs])
    rows = [[name, *map(format_setting, values)] for name, values in differences.items()]
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


def _files(run: Run) -> dict[str, Any]:
    files = run.manifest["data"].get("files") or run.config.get("data") or {}
    return {split: files[split] for split in ("train", "val") if files.get(split) is not None}


def _sources(files: Any) -> list[Mapping[str, Any]]:
    """Return what ``data.train`` or ``data.val`` names as mappings with ``path``."""
    entries = files if isinstance(files, list) else [files]
    return [entry if isinstance(entry, Mapping) and "path" in entry else {"path": entry} for entry in entries if entry]


def _describe_source(source: Mapping[str, Any]) -> str:
    """Return the path of a source and how it is read: ``train.jsonl, the first 280 rows``."""
    rows, settings = source.get("rows"), {key: source[key] for key in source if key not in ("path", "rows")}
    first = f"the first {count_of(rows, 'row')}" if isinstance(rows, int) else ""
    return ", ".join(filter(None, [str(source["path"]), first, _list_settings(settings, list(settings))]))


# what report.html calls
_CALLED = (
    *(describe_run, next_steps, training_facts, attempts_table, difference_table),
    *(figures.figure_table, figures.comparison_table, figures.find_samples),
)
