"""What a report finds: the first screen, base against adapter with intervals, and runs compared only if they can be."""

from dataclasses import replace
from pathlib import Path

import pytest

from qlora_lightning.report import Run, read_run
from qlora_lightning.report.figures import comparison_table, figure_table, find_figures, find_samples
from qlora_lightning.report.sections import describe_run, headline, next_steps
from qlora_lightning.report.verdict import Verdict, judge
from tests.report.conftest import CONFIG, EVALUATION, MANIFEST


def make(**files):
    return Run(folder=Path("a"), name="a", status="finished", **files)


def sides(base, adapter, low=None, high=None):
    difference = {"value": adapter - base, "low": low, "high": high}
    return {"base": {"value": base}, "adapter": {"value": adapter}, "difference": difference}


def test_the_first_screen_answers_what_it_learned_what_it_cost_and_what_comes_next(make_run):
    metrics = EVALUATION["metrics"] | {"numeric_match": sides(0.02, 0.25, 0.2, 0.3)}
    evaluation = {**EVALUATION, "metrics": metrics, "scores": ["numeric_match"], "rows": 7}
    folder = make_run(evaluation=evaluation, config={**CONFIG, "data": {**CONFIG["data"], "test": "test.jsonl"}})
    run = read_run(folder)
    assert describe_run(run) == "LoRA of rank 8 on package:tiny, trained on rows.jsonl (12 rows)."
    assert headline(run) == [
        ("2.000 → 0.450", "validation loss, base\u00a0→\u00a0adapter"),
        ("2% → 25%", "numeric match, base\u00a0→\u00a0adapter"),
        ("20 of 40", "optimizer steps"),
        ("0:01:30", "wall time, h:mm:ss"),
        ("60", "tokens/s, median"),
        ("1.25\u00a0GiB", "peak memory"),
    ]
    verdict = judge(run)
    assert verdict.kind == "learned"
    assert verdict.sentences == [
        "It learned: the validation loss fell from 2.000 of the base to 0.550 at step 20.",
        "The validation loss was still falling at the end: more steps may do better.",
        "The adapter that was kept is better than the base: numeric match +23.0 [20.0, 30.0] points (95 % interval) "
        "on 7 validation rows.",
    ]
    assert [command for _, command in next_steps(run, verdict)] == [
        f"qlora-lightning chat --adapter {folder}/adapter",
        f"qlora-lightning evaluate --config {folder}/config.yaml --split test --out {folder}-evaluated",
        f"qlora-lightning merge --adapter {folder}/adapter --out {folder}-merged --config {folder}/config.yaml",
    ]


@pytest.mark.parametrize(
    ("status", "command", "kind", "commands"),
    [
        ("stopped", "qlora-lightning fit --config a.yaml", "unknown", ["RESUME"]),
        ("failed", "qlora-lightning fit --config a.yaml --ckpt_path last", "learned", ["RESUME"]),
        ("stopped", "python train.py", "learned", []),
        ("finished", "", "unknown", ["qlora-lightning chat", "qlora-lightning evaluate"]),
        ("finished", "", "worse", ["qlora-lightning chat", "qlora-lightning evaluate"]),
        ("finished", "", "diverged", ["qlora-lightning fit --config runs/a/config.yaml --model.learning_rate 0.0003"]),
    ],
)
def test_what_follows_is_of_status_and_verdict_and_a_diverged_run_is_never_merged(
    status, command, kind, commands, tmp_path
):
    run = replace(make(manifest={**MANIFEST, "command": command}, config=CONFIG), status=status, folder=tmp_path)
    run = replace(run, metrics={"learning_rate": [(1.0, 5e-4), (2.0, 1e-3)]})
    if "RESUME" in commands:
        assert next_steps(run, Verdict(kind, [])) == []  # from nothing
        (tmp_path / "checkpoints").mkdir()
        (tmp_path / "checkpoints" / "last.ckpt").touch()
    found = [command for _, command in next_steps(run, Verdict(kind, []))]
    commands = [each.replace("RESUME", "qlora-lightning fit --config a.yaml --ckpt_path last") for each in commands]
    assert len(found) == len(commands)
    assert all(own.startswith(expected) for own, expected in zip(found, commands, strict=True))


@pytest.mark.parametrize(
    ("losses", "measured", "kind", "words"),
    [
        ([1.0, 0.5, 0.8], sides(2.0, 1.8, -0.3, 0.1), "learned", ["rose again, to 0.800", "not clearly better"]),
        ([2.5, 2.4], sides(2.4, 2.5, 0.05, 0.2), "worse", ["It did not learn", "base: loss +0.100"]),
        ([2.5, 2.49], sides(2.5, 2.49, -0.1, 0.1), "not learned", ["did not fall clearly"]),  # by less than 2 %
        ([2.5, 2.5], sides(2.5, 2.5, -0.1, 0.1), "not learned", ["did not fall clearly below 2.500 of the base"]),
        ([2.5, 2.4], sides(2.0, 2.4, 0.3, 0.5), "diverged", ["ended at 2.400, above 2.000, that of the base"]),
        ([1.0, 0.5, 3.8], sides(2.0, 0.5, -1.6, -1.4), "diverged", ["ended at 3.800, above 2.000", "kept is better"]),
        ([1.5, 1.4, 1.6], sides(2.0, 1.4, -0.7, -0.5), "learned", ["rose again, to 1.600", "kept is better"]),
        ([1.0, 0.9, 2.6], None, "diverged", ["ended at 2.600, above 1.000, its first"]),
        ([0.002, 0.001, 0.004], None, "learned", ["rose again"]),
        ([], sides(2.0, 1.5, -0.6, -0.4), "unknown", ["not known", "loss −0.500 [−0.600, −0.400] (95 % interval)"]),
        ([0.4], None, "unknown", ["not known"]),
    ],
)
def test_a_run_is_judged_by_its_last_and_best_losses_and_by_the_base(losses, measured, kind, words):
    points = [(10 * step, value) for step, value in enumerate(losses, start=1)]
    evaluation = {"metrics": {"loss": measured}, "rows": 5} if measured else {}
    verdict = judge(make(metrics={"val_loss": points, "train_loss": [(10, 1.0)]}, evaluation=evaluation))
    assert verdict.kind == kind
    assert all(each in " ".join(verdict.sentences) for each in words)


def test_a_run_that_learned_its_training_rows_too_well_did_not_diverge():
    losses = {
        "val_loss": [(10, 1.0), (20, 1.01), (30, 1.06)],
        "train_loss": [(step, 2.0 - step / 20) for step in range(30)],
    }
    verdict = judge(make(metrics=losses, evaluation={"metrics": {"loss": sides(2.1, 1.0, -1.2, -1.0)}, "rows": 5}))
    assert verdict.kind == "learned"
    assert "rose again, to 1.060" in " ".join(verdict.sentences)


def test_a_training_loss_alone_may_show_divergence_and_a_few_steps_show_nothing():
    blown = judge(make(metrics={"train_loss": [(1, 5.5), (2, 30.4), (3, 10.8)]}))
    assert blown.sentences == [
        "It diverged: the training loss rose from 5.500 to 10.800. A lower learning rate may do."
    ]
    losses = [(step, 1.0 if step < 20 else 9.0) for step in range(1, 31)]
    assert judge(make(metrics={"train_loss": losses})).sentences == [
        "It diverged: the training loss rose from 1.000 to 9.000. A lower learning rate may do."
    ]
    evaluation = {"metrics": {"loss": sides(2.0, 0.5, -1.6, -1.4)}, "rows": 5}
    verdict = judge(make(metrics={"val_loss": [(2, 2.0), (9, 0.5)]}, evaluation=evaluation))
    assert verdict == Verdict("unknown", ["Too short to judge: 9 optimizer steps, of at least 10."])
    short = judge(make(metrics={"train_loss": [(1, 2.1), (2, 2.0), (3, 40.0)]}))
    assert short.sentences == [
        "It diverged: the training loss rose from 2.100 to 40.000. A lower learning rate may do."
    ]


@pytest.mark.parametrize("is_own", [True, False])
def test_what_evaluate_wrote_is_not_taken_for_the_fits_own_evaluation(make_run, is_own):
    metrics = {"loss": sides(1.0, 0.3), "token_accuracy": sides(0.5, 0.8), "exact_match": sides(0.5, 0.75)}
    evaluation = {"metrics": metrics, "rows": 3, "samples": [{"adapter": "x"}]}
    run = read_run(make_run(evaluation=evaluation if is_own else evaluation | {"adapters": {"adapter": "b/adapter"}}))
    found = {name: figure.value for name, figure in find_figures(run).items()}
    assert found["val_loss"] == pytest.approx(0.3 if is_own else 0.55)
    assert (found.get("exact_match"), found.get("token_accuracy")) == ((0.75, 0.8) if is_own else (None, None))
    assert bool(find_samples(run)) == bool(comparison_table(run)[1]) == is_own
    assert any("than the base" in sentence for sentence in judge(run).sentences) == is_own


def test_runs_are_compared_by_what_is_known_of_them(make_run):
    headings, lines = figure_table([read_run(make_run("a")), read_run(make_run("d", status="running"))])
    assert headings == ["", "a", "d"]
    assert lines[0] == ["validation loss", "0.4500", "0.4500"]
    assert ["wall time, h:mm:ss", "0:01:30", "–"] in lines
