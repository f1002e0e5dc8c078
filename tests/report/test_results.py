"""What the page of a run says: the first screen, whether it learned, base against adapter, and what comes next."""

import pytest

from qlora_lightning.report import Run, read_run, render_report
from tests.markup import Reader
from tests.report.conftest import CONFIG, EVALUATION, MANIFEST, write_adapter


def read_page(run):
    """The sentences of a run's page, its commands, and all of it."""
    page = Reader(render_report([run]))
    commands = [text for text in page.texts("td") if text.startswith("qlora-lightning ")]
    return [text for text in page.texts("p") if text.strip()], commands, page


def result_of(page, name):
    """The cell beside a name in the first table that has it."""
    cells = page.texts("td")
    return cells[cells.index(name) + 1]


def make(folder, status="finished", reproduce=MANIFEST["reproduce"], config=CONFIG, **files):
    manifest = {**MANIFEST, "command": "", "reproduce": reproduce, "progress": {}}
    return Run(folder=folder, name="a", status=status, manifest=manifest, config=config, **files)


def sides(base, adapter, low=None, high=None):
    difference = {"value": adapter - base, "low": low, "high": high}
    return {"base": {"value": base}, "adapter": {"value": adapter}, "difference": difference}


def test_the_first_screen_answers_what_it_learned_what_it_cost_and_what_comes_next(make_run):
    scored = {"numeric_match": sides(0.02, 0.25, 0.2, 0.3), "forgetting_loss": sides(2.31, 2.34)}
    metrics = EVALUATION["metrics"] | scored
    evaluation = {**EVALUATION, "metrics": metrics, "scores": ["numeric_match"], "rows": 7}
    folder = make_run(evaluation=evaluation, config={**CONFIG, "data": {**CONFIG["data"], "test": "test.jsonl"}})
    sentences, commands, page = read_page(read_run(folder))
    assert "LoRA of rank 8 on package:tiny, trained on 12 rows of rows.jsonl." in page.text
    assert "loss on other text2.31002.3400+0.0300" in page.text  # cells of a row
    results = {"validation loss": "0.4500", "numeric match": "25.0%", "optimizer steps": "20", "tokens/s, median": "60"}
    results |= {"peak memory": "1.25\u00a0GiB", "wall time, h:mm:ss": "0:01:30"}
    assert {name: result_of(page, name) for name in results} == results
    assert sentences == [
        "It learned: the validation loss fell from 2.000 of the base to 0.550 at step 20.",
        "The validation loss was still falling at the end: more steps may do better.",
        "The adapter that was kept is better than the base: numeric match +23.0 [20.0, 30.0] points (95 % interval) "
        "on 7 validation rows.",
    ]
    assert commands[:3] == [
        f"qlora-lightning chat --adapter {folder}/adapter",
        f"qlora-lightning evaluate --adapter {folder}/adapter --config {folder}/config.yaml --split test "
        f"--out {folder}-evaluated",
        f"qlora-lightning merge --adapter {folder}/adapter --out {folder}-merged --config {folder}/config.yaml",
    ]


@pytest.mark.parametrize(("status", "reproduce"), [("stopped", "fit"), ("failed", "fit"), ("stopped", None)])
def test_a_run_of_the_command_that_has_not_ended_is_resumed_in_its_folder_wherever_it_is(tmp_path, status, reproduce):
    run = make(tmp_path, status, reproduce)
    before = read_page(run)[1]
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.ckpt").touch()
    resume = f"qlora-lightning fit --config {tmp_path}/config.yaml --ckpt_path last"
    assert read_page(run)[1] == [resume] * bool(reproduce) + before


ALL, NO_MERGE, NO_TALK, AGAIN = ["chat", "evaluate", "merge"], ["chat", "evaluate"], ["evaluate"], ["fit"]
HIGHER = [*AGAIN, *NO_TALK]


@pytest.mark.parametrize(
    ("losses", "measured", "follows", "words"),
    [
        ([1.0, 0.5, 0.8], sides(2.0, 1.8, -0.3, 0.1), ALL, ["rose again, to 0.800", "not clearly better"]),
        ([2.5, 2.4], sides(2.4, 2.5, 0.05, 0.2), NO_TALK, ["It did not learn", "base: loss +0.100"]),
        ([2.5, 2.49], sides(2.5, 2.49, -0.1, 0.1), HIGHER, ["did not fall clearly"]),  # by less than 2 %
        ([2.5, 2.49], sides(2.5, 2.49, -0.02, -0.01), ALL, ["It learned a little", "kept is better than the base"]),
        ([2.5, 2.4], sides(2.0, 2.4, 0.3, 0.5), AGAIN, ["ended at 2.400, above 2.000, that of the base"]),
        ([1.0, 0.5, 3.8], sides(2.0, 0.5, -1.6, -1.4), AGAIN, ["ended at 3.800, above 2.000", "kept is better"]),
        ([1.5, 1.4, 1.6], sides(2.0, 1.4, -0.7, -0.5), ALL, ["rose again, to 1.600", "kept is better"]),
        ([2.0, 0.5], sides(2.0, 2.2, 0.1, 0.3), NO_TALK, ["It learned", "kept is worse than the base"]),
        ([1.0, 0.9, 2.6], None, AGAIN, ["ended at 2.600, above 1.000, its first"]),
        ([0.002, 0.001, 0.004], None, ALL, ["rose again"]),
        ([], sides(2.0, 1.5, -0.6, -0.4), ALL, ["to 1.500 at step 10.", "−0.500 [−0.600, −0.400] (95 % interval)"]),
        ([0.4, 0.399], None, NO_MERGE, ["not known: the loss at its start", "below 0.400, its first"]),
        ([], None, NO_MERGE, ["not known"]),
        ([2.5, 2.4], sides(2.5, 2.51), ALL, ["is not clearly better"]),  # one row has no interval
    ],
)
def test_a_run_is_judged_by_its_last_and_best_losses_and_by_the_base(tmp_path, losses, measured, follows, words):
    """Only one that learned is merged; one that diverged, or did not learn, is started again."""
    metrics = {"train_loss": [(10, 1.0)], "learning_rate": [(1, 5e-4), (2, 1e-3)]}
    metrics["val_loss"] = [(10 * step, value) for step, value in enumerate(losses, start=1)]
    evaluation = {"metrics": {"loss": measured}, "rows": 5} if measured else {}
    write_adapter(tmp_path)
    sentences, commands, _ = read_page(make(tmp_path, metrics=metrics, evaluation=evaluation))
    assert [each for each in words if each not in " ".join(sentences)] == []
    assert [command.split()[1] for command in commands] == [*follows, "fit"]  # the last repeats the run
    rates = [command.rpartition(" --model.learning_rate ")[2] for command in commands if " --model." in command]
    assert rates == {"fit": ["0.0003"], "fit evaluate": ["0.003"]}.get(" ".join(follows), [])


def test_a_run_of_another_loss_is_judged_by_its_likelihoods_if_it_tells_them(tmp_path):
    """Such as a value head, whose error falls while perplexity rises."""
    metrics = {"val_loss": [(10, 124.2), (20, 92.6)], "val_perplexity": [(10, 60.0), (20, 70.0)]}
    measured = {"loss": sides(124.2, 92.6, -32.0, -31.0), "perplexity": sides(60.0, 70.0, 8.0, 12.0)}
    first, second = read_page(make(tmp_path, metrics=metrics, evaluation={"metrics": measured, "rows": 5}))[0]
    what = "negative log-likelihood of the validation rows"
    assert first == f"It did not learn: the {what} did not fall clearly below 4.094 of the base."
    assert second.startswith("The adapter that was kept is worse than the base: perplexity +10.000")
    metrics["val_perplexity"] = [(10, 60.0), (20, 30.0)]
    first, *_ = read_page(make(tmp_path, metrics=metrics, evaluation={}))[0]
    assert first.startswith(f"It learned: the {what} fell from 4.094 to 3.401")


def test_a_scripts_run_is_told_no_command_that_needs_a_config(tmp_path):
    write_adapter(tmp_path)
    run = make(tmp_path, reproduce=None, config={}, metrics={"val_loss": [(10, 2.0), (20, 0.5)]})
    commands = read_page(run)[1]
    assert [command.split()[1] for command in commands] == ["chat", "merge"]
    assert not any("config.yaml" in command for command in commands)


def test_a_run_that_continues_an_adapter_is_not_judged_by_the_base(tmp_path):
    config = {**CONFIG, "model": {**CONFIG["model"], "adapter": "runs/earlier"}}
    metrics, loss = {"val_loss": [(10, 0.5), (20, 0.6)]}, sides(2.0, 0.5, -1.6, -1.4)
    first, second = read_page(make(tmp_path, config=config, metrics=metrics, evaluation={"metrics": {"loss": loss}}))[0]
    assert first.startswith("Whether it learned is not known: the loss at its start")
    assert second.startswith("The adapter that was kept is better than the base: loss −1.500")


OVERFITTED = {"val_loss": [(10, 1.0), (20, 1.01), (30, 1.06)], "train_loss": [(n, 2.0 - n / 20) for n in range(30)]}
TO_10, TO_9, TO_40 = (
    f"It diverged: the training loss rose from {losses}. A lower learning rate may do."
    for losses in ("5.500 to 10.800", "1.000 to 9.000", "2.100 to 40.000")
)


@pytest.mark.parametrize(
    ("metrics", "loss", "sentence"),
    [
        (OVERFITTED, sides(2.1, 1.0, -1.2, -1.0), "It learned: the validation loss fell from 2.100 of the base to 1.0"),
        ({"train_loss": [(1, 5.5), (2, 30.4), (3, 10.8)]}, None, TO_10),
        ({"train_loss": [(step, 1.0 if step < 20 else 9.0) for step in range(1, 31)]}, None, TO_9),
        ({"train_loss": [(1, 2.1), (2, 2.0), (3, 40.0)]}, None, TO_40),
        ({"val_loss": [(2, 2.0), (9, 0.5)]}, sides(2.0, 0.5, -1.6, -1.4), "Too short to judge: 9 optimizer steps, and"),
    ],
)
def test_overfitting_is_no_divergence_and_a_training_loss_may_show_one(tmp_path, metrics, loss, sentence):
    evaluation = {"metrics": {"loss": loss}, "rows": 5} if loss else {}
    first, *others = read_page(make(tmp_path, metrics=metrics, evaluation=evaluation))[0]
    assert first.startswith(sentence)
    assert bool(others) == (metrics is OVERFITTED)


@pytest.mark.parametrize("is_own", [True, False])
def test_what_evaluate_wrote_is_not_taken_for_the_fits_own_evaluation(make_run, is_own):
    metrics = {"loss": sides(1.0, 0.3), "token_accuracy": sides(0.5, 0.8), "exact_match": sides(0.5, 0.75)}
    evaluation = {"metrics": metrics, "rows": 3, "samples": [{"adapter": "x"}]}
    run = read_run(make_run(evaluation=evaluation if is_own else evaluation | {"adapters": {"adapter": "b/adapter"}}))
    sentences, _, page = read_page(run)
    assert result_of(page, "validation loss") == ("0.3000" if is_own else "0.5500")
    assert ("exact match" in page.text) == is_own
    assert ("Before and after" in page.text) == ("Samples" in page.text) == is_own
    assert any("than the base" in sentence for sentence in sentences) == is_own
