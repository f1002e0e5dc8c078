"""Whether a run learned, and whether it is better than its base: one assessment for terminal, manifest and page."""

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass

from qlora_lightning.evaluation.intervals import format_interval
from qlora_lightning.evaluation.scores import describe_metric, is_share
from qlora_lightning.report.figures import describe_rows, find_scores
from qlora_lightning.report.run_files import MeasuredSides, Points, Run
from qlora_lightning.support.console import count_of

_MIN_STEPS = 10
_SAME = 0.01  # share of a loss up to which it is the logarithm of the perplexity, written with fewer digits
_NOISE = 0.02  # share of a validation loss: smaller differences count as none


@dataclass(frozen=True)
class Assessment:
    """What losses and evaluation show."""

    kind: str  # unknown, learned, not learned, diverged, worse (than the base)
    sentences: list[str]


def assess(run: Run) -> Assessment:
    """Assess a run by its losses and its evaluation: unknown after too few steps or without validation."""
    last_steps = [points[-1][0] for points in run.metrics.values() if points]
    steps = max([*last_steps, run.manifest["progress"].get("steps") or 0])
    if not steps:
        return Assessment("unknown", [])
    comparison = run.comparison
    began_at_base = not (run.config.get("model") or {}).get("adapter")
    base = comparison["loss"].base.value if "loss" in comparison and began_at_base else math.nan
    likelihood = _find_likelihood(run)
    measure = "perplexity" if likelihood else "loss"
    against_base, base_sentences = _compare_with_base(comparison, measure, describe_rows(run))
    divergence = _find_divergence(run, base, steps)
    if divergence:
        return Assessment("diverged", [f"It diverged: {divergence}. A lower learning rate may do.", *base_sentences])
    if steps < _MIN_STEPS:
        length = f"{count_of(int(steps), 'optimizer step')}, and judging takes {_MIN_STEPS}"
        return Assessment("unknown", [f"Too short to judge: {length}."])
    points, what = run.metrics.get("val_loss", []), "validation loss"
    if not points and "loss" in comparison:  # it ended before its first validation
        points = [(steps, comparison["loss"].adapter.value)]
    if likelihood:
        points, what = likelihood, "negative log-likelihood of the validation rows"
        base = _log(comparison["perplexity"].base.value) if "perplexity" in comparison and began_at_base else math.nan
    kind, sentences = _assess_learning(points, base, what, clearly_better=against_base == "better")
    return Assessment("worse" if against_base == "worse" else kind, [*sentences, *base_sentences])


def _find_likelihood(run: Run) -> Points:
    """Return the validation's negative log-likelihoods if a class logs them beside another loss, which they judge."""
    losses = dict(run.metrics.get("val_loss", []))
    points = [(step, _log(perplexity)) for step, perplexity in run.metrics.get("val_perplexity", [])]
    differs = any(abs(losses[step] - nll) > _SAME * abs(losses[step]) for step, nll in points if step in losses)
    return points if differs else []


def _log(perplexity: float) -> float:
    return math.log(perplexity) if perplexity > 0 else math.nan


def _find_divergence(run: Run, base: float, steps: float) -> str:
    """Return how a run diverged; empty if it did not.

    Overfitting, a rising validation loss while the training loss falls, is none, unless the loss blows up.
    """
    validation, training = ([value for _, value in run.metrics.get(f"{name}_loss", [])] for name in ("val", "train"))
    n = max(min(3, len(training) // 2), len(training) // 10, 1)  # steps at each end
    start, end = (statistics.median(losses) if losses else math.nan for losses in (training[:n], training[-n:]))
    if _is_blown_up(end, start):
        return f"the training loss rose from {start:.3f} to {end:.3f}"
    if validation:
        reference, origin = (validation[0], "its first") if math.isnan(base) else (base, "that of the base")
        is_worse = steps >= _MIN_STEPS and _is_above(min(validation), reference) and not end < start
        if is_worse or _is_blown_up(validation[-1], reference):
            return f"the validation loss ended at {validation[-1]:.3f}, above {reference:.3f}, {origin}"
    return ""


def _assess_learning(points: Points, base: float, what: str, clearly_better: bool) -> tuple[str, list[str]]:
    if not points:
        return "unknown", ["Whether it learned is not known: no validation losses to compare."]
    start, origin = (points[0][1], "") if math.isnan(base) else (base, " of the base")
    (last_step, last), (best_step, best) = points[-1], min(points, key=lambda point: point[1])
    if not _is_above(start, best) and clearly_better and best < start:  # on the same rows a little may be sure
        return "learned", [f"It learned a little: the {what} fell from {start:.3f}{origin} to {best:.3f}."]
    if not _is_above(start, best):
        if math.isnan(base):  # the first validation may come when most is learned
            return "unknown", [
                f"Whether it learned is not known: the loss at its start was not measured, and the {what} did not fall "
                f"clearly below {start:.3f}, its first."
            ]
        return "not learned", [f"It did not learn: the {what} did not fall clearly below {start:.3f}{origin}."]
    sentences = [f"It learned: the {what} fell from {start:.3f}{origin} to {best:.3f} at step {best_step:,.0f}."]
    if _is_above(last, best):
        sentences.append(
            f"The {what} rose again, to {last:.3f} at step {last_step:,.0f}: fewer epochs, a lower learning "
            "rate or more rows may do better. The adapter folder holds the best."
        )
    elif len(points) > 1 and _is_above(points[-2][1], last):
        sentences.append(f"The {what} was still falling at the end: more steps may do better.")
    return "learned", sentences


def _is_blown_up(loss: float, start: float) -> bool:
    return loss > start + max(1.0, abs(start) / 2)  # nats a token


def _is_above(loss: float, reference: float) -> bool:
    return loss > reference + _NOISE * abs(reference)


def _compare_with_base(comparison: Mapping[str, MeasuredSides], measure: str, rows: str) -> tuple[str, list[str]]:
    """Return whether the adapter that was kept is better than the base, as a word and as sentences.

    If no score is clear, it is compared by ``measure``, loss or perplexity.
    """
    differences = {name: measured.difference for name, measured in comparison.items()}
    is_clear = {name: interval.low > 0 or interval.high < 0 for name, interval in differences.items()}
    metric = next(iter(find_scores(comparison)), measure)
    if not is_clear.get(metric) and is_clear.get(measure):  # the same answers may have become likelier
        metric = measure
    if metric not in differences or math.isnan(differences[metric].value):
        return "", []
    difference = differences[metric]
    text = format_interval(difference, is_share(metric), "+", 3).replace("-", "−")
    unit = " points" if is_share(metric) else ""
    level = "" if math.isnan(difference.low) else " (95 % interval)"
    direction = "better" if (difference.value < 0) == (metric == measure) else "worse"
    outcome = direction if is_clear[metric] else "not clearly better"
    return outcome, [
        f"The adapter that was kept is {outcome} than the base: {describe_metric(metric)} {text}{unit}{level} "
        f"on {rows}."
    ]
