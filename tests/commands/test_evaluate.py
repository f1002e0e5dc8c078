"""``evaluate`` as a user runs it, on a tiny base."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from qlora_lightning.cli import main
from tests.adapters import make_adapter
from tests.help_examples import help_examples

CONFIG = {
    "seed_everything": 3,
    "model": {"base": "tiny", "rank": 2, "compute_dtype": "fp32", "learning_rate": 0.03, "warmup_ratio": 0.0},
    "data": {"train": "rows.jsonl", "val": ["rows.jsonl", "events.jsonl"], "batch_size": 4},
    "evaluation": {"rows": 3, "max_new_tokens": 3, "scores": ["chrf", "exact_match"], "samples": 2},
    "trainer": {
        "accelerator": "cpu",
        "max_steps": 4,
        "limit_val_batches": 2,
        "enable_progress_bar": False,
        "default_root_dir": "runs/quickstart",
    },
}
EVENTS = [
    {"instruction": f"Note {word}.", "output": json.dumps({"what": word}), "kind": word[0]}
    for word in ("lunch", "dinner", "dance", "lecture")
]


@pytest.fixture(scope="module")
def trained(tiny_base, tmp_path_factory):
    """A folder with a run, two more adapters on its base, and rows."""
    folder = tmp_path_factory.mktemp("trained")
    rows = [{"instruction": f"Count to {n}.", "output": " ".join(map(str, range(n)))} for n in range(1, 9)]
    for name, content in {"rows": rows, "events": EVENTS, "more": rows[:3]}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    (folder / "configs").mkdir()
    (folder / "configs" / "quickstart.yaml").write_text(yaml.safe_dump(CONFIG))
    (folder / "tiny").symlink_to(tiny_base)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["fit", "--config", "configs/quickstart.yaml"]) == 0
        make_adapter(folder / "runs/b/adapter", "tiny", target_modules="attention", std=0.5)
    shutil.copytree(folder / "runs/quickstart/adapter", folder / "runs/a/adapter")
    shutil.copy(folder / "runs/quickstart/config.yaml", folder / "runs/b")
    return folder


@pytest.fixture
def evaluate(trained, tmp_path, monkeypatch, capsys):
    """Run the command in a copy of that folder; gives what it printed and the figures that it wrote."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True, symlinks=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "140")

    def run(*arguments, config="runs/quickstart/config.yaml"):
        named = ["--config", config] if config else []
        assert main(["evaluate", *named, "--json", "f.json", "--force", *arguments]) == 0
        return capsys.readouterr().out, json.loads(Path("f.json").read_text())

    return run


@pytest.mark.parametrize("arguments", help_examples("evaluate"), ids=" ".join)
def test_the_examples_of_help_run(arguments, evaluate, tmp_path, capsys):
    assert main([*arguments, "--max-new-tokens", "2"]) == 0
    assert "with 95 % intervals" in capsys.readouterr().out
    assert (tmp_path / "judged" / "predictions.jsonl").exists() == ("--out" in arguments)


def test_figures_and_predictions_agree(evaluate, tmp_path):
    _, figures = evaluate("--rows", "5", "--out", "judged")
    assert figures == json.loads((tmp_path / "judged" / "evaluation.json").read_text())
    lines = [json.loads(line) for line in (tmp_path / "judged" / "predictions.jsonl").read_text().splitlines()]
    assert figures["rows"] == figures["answered_rows"] == len(lines) == 5
    assert sorted(figures["hardest"]) == [0, 1, 2, 3, 4]
    assert [line["row"] for line in lines] == figures["hardest"]
    for side in ("base", "adapter"):
        scores = [line[side]["scores"]["chrf"] for line in lines]
        assert figures["metrics"]["chrf"][side]["value"] == pytest.approx(sum(scores) / 5)
    assert scores == sorted(scores)
    for line in lines:
        assert line["place"] == f"rows.jsonl:{line['row'] + 1}"
        assert f"Count to {line['row'] + 1}." in line["prompt"]
    assert figures["metrics"]["loss"]["difference"]["value"] < 0  # it was trained on these rows
    assert figures["adapters"] == {"adapter": "runs/quickstart/adapter"}


def test_a_config_gives_the_figures_of_the_end_of_its_fit(evaluate):
    fitted = json.loads(Path("runs/quickstart/evaluation.json").read_text())
    _, again = evaluate()
    for key in ("rows", "answered_rows", "max_new_tokens", "scores", "samples"):
        assert again[key] == fitted[key]
    assert (again["rows"], again["answered_rows"]) == (8, 3)
    for name, found in fitted["metrics"].items():
        for side, interval in found.items():
            known = {key: value for key, value in interval.items() if value is not None}
            assert {key: again["metrics"][name][side][key] for key in known} == pytest.approx(known, 1e-5, 1e-7), name
    _, typed = evaluate("--rows", "9", "--scores", "exact_match", "--max-new-tokens", "2", "--show", "1")
    assert (typed["rows"], typed["answered_rows"], typed["max_new_tokens"]) == (9, 9, 2)
    assert (typed["scores"], len(typed["samples"])) == (["exact_match"], 1)


def test_an_adapter_folder_takes_the_place_of_a_config(evaluate, tmp_path, capsys, monkeypatch):
    few = ("--rows", "4", "--max-new-tokens", "2")
    _, named = evaluate(*few, "--adapter", "runs/b/adapter", config="runs/b/config.yaml")
    assert evaluate(*few, "--adapter", "runs/b", config=None)[1] == named
    shutil.copytree("runs/b/adapter", "elsewhere/b")
    assert main(["evaluate", "--adapter", "elsewhere/b"]) == 2
    assert "Nothing names the rows: there is no config.yaml beside the adapter folder" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path / "elsewhere")
    _, alone = evaluate(*few, "--adapter", "b", "--data.val", "../rows.jsonl", "--model.base", "../tiny", config=None)
    assert alone["metrics"]["loss"] == named["metrics"]["loss"]


def test_several_adapters_are_each_evaluated_as_alone(evaluate, capsys):
    few = ("--rows", "5", "--max-new-tokens", "3")
    alone = {name: evaluate(*few, "--adapter", f"runs/{name}/adapter")[1]["metrics"] for name in ("quickstart", "b")}
    out, both = evaluate(*few, "--adapter", "runs/quickstart/adapter", "--adapter", "b.2=runs/b/adapter")
    assert list(both["adapters"]) == ["quickstart", "b.2"]
    for metric, found in both["metrics"].items():
        for given, name in (("quickstart", "quickstart"), ("b.2", "b")):
            one = alone[name][metric]
            assert found[given]["value"] == pytest.approx(one["adapter"]["value"], rel=1e-5)
            assert found["differences"][given]["value"] == pytest.approx(one["difference"]["value"], 1e-4, 1e-6)
    assert alone["quickstart"]["loss"]["adapter"] != alone["b"]["loss"]["adapter"]
    assert "Differences from the base" in out
    out, _ = evaluate(*few, "--adapter", "runs/b", "--adapter", "runs/a", config=None)
    assert "Config, rows and limits are those of runs/b/adapter" in out


def test_data_sets_and_groups_have_tables_of_their_own(evaluate):
    out, found = evaluate("--rows", "12", "--group-by", "kind", "--scores", "auto")
    assert {name: part["rows"] for name, part in found["sources"].items()} == {"rows.jsonl": 8, "events.jsonl": 4}
    assert {name: part["rows"] for name, part in found["groups"].items()} == {"(none)": 8, "l": 2, "d": 2}
    assert {name: part["answered_rows"] for name, part in found["groups"].items()} == {"(none)": 8, "l": 2, "d": 2}
    assert "By data set" in out
    assert "By kind" in out


def test_json_answers_are_scored_as_json(evaluate):
    _, found = evaluate("--data.val", "events.jsonl", "--scores", "auto")
    assert found["scores"] == ["exact_match", "json_valid", "json_f1"]


def test_rows_held_out_of_the_training_rows_keep_their_places(evaluate, tmp_path):
    evaluate("--data.val=null", "--data.val_fraction=0.4", "--out", "judged")
    for line in map(json.loads, (tmp_path / "judged" / "predictions.jsonl").read_text().splitlines()):
        assert f"Count to {line['row'] + 1}." in line["prompt"]
        assert line["place"] == f"rows.jsonl:{line['row'] + 1}"


def test_rows_without_prompts_are_evaluated_by_their_loss(evaluate):
    _, found = evaluate("--data.train_on=all")
    assert found["metrics"].keys() == {"loss", "perplexity", "token_accuracy"}


def test_other_prompts_cut_answers_and_shortened_rows_are_reported(evaluate):
    out, _ = evaluate("--rows", "5")
    assert "Answers are cut at 3 tokens (--max-new-tokens): 5 of 5 of the base, 5 of 5 of adapter had not" in out
    assert "Warning" not in out
    assert "shortened" not in out
    out, _ = evaluate("--data.chat_template", "chatml", "--data.system", "Be brief.", "--data.max_length", "36")
    assert "adapter was trained with another chat template and another system prompt" in " ".join(out.split())
    assert "2 shortened" in out


def test_earlier_results_stay_unless_forced(evaluate, tmp_path, capsys):
    evaluate("--out", "judged")
    before = (tmp_path / "judged" / "evaluation.json").read_bytes()
    assert main(["evaluate", "--adapter", "runs/quickstart", "--out", "judged"]) == 2
    assert "judged/evaluation.json exists already" in capsys.readouterr().err
    assert (tmp_path / "judged" / "evaluation.json").read_bytes() == before
    evaluate("--out", "judged", "--rows", "2", "--force")
    assert json.loads((tmp_path / "judged" / "evaluation.json").read_text())["rows"] == 2


WRONG = {
    "--rows 0": "invalid PositiveInt value: '0'",
    "--split train": "invalid choice: 'train'",
    "--adapter nowhere": "nowhere is not an adapter folder",
    "--adapter base=runs/a/adapter": "'base' is taken",
    "--adapter x=runs/a/adapter --adapter x=runs/b/adapter": "'x' is taken",
    "--adapter =runs/a/adapter": "expected DIR or NAME=DIR",
    "--scores bleu": "There is no score 'bleu'",
    "--scores json_f1": "The score json_f1 needs JSON objects or arrays",
    "--json none/f.json": "the folder none does not exist",
    "--split test": "name a file in `data.test`",
    "--group-by colour": "no row of val has that column",
    "--trainer.default_root_dir empty": "There is no adapter in empty/adapter: pass --adapter DIR",
    "--trainer.limit_val_batches 0": "There are no val rows to evaluate: trainer.limit_val_batches is 0",
    "--model.quantization fp4": "Set model.quantization to nf4",
    "--modle.rank 3": "Did you mean model?",
}


@pytest.mark.parametrize("typed", WRONG)
def test_what_is_wrong_is_reported_in_one_line(typed, evaluate, capsys):
    assert main(["evaluate", "--config", "runs/quickstart/config.yaml", *typed.split()]) == 2
    message = capsys.readouterr().err.rpartition("qlora-lightning: ")[2]
    assert WRONG[typed] in message
    assert message.count("\n") == 1


def test_ctrl_c_leaves_nothing_half_written(evaluate, tmp_path, monkeypatch, capsys):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("qlora_lightning.evaluation.judge.judge_answer", interrupt)
    assert main(["evaluate", "--adapter", "runs/quickstart", "--out", "judged", "--json", "f.json"]) == 130
    assert not list((tmp_path / "judged").iterdir())
    assert not (tmp_path / "f.json").exists()
