"""``evaluate`` as a user runs it, on a tiny base."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from qlora_lightning.cli import main
from tests.commands.conftest import help_examples, read_predictions


@pytest.fixture
def evaluate(trained, tmp_path, monkeypatch, capsys):
    """Run the command in that folder; return what it printed and the figures that it wrote."""
    monkeypatch.chdir(trained)
    monkeypatch.setenv("COLUMNS", "140")

    def run(*arguments, config="runs/quickstart/config.yaml"):
        named = ["--config", config] if config else []
        file = tmp_path / "figures.json"
        assert main(["evaluate", *named, "--json", str(file), "--force", *arguments]) == 0
        return capsys.readouterr().out, json.loads(file.read_text())

    return run


@pytest.mark.parametrize("arguments", help_examples("evaluate"), ids=" ".join)
def test_the_examples_of_help_run(arguments, evaluate, trained, capsys):
    shutil.rmtree(trained / "evaluated", ignore_errors=True)
    assert main([*arguments, "--max-new-tokens", "2"]) == 0
    assert "with 95 % intervals" in capsys.readouterr().out
    assert (trained / "evaluated" / "predictions.jsonl").exists() == ("--out" in arguments)


def test_figures_and_predictions_agree_in_all_and_by_data_set(evaluate, tmp_path):
    out, figures = evaluate("--rows", "10", "--out", str(tmp_path / "out"))
    assert figures == json.loads((tmp_path / "out" / "evaluation.json").read_text())
    lines = read_predictions(tmp_path / "out")
    assert figures["rows"] == figures["answered_rows"] == len(lines) == 10
    assert sorted(figures["hardest"]) == [0, 1, 2, 3, 4, 6, 7, 8, 9, 11]  # of twelve, of which four are of another file
    assert [line["row"] for line in lines] == figures["hardest"]
    for side in ("base", "adapter"):
        scores = [line[side]["scores"]["chrf"] for line in lines]
        assert figures["metrics"]["chrf"][side]["value"] == pytest.approx(sum(scores) / 10)
    assert scores == sorted(scores)
    assert figures["labelled_tokens"] == sum(line["base"]["labelled_tokens"] for line in lines)
    # a sample's prompt has no control tokens
    shown = [(sample["prompt"].rpartition("\nuser\n")[2], sample["expected"]) for sample in figures["samples"]]
    assert shown == [("Count to 1.\nassistant", "0"), ("Count to 2.\nassistant", "0 1")]
    assert all(line["prompt"].startswith("<|im_start|>system") for line in lines)
    duel = figures["comparisons"]["adapter"]
    assert (duel["score"], len(duel["wins"]) + len(duel["losses"]) + duel["ties"]) == ("chrf", 10)
    of_a_side = {"answer", "loss", "scores", "labelled_tokens", "correct_tokens", "stopped", "answer_tokens"}
    assert {key for line in lines for key in line["adapter"]} == of_a_side
    for line in lines:
        row = line["row"]
        assert line["place"] == (f"rows.jsonl:{row + 1}" if row < 8 else f"events.jsonl:{row - 7}")
        assert (f"Count to {row + 1}." if row < 8 else "Note") in line["prompt"]
    assert figures["metrics"]["loss"]["difference"]["value"] < 0  # it was trained on these rows
    assert figures["adapters"] == {"adapter": "runs/quickstart/adapter"}
    assert {name: part["rows"] for name, part in figures["sources"].items()} == {"rows.jsonl": 7, "events.jsonl": 3}
    for title in ("10 validation rows, answers", "7 validation rows of rows.jsonl"):
        assert title in out
    assert "of at most 3 tokens" in out
    assert "rows trained on too, so val_loss is too good: rows.jsonl:1 = " in out
    assert "Warning" not in out


def test_a_config_gives_the_figures_of_the_end_of_its_fit(evaluate):
    fitted = json.loads(Path("runs/quickstart/evaluation.json").read_text())
    out, again = evaluate()
    for key in ("rows", "answered_rows", "max_new_tokens", "scores", "samples", "comparisons"):
        assert again[key] == fitted[key]
    assert (again["rows"], again["answered_rows"]) == (8, 3)
    assert "shortened" not in out
    for name, found in fitted["metrics"].items():
        for side, interval in found.items():
            known = {key: value for key, value in interval.items() if value is not None}
            assert {key: again["metrics"][name][side][key] for key in known} == pytest.approx(known, 1e-5, 1e-7), name


def test_options_beat_the_config_and_json_answers_are_scored_as_json(evaluate):
    options = ("--rows", "3", "--scores", "auto", "--max-new-tokens", "2", "--show", "1")
    _, found = evaluate("--data.val", "events.jsonl", *options)
    assert (found["rows"], found["answered_rows"], found["max_new_tokens"]) == (3, 3, 2)
    assert (found["scores"], len(found["samples"])) == (["exact_match", "json_valid", "json_f1"], 1)


def test_an_adapter_folder_takes_the_place_of_a_config(evaluate, trained, tmp_path, capsys, monkeypatch):
    few = ("--rows", "4", "--max-new-tokens", "2", "--scores", "chrf, exact_match")
    _, named = evaluate(*few, "--adapter", "runs/b/adapter", config="runs/b/config.yaml")
    assert named["scores"] == ["chrf", "exact_match"]
    assert evaluate(*few, "--adapter", "runs/b", config=None)[1] == named
    shutil.copytree("runs/b/adapter", tmp_path / "b")
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", "--adapter", "b"]) == 2
    assert "Nothing names the rows: there is no config.yaml beside the adapter folder" in capsys.readouterr().err
    rows = json.dumps([str(trained / "rows.jsonl"), str(trained / "events.jsonl")])
    _, alone = evaluate(*few, "--adapter", "b", f"--data.val={rows}", f"--model.base={trained / 'tiny'}", config=None)
    assert alone["metrics"]["loss"] == named["metrics"]["loss"]


def test_the_config_beside_an_adapter_says_which_answers_count(evaluate, tmp_path):
    config = yaml.safe_load(Path("runs/b/config.yaml").read_text())
    config["data"] = {"val": "rows.jsonl", "drop_answers": ["0"]}  # the first row's
    run = shutil.copytree("runs/b", tmp_path / "run")
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    _, found = evaluate("--adapter", str(run), "--evaluation.rows", "0", config=None)
    assert found["rows"] == 7


@pytest.mark.slow
def test_several_adapters_are_each_evaluated_as_alone(evaluate):
    few = ("--rows", "5", "--max-new-tokens", "3")
    alone = {name: evaluate(*few, "--adapter", f"runs/{name}/adapter")[1]["metrics"] for name in ("quickstart", "b")}
    out, both = evaluate(*few, "--adapter", "runs/quickstart/adapter", "--adapter", "b.2=runs/b/adapter", config=None)
    assert "Config, rows and limits are those of runs/quickstart/adapter" in out
    assert "b.2 − base" in out
    assert list(both["adapters"]) == ["quickstart", "b.2"]
    for metric, found in both["metrics"].items():
        for given, name in (("quickstart", "quickstart"), ("b.2", "b")):
            one = alone[name][metric]
            assert found[given]["value"] == pytest.approx(one["adapter"]["value"], rel=1e-5)
            assert found["differences"][given]["value"] == pytest.approx(one["difference"]["value"], 1e-4, 1e-6)
    assert alone["quickstart"]["loss"]["adapter"] != alone["b"]["loss"]["adapter"]


def test_other_prompts_and_shortened_rows_are_reported(evaluate):
    out, _ = evaluate("--data.chat_template", "chatml", "--data.system", "Be brief.", "--data.max_length", "36")
    assert "adapter was trained with another data.chat_template and data.system" in out
    assert "2 shortened" in out


def test_rows_without_a_prompt_of_their_own_have_losses_only_and_no_more_are_answered_than_asked(evaluate, tmp_path):
    evaluate("--data.train_on", "all", "--out", str(tmp_path / "all"))
    for line in read_predictions(tmp_path / "all"):
        assert ("prompt" in line, line["adapter"]["answer"], line["adapter"]["loss"] > 0) == (False, None, True)
    evaluate("--out", str(tmp_path / "three"))
    lines = read_predictions(tmp_path / "three")
    assert {line["row"] for line in lines if line["adapter"]["answer"] is not None} == {0, 3, 7}
    assert len(lines) == 8


def test_earlier_results_stay_unless_forced(evaluate, tmp_path, capsys):
    (tmp_path / "evaluation.json").write_text("{}")
    named = ["evaluate", "--adapter", "runs/quickstart", "--rows", "2", "--out", str(tmp_path)]
    assert main(named) == 2
    assert "evaluation.json exists already" in capsys.readouterr().err
    assert (tmp_path / "evaluation.json").read_text() == "{}"
    assert main([*named, "--force"]) == 0
    assert json.loads((tmp_path / "evaluation.json").read_text())["rows"] == 2
