"""A diagnosis as a table, in plain words, and as JSON."""

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from qlora_lightning.commands.diagnose.measure import Diagnosis
from qlora_lightning.model.adapters.targets import layer_of
from qlora_lightning.model.weights.merging import Movement

_BARS = "▁▂▃▄▅▆▇█"
_LITTLE, _MUCH = 1e-3, 0.5  # median ‖ΔW‖/‖W‖
_SPARSE, _FULL = 0.5, 0.85  # share of the rank that is used; a random update uses about 0.9


def as_json(found: Diagnosis) -> dict[str, Any]:
    """Give all figures as plain values."""
    modules = [{**asdict(each), "ratio": each.ratio} for each in found.movements]
    return {"adapter": found.adapter, "base": found.base, "hints": give_hints(found.movements), "modules": modules}


def print_report(found: Diagnosis, console: Console, every_module: bool = False) -> None:
    """Print the table by kind of module, that of every module where wanted, and the hints."""
    console.print(f"{found.adapter} on {found.base}", markup=False, soft_wrap=True)
    console.print(_table_of_kinds(found))
    if every_module:
        console.print(_table_of_modules(found.movements))
    for hint in give_hints(found.movements):
        console.print(f"• {hint}", markup=False)


def give_hints(movements: Sequence[Movement]) -> list[str]:
    """Say in plain words what the figures mean."""
    still = [each.module for each in movements if each.update_norm == 0]
    if len(still) == len(movements):
        return ["The adapter changes nothing: every update is zero. It was not trained, or not saved after training."]
    hints = []
    if still:
        hints.append(f"{len(still)} modules are not moved at all ({still[0]}, …): they cost memory and do nothing.")
    moved = [each for each in movements if each.update_norm]
    ratio = statistics.median(each.ratio for each in moved)
    if ratio < _LITTLE:
        hints.append(f"It hardly moved the base (median {ratio:.2%}): train longer, or with a higher learning rate.")
    elif ratio > _MUCH:
        hints.append(
            f"It moved the base very far (median {ratio:.0%}): what the base knew may be lost. Compare both on other "
            "tasks, and try a lower learning rate or fewer epochs."
        )
    else:
        hints.append(f"It moved the base by {ratio:.1%} in the median, which is usual.")
    used = statistics.median(each.effective_rank / each.rank for each in moved)
    rank = statistics.median_high(each.rank for each in moved)
    if used > _FULL and rank > 1:
        hints.append(f"It uses its rank to the full ({used:.0%} of {rank}): twice the rank may learn more.")
    elif used < _SPARSE:
        needed = _quantile([each.effective_rank for each in moved], 0.9)
        smaller = 2 ** math.ceil(math.log2(max(needed, 1)))
        words = f"rank {smaller} would hold most of it" if smaller < rank else "some modules need all of it"
        hints.append(f"It uses {used:.0%} of its rank {rank} in the median: {words}.")
    else:
        hints.append(f"It uses {used:.0%} of its rank {rank} in the median: a fair size.")
    return hints


def _table_of_kinds(found: Diagnosis) -> Table:
    table = Table(title="‖ΔW‖/‖W‖ by kind of module", title_justify="left")
    for heading in ("module", "rank used", "median", "highest"):
        table.add_column(heading, justify="left" if heading == "module" else "right", no_wrap=True)
    table.add_column("by layer", overflow="fold")  # 32 of them fit a terminal of 80 columns
    highest = max(each.ratio for each in found.movements) or 1.0
    for kind, group in _by_kind(found.movements).items():
        ratios = [each.ratio for each in group]
        ranks = [each.rank for each in group]
        bounds = "–".join(str(rank) for rank in sorted({min(ranks), max(ranks)}))
        used = statistics.median(each.effective_rank for each in group)
        table.add_row(
            kind,
            f"{used:.1f} of {bounds}",
            f"{statistics.median(ratios):.2%}",
            f"{max(ratios):.2%}",
            "".join(_BARS[min(7, int(8 * ratio / highest))] for ratio in ratios),
        )
    return table


def _table_of_modules(movements: Sequence[Movement]) -> Table:
    table = Table()
    table.add_column("module", overflow="fold")
    for heading in ("rank used", "‖ΔW‖", "‖W‖", "‖ΔW‖/‖W‖"):
        table.add_column(heading, justify="right", no_wrap=True)
    for each in movements:
        used = f"{each.effective_rank:.1f} of {each.rank}"
        table.add_row(each.module, used, f"{each.update_norm:.3g}", f"{each.base_norm:.4g}", f"{each.ratio:.2%}")
    return table


def _by_kind(movements: Sequence[Movement]) -> dict[str, list[Movement]]:
    """Group modules by the last part of their names, each group by layer, in the order of the model."""

    def kind(each: Movement) -> str:
        return each.module.rpartition(".")[2]

    order = {name: number for number, name in enumerate(dict.fromkeys(map(kind, movements)))}
    ordered = sorted(movements, key=lambda each: (order[kind(each)], layer_of(each.module) or 0))
    return {name: list(group) for name, group in itertools.groupby(ordered, kind)}


def _quantile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]
