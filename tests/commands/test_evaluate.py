"""The command as a user runs it, on a tiny base."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from qlora_lightning.cli import main
from qlora_lightning.commands.evaluate import _parser

CONFIG = {
    "seed_everything": 3,
    "model": {"base": "tiny", "rank": 2, "compute_dtype": "fp32", "learning_rate": 0.03, "warmup_ratio": 0.0},
    "data": {"train": "rows.jsonl", "val": ["rows.jsonl", "events.jsonl"], "batch_size": 4},
    "evaluation": {"enabled": False},
    "trainer": {
        "accelerator": "cpu",
        "max_steps": 4,
        "enable_progress_bar": False,
        "default_root_dir": "runs/quickstart",
    },
}
EVENTS = [
    {"instruction": f"Note {word}.", "output": json.dumps({"what": word}), "kind": word[0]}
    for word in ("lunch", "dinner", "dance", "lecture")
]
RUN = ["evaluate", "--config", "runs/quickstart/config.yaml"]


@pytest.fixture(scope="module")
def trained(tiny_base, tmp_path_factory):
    """A folder with a run, its adapter under other names too, and rows."""
    folder = tmp_path_factory.mktemp("trained")
    rows = [{"instruction": f"Count to {n}.", "output": " ".join(map(str, range(n)))} for n in range(1, 9)]
    for name, content in {"rows": rows, "events": EVENTS, "more": rows[:3]}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    (folder / "configs").mkdir()
    (folder / "taken" / "evaluation.json").mkdir(parents=True)
    (folder / "configs" / "quickstart.yaml").write_text(yaml.safe_dump(CONFIG))
    (folder / "tiny").symlink_to(tiny_base)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["fit", "--config", "configs/quickstart.yaml"]) == 0
        other = ["--trainer.default_root_dir=runs/b", "--model.rank=4", "--model.target_modules=attention"]
        assert main(["fit", "--config", "configs/quickstart.yaml", *other]) == 0
    shutil.copytree(folder / "runs/quickstart", folder / "runs/a")
    return folder


@pytest.fixture
def run(trained, tmp_path, monkeypatch, capsys):
    """Run the command in a copy of that folder; gives what it printed."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True, symlinks=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "140")

    def run(*arguments, code=0):
        capsys.readouterr()
        assert main([*RUN, "--rows", "5", "--max-new-tokens", "3", *arguments]) == code
        captured = capsys.readouterr()
        return captured.err if code else captured.out

    return run


def examples():
    lines = [line.strip() for line in _parser().format_help().splitlines()]
    return [line for line in lines if line.startswith("qlora-lightning evaluate --")]


def test_help_answers_without_loading_anything(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", "--help"])
    assert stop.value.code == 0
    assert len(examples()) == 4


@pytest.mark.parametrize("line", examples())
def test_the_examples_of_help_run_as_they_stand(line, run, tmp_path, capsys):
    assert main([*line.split()[1:], "--max-new-tokens", "2"]) == 0
    out = capsys.readouterr().out
    assert "with 95 % intervals" in out
    assert "token accuracy" in out
    assert (tmp_path / "judged" / "predictions.jsonl").exists() == ("--out judged" in line)


def test_figures_and_predictions_are_written_and_agree(run, tmp_path):
    out = run("--out", "judged", "--json", "figures.json")
    figures = json.loads((tmp_path / "judged" / "evaluation.json").read_text())
    assert figures == json.loads((tmp_path / "figures.json").read_text())
    lines = [json.loads(line) for line in (tmp_path / "judged" / "predictions.jsonl").read_text().splitlines()]
    assert figures["rows"] == figures["answered_rows"] == len(lines) == 5
    assert sorted(line["row"] for line in lines) == [0, 1, 2, 3, 4]
    assert [line["row"] for line in lines] == figures["hardest"]
    for side in ("base", "adapter"):
        scores = [line[side]["scores"]["chrf"] for line in lines]
        assert figures["metrics"]["chrf"][side]["value"] == pytest.approx(sum(scores) / 5)
    assert scores == sorted(scores) or lines[0]["adapter"]["scores"]["exact_match"] <= 1  # the hardest first
    assert lines[0]["place"] == f"rows.jsonl:{lines[0]['row'] + 1}"
    assert "Count to" in lines[0]["prompt"]
    assert "judged/predictions.jsonl" in out
    assert figures["metrics"]["loss"]["difference"]["value"] < 0  # it was trained on these rows
    assert figures["adapters"] == {"adapter": "runs/quickstart/adapter"}


def test_a_config_judges_as_at_the_end_of_its_fit(run, tmp_path):
    section = {"rows": 3, "max_new_tokens": 3, "scores": ["chrf", "rouge_l"], "samples": 2}
    config = yaml.safe_load((tmp_path / "configs" / "quickstart.yaml").read_text()) | {"evaluation": section}
    config["trainer"] |= {"default_root_dir": "runs/c", "limit_val_batches": 2}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    assert main(["fit", "--config", "c.yaml"]) == 0
    fitted = json.loads((tmp_path / "runs" / "c" / "evaluation.json").read_text())
    assert main(["evaluate", "--config", "runs/c/config.yaml", "--json", "f.json"]) == 0
    again = json.loads((tmp_path / "f.json").read_text())
    for key in ("rows", "answered_rows", "max_new_tokens", "scores", "samples"):
        assert again[key] == fitted[key]
    assert (again["rows"], again["answered_rows"]) == (8, 3)
    for name, found in fitted["metrics"].items():
        for side, interval in found.items():
            interval = {key: value for key, value in interval.items() if value is not None}
            shown = {key: again["metrics"][name][side][key] for key in interval}
            assert shown == pytest.approx(interval, rel=1e-5, abs=1e-7), name
    # what is typed counts more
    typed = ["--rows", "9", "--scores", "exact_match", "--max-new-tokens", "2", "--show", "1"]
    assert main(["evaluate", "--config", "runs/c/config.yaml", "--json", "f.json", *typed]) == 0
    other = json.loads((tmp_path / "f.json").read_text())
    assert (other["rows"], other["answered_rows"], other["max_new_tokens"]) == (9, 9, 2)
    assert other["scores"] == ["exact_match"]
    assert len(other["samples"]) == 1


def test_an_adapter_folder_stands_for_the_config_of_its_run(run, tmp_path, capsys, monkeypatch):
    def judge(*arguments, code=0):
        capsys.readouterr()
        options = ["--rows", "4", "--max-new-tokens", "2", "--json", "f.json"]
        assert main(["evaluate", *options, *arguments]) == code
        return capsys.readouterr().err if code else json.loads((tmp_path / "f.json").read_text())

    named = judge("--config", "runs/b/config.yaml", "--adapter", "runs/b/adapter")
    assert judge("--adapter", "runs/b/adapter") == named
    assert judge("--adapter", "runs/b") == named
    alone = shutil.copytree(tmp_path / "runs" / "b" / "adapter", tmp_path / "elsewhere" / "b")
    err = judge("--adapter", str(alone), code=2)
    assert "Which rows? There is no config.yaml beside the adapter folder" in err
    assert err.count("\n") == 1
    found = judge("--adapter", str(alone), "--data.val", str(tmp_path / "rows.jsonl"))
    monkeypatch.chdir(tmp_path / "elsewhere")  # where the base's relative path leads nowhere
    assert main(["evaluate", "--adapter", "b", "--data.val", "../rows.jsonl", "--rows", "4", "--json", "g.json"]) == 0
    assert json.loads(Path("g.json").read_text())["metrics"]["loss"] == found["metrics"]["loss"]
    assert found["metrics"]["loss"]["adapter"]["value"] == pytest.approx(named["metrics"]["loss"]["adapter"]["value"])


def test_prompts_that_an_adapter_was_not_trained_on_are_told(run):
    words = "Warning: adapter was trained with another"
    assert words not in run()
    out = " ".join(run("--data.chat_template", "chatml", "--data.system", "Be [b]brief.").split())
    assert f"{words} chat template and another" in out  # without hashes, which tell nobody anything
    assert "and another system prompt (none there, 'Be [b]brief.' here)" in out
    assert "set data.chat_template and data.template_options and data.system as in its training." in out


def test_a_row_that_is_right_is_not_called_hard(run, monkeypatch):
    monkeypatch.setattr(
        "qlora_lightning.evaluation.judge.judge_answer", lambda answer, expected, scores: dict.fromkeys(scores, 1.0)
    )
    out = run()
    assert "Hard for" not in out
    assert "By exact match, adapter has all 5 answers right." in out


def test_several_adapters_of_other_shapes_are_judged_as_each_is_alone(run, tmp_path, capsys):
    alone = {}
    for name in ("quickstart", "b"):
        run("--adapter", f"runs/{name}/adapter", "--json", "f.json")
        alone[name] = json.loads((tmp_path / "f.json").read_text())["metrics"]
    out = run("--adapter", "runs/quickstart/adapter", "--adapter", "b.2=runs/b/adapter", "--json", "f.json")
    both = json.loads((tmp_path / "f.json").read_text())
    assert list(both["adapters"]) == ["quickstart", "b.2"]
    for metric, found in both["metrics"].items():
        for name, given in (("quickstart", "quickstart"), ("b", "b.2")):
            assert found[given]["value"] == pytest.approx(alone[name][metric]["adapter"]["value"], rel=1e-5)
            assert found["differences"][given]["value"] == pytest.approx(
                alone[name][metric]["difference"]["value"], rel=1e-4, abs=1e-6
            )
    assert alone["quickstart"]["loss"]["adapter"] != alone["b"]["loss"]["adapter"]
    assert "Differences from the base" in out
    assert "Config, rows and limits" not in out  # --config says which
    arguments = ["--adapter", "runs/b", "--adapter", "runs/a", "--rows", "2", "--max-new-tokens", "2"]
    assert main(["evaluate", *arguments]) == 0
    assert "Config, rows and limits are those of runs/b/adapter, the first adapter;" in capsys.readouterr().out
    assert "By exact match, quickstart is better on" in out


def test_data_sets_and_groups_have_tables_of_their_own(run, tmp_path):
    out = run("--rows", "12", "--group-by", "kind", "--json", "f.json")
    found = json.loads((tmp_path / "f.json").read_text())
    assert {name: part["rows"] for name, part in found["sources"].items()} == {"rows.jsonl": 8, "events.jsonl": 4}
    assert {name: part["rows"] for name, part in found["groups"].items()} == {"(none)": 8, "l": 2, "d": 2}
    assert {name: part["answered_rows"] for name, part in found["groups"].items()} == {"(none)": 8, "l": 2, "d": 2}
    assert "By data set" in out
    assert "By kind" in out
    assert "Of the 12 expected answers some are of another kind (4 with JSON)" in " ".join(out.split())


def test_json_answers_are_scored_as_json(run, tmp_path):
    run("--data.val", "events.jsonl", "--json", "f.json")
    assert json.loads((tmp_path / "f.json").read_text())["scores"] == ["exact_match", "json_valid", "json_f1"]


def test_rows_held_out_of_the_training_rows_are_judged_under_their_own_places(run, tmp_path):
    run("--data.val=null", "--data.val_fraction=0.4", "--out", "judged")
    lines = [json.loads(line) for line in (tmp_path / "judged" / "predictions.jsonl").read_text().splitlines()]
    for line in lines:
        assert line["place"] == f"rows.jsonl:{line['row'] + 1}"
        assert f"Count to {line['row'] + 1}." in line["prompt"]


def test_without_prompts_the_loss_alone_is_judged(run, tmp_path):
    run("--data.train_on=all", "--out", "judged")
    assert json.loads((tmp_path / "judged" / "evaluation.json").read_text())["metrics"].keys() == {
        "loss", "perplexity", "token_accuracy"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--rows", "0"], "--rows is 0: expected 1 or more."),
        (["--rows", "few"], "invalid int value: 'few'"),
        (["--split", "train"], "invalid choice: 'train'"),
        (["--adapter", "nowhere"], "nowhere is not an adapter folder"),
        (["--adapter", "base=runs/a/adapter"], "an adapter cannot be called 'base'"),
        (["--adapter", "prompt=runs/a/adapter"], "an adapter cannot be called 'prompt'"),
        (["--adapter", "x=runs/a/adapter", "--adapter", "x=runs/b/adapter"], "there are two of the name 'x'"),
        (["--adapter", "=runs/a/adapter"], "--adapter =runs/a/adapter: there is no name before the =."),
        (["--adapter", "a b=runs/a/adapter"], "'a b' is no name: expected letters, digits, _, . and -."),
        (["--adapter", "a="], "--adapter a=: names no folder."),
        (["--data.val", "none/x.jsonl"], "(of a run: where it was started), or give --data.val FILE."),
        (["--scores", "bleu"], "There is no score 'bleu'"),
        (["--scores", "json_f1"], "The score json_f1 needs JSON objects or arrays"),
        (["--json", "none/f.json"], "--json none/f.json: there is no folder none."),
        (["--json", ""], "--json is empty: name a file."),
        (["--json", "rows.jsonl", "--force"], "--json rows.jsonl: this command reads that file."),
        (["--json", "runs/quickstart/adapter/adapter_config.json"], "this command reads that file."),
        (["--json", "more.jsonl"], "--json more.jsonl: that file is there, and was not written by this command."),
        (["--out", "judged", "--json", "judged/evaluation.json"], "there is no folder judged"),
        (["--out", "runs", "--json", "runs/predictions.jsonl"], "--json and --out both name runs/predictions.jsonl"),
        (["--out", "rows.jsonl"], "--out rows.jsonl: that is a file"),
        (["--out", "rows.jsonl/judged"], "rows.jsonl is a file; name a folder."),
        (["--out", "/proc/judged"], "--out /proc/judged: nothing can be written there"),
        (["--out", "taken", "--force"], "taken/evaluation.json is a folder"),
        (["stray"], "stray. See `qlora-lightning evaluate --help`."),
        (["--split", "test"], "name a file in `data.test`"),
        (["--group-by", "colour"], "--group-by colour: no row of val has that column."),
        (["--trainer.default_root_dir", "empty"], "There is no adapter in empty/adapter: name one by --adapter DIR"),
        (["--model.quantization", "fp4"], "Set model.quantization to nf4"),
        (["--modle.rank", "3"], "Did you mean model?"),
    ],
)
def test_mistakes_are_told_in_a_sentence(arguments, words, run):
    err = run(*arguments, code=2)
    _, _, message = err.rpartition("qlora-lightning: ")
    assert words in message
    assert message.count("\n") == 1


def test_nothing_is_overwritten_unless_forced(run, tmp_path):
    run("--out", "judged")
    before = (tmp_path / "judged" / "evaluation.json").read_bytes()
    assert "judged/evaluation.json is there already" in run("--out", "judged", "--rows", "2", code=2)
    assert (tmp_path / "judged" / "evaluation.json").read_bytes() == before
    run("--out", "judged", "--rows", "2", "--force")
    assert json.loads((tmp_path / "judged" / "evaluation.json").read_text())["rows"] == 2


def test_a_limit_that_leaves_no_row_is_named(run, capsys):
    assert main([*RUN, "--trainer.limit_val_batches", "0"]) == 2
    assert "trainer.limit_val_batches is 0 and leaves no row" in capsys.readouterr().err
    assert run("--trainer.limit_val_batches", "0", "--scores", "chrf")  # with --rows 5


def test_without_config_and_adapter_it_says_what_it_needs(capsys):
    assert main(["evaluate"]) == 2
    assert "Name an adapter folder by --adapter DIR, or a config by --config FILE." in capsys.readouterr().err


def test_ctrl_c_leaves_nothing_half_written(run, tmp_path, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("qlora_lightning.evaluation.judge.judge_answer", interrupt)
    assert run("--out", "judged", "--json", "f.json", code=130) == "qlora-lightning: interrupted.\n"
    assert not (tmp_path / "judged").exists()
    assert not (tmp_path / "f.json").exists()


def test_answers_that_were_cut_and_prompts_that_were_shortened_are_told(run):
    told = run()
    assert "Answers are cut at 3 tokens (--max-new-tokens): 5 of 5 of the base, 5 of 5 of adapter had not" in told
    assert "shortened" not in told
    assert "3 shortened" in run("--data.max_length", "36", "--data.val", "more.jsonl", "--data.too_long", "truncate")
