import json

import pytest
from rich.console import Console

from qlora_lightning.cli import main
from qlora_lightning.commands.diagnose import make_parser
from qlora_lightning.commands.diagnose.measure import Diagnosis
from qlora_lightning.commands.diagnose.report import give_hints, print_report
from qlora_lightning.model.weights.merging import Movement
from tests.adapters import make_run


@pytest.fixture(scope="module")
def run(tiny_base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("diagnose")
    make_run(folder / "runs" / "quickstart", tiny_base)
    return folder


@pytest.fixture(autouse=True)
def in_folder(run, monkeypatch):
    monkeypatch.chdir(run)
    monkeypatch.setenv("COLUMNS", "100")


def examples():
    lines = [line.strip() for line in make_parser().format_help().splitlines()]
    return [line for line in lines if line.startswith("qlora-lightning diagnose --adapter")]


def test_help_has_examples():
    assert len(examples()) == 2


@pytest.mark.parametrize("line", examples())
def test_the_examples_of_help_run_as_they_stand(line, run, capsys):
    assert main(line.split()[1:]) == 0
    out = capsys.readouterr().out
    assert "‖ΔW‖/‖W‖" in out
    assert out.count("q_proj") == (3 if "--all" in line else 1)  # the kind, and each of two layers
    assert "• It " in out
    if "--json" in line:
        found = json.loads((run / "diagnosis.json").read_text())
        assert len(found["modules"]) == 2 * 7
        assert all(each["rank"] == 4 and 1 <= each["effective_rank"] <= 4 for each in found["modules"])
        assert found["hints"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("", "--adapter"),
        ("--adapter none", "is not an adapter folder"),
        ("--adapter runs/quickstart/adapter --json none/x.json", "there is no folder none"),
        ("--adapter runs/quickstart/adapter --json runs", "that is a folder"),
        ("--adapter runs/quickstart/adapter --json=", "--json is empty: name a file."),
        ("--adapter runs/quickstart --json runs/quickstart/adapter/adapter_config.json", "reads that file"),
    ],
)
def test_mistakes_are_told_in_a_sentence(arguments, words, capsys):
    assert main(["diagnose", *arguments.split()]) == 2
    err = capsys.readouterr().err
    assert words in err
    assert err.count("\n") == 1


def moved(ratio, effective, rank=8, count=4):
    return [Movement(f"model.layers.{number}.mlp.up_proj", rank, ratio, 1.0, effective) for number in range(count)]


@pytest.mark.parametrize(
    ("movements", "words"),
    [
        (moved(0.0, 0.0), ["changes nothing"]),
        (moved(0.05, 5.0), ["5.0% in the median", "a fair size"]),
        (moved(0.0001, 5.0), ["hardly moved"]),
        (moved(0.9, 5.0), ["very far"]),
        (moved(0.05, 7.5), ["twice the rank may learn more"]),
        (moved(0.05, 1.8), ["rank 2 would hold most of it"]),
        (moved(0.05, 5.0) + moved(0.0, 0.0, count=1), ["1 modules are not moved at all"]),
    ],
)
def test_hints_say_what_the_figures_mean(movements, words):
    said = " ".join(give_hints(movements))
    assert all(word in said for word in words), said


def test_nothing_is_cut_in_a_terminal_of_80_columns(capsys):
    kinds = ("self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj", "mlp.down_proj")
    names = [f"model.layers.{layer}.{kind}" for layer in range(32) for kind in kinds]
    movements = [Movement(name, 64, 9.99, 12.5, 55.5) for name in names]
    found = Diagnosis("runs/one/adapter", "meta-llama/" + 16 * "long-", movements)
    print_report(found, Console(width=80), every_module=True)
    heading, *lines = capsys.readouterr().out.splitlines()
    assert heading == f"{found.adapter} on {found.base}"
    assert max(map(len, lines[: -len(give_hints(movements))])) <= 80
    assert not any("…" in line for line in lines)
    assert any("│ 55.5 of 64 │ 79.92% │  79.92% │ ████████████████████████████████ │" in line for line in lines)
    assert all(any(f"│ {name}" in line for line in lines) for name in names)


def test_a_folder_with_brackets_is_named_as_it_is(run, capsys):
    (run / "[").mkdir()
    (run / "[" / "b]").symlink_to(run / "runs")
    assert main(["diagnose", "--adapter", "[/b]/quickstart"]) == 0
    assert "[/b]/quickstart/adapter on" in capsys.readouterr().out
