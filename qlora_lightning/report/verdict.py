"""Whether a run learned, and whether it is better than its base: one judgement for terminal, manifest and page."""

import math
import statistics
from dataclasses import dataclass

from qlora_lightning.evaluation.intervals import format_interval
from qlora_lightning.evaluation.scores import describe_metric, is_share
from qlora_lightning.report.figures import BaseComparison, read_comparison
from qlora_lightning.report.run_files import Run

_FEWEST_STEPS = 10
_NOISE = 0.02  # of a validation loss: what is closer is as good


@dataclass(frozen=True)
class Verdict:
    """What can be said of a run."""

    kind: str  # unknown, learned, not learned, diverged, worse (than the base)
    sentences: list[str]


def judge(run: Run) -> Verdict:
    """Judge a run by its losses and its evaluation; too few steps, or no validation, say nothing."""
    last_steps = [points[-1][0] for points in run.metrics.values() if points]
    steps = max([*last_steps, (run.manifest.get("progress") or {}).get("steps") or 0])
    if not steps:
        return Verdict("unknown", [])
    comparison = read_comparison(run)
    base = comparison.metrics["loss"].base.value if "loss" in comparison.metrics else math.nan
    against, compared = _against_base(comparison)
    why = _divergence(run, base, steps)
    if why:
        return Verdict("diverged", [f"It diverged: {why}. A lower learning rate may do.", *compared])
    if steps < _FEWEST_STEPS:
        return Verdict("unknown", [f"Too short to judge: {steps:,.0f} optimizer steps, of at least {_FEWEST_STEPS}."])
    kind, sentences = _learned(run, base)
    return Verdict("worse" if against == "worse" else kind, [*sentences, *compared])


def _divergence(run: Run, base: float, steps: float) -> str:
    """Return how a run diverged; empty if it did not.

    Overfitting, where the training loss falls while that of validation rises, is none, unless it is blown up.
    """
    validation, training = ([value for _, value in run.metrics.get(f"{name}_loss", [])] for name in ("val", "train"))
    some = max(min(3, len(training) // 2), len(training) // 10, 1)  # steps at each end
    first, last = (statistics.median(part) if part else math.nan for part in (training[:some], training[-some:]))
    if _is_blown_up(last, first):
        return f"the training loss rose from {first:.3f} to {last:.3f}"
    if validation:
        start, words = (validation[0], "its first") if math.isnan(base) else (base, "that of the base")
        is_worse = steps >= _FEWEST_STEPS and _is_above(min(validation), start) and not last < first
        if is_worse or _is_blown_up(validation[-1], start):
            return f"the validation loss ended at {validation[-1]:.3f}, above {start:.3f}, {words}"
    return ""


def _learned(run: Run, base: float) -> tuple[str, list[str]]:
    points = run.metrics.get("val_loss", [])
    if not points or (len(points) == 1 and math.isnan(base)):
        return "unknown", ["Whether it learned is not known: no validation losses to compare."]
    first, origin = (points[0][1], "") if math.isnan(base) else (base, " of the base")
    (last_step, last), (best_step, best) = points[-1], min(points, key=lambda point: point[1])
    if not _is_above(first, best):
        return "not learned", [
            f"It did not learn: the validation loss did not fall clearly below {first:.3f}{origin or ', its first'}."
        ]
    sentences = [
        f"It learned: the validation loss fell from {first:.3f}{origin} to {best:.3f} at step {best_step:,.0f}."
    ]
    if _is_above(last, best):
        sentences.append(
            f"The validation loss rose again, to {last:.3f} at step {last_step:,.0f}: fewer epochs, a lower learning "
            "rate or more rows may do better. The adapter folder holds the best."
        )
    elif len(points) > 1 and _is_above(points[-2][1], last):
        sentences.append("The validation loss was still falling at the end: more steps may do better.")
    return "learned", sentences


def _is_blown_up(loss: float, start: float) -> bool:
    return loss > start + max(1.0, abs(start) / 2)  # nats a token


def _is_above(loss: float, other: float) -> bool:
    return loss > other + _NOISE * abs(other)


def _against_base(comparison: BaseComparison) -> tuple[str, list[str]]:
    """Return whether the adapter that was kept is better than the base, in a word and in a sentence."""
    differences = {name: each.difference for name, each in comparison.metrics.items()}
    clear = {name: each.low > 0 or each.high < 0 for name, each in differences.items()}
    metric = next(iter(comparison.scores), "loss")
    if not clear.get(metric) and clear.get("loss"):  # answers may be as before, and their likelihood not
        metric = "loss"
    if metric not in differences or math.isnan(differences[metric].value):
        return "", []
    difference = differences[metric]
    text = format_interval(difference, is_share(metric), "+", 3).replace("-", "−")
    unit = " points" if is_share(metric) else ""
    reach = "" if math.isnan(difference.low) else " (95 % interval)"
    better = "better" if (difference.value < 0) == (metric == "loss") else "worse"
    verdict = better if clear[metric] else "not clearly better"
    return verdict, [
        f"The adapter that was kept is {verdict} than the base: {describe_metric(metric)} {text}{unit}{reach} "
        f"on {comparison.rows}."
    ]
