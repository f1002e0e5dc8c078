"""Several processes train, evaluate and predict what one does, and write each thing once."""

import json

import pytest

from qlora_lightning.cli import main
from tests.distributed.runs import distance, launch
from tests.equality import metrics

pytestmark = pytest.mark.slow

ROWS = ["--data.val", "nine.jsonl", "--evaluation.max_new_tokens", "4"]
ROWS += ["--trainer.max_epochs", "3", "--trainer.check_val_every_n_epoch", "3"]  # six steps of eight rows
FEW = ["--trainer.max_epochs", "2"]
TWO = {
    "rows": ["--data.batch_size", "4", *ROWS],
    "packed": ["--data.tokens_per_batch", "256", *FEW],
    "uneven": ["--data.train", "nine.jsonl", "--data.batch_size", "4", *FEW, "--trainer.callbacks+=hooks.LogNorm"],
    "pairs": ["--data.batch_size", "2", *FEW],
}
ONE = {
    "rows": ["--data.batch_size", "8", *ROWS],
    "packed": ["--data.tokens_per_batch", "256", "--trainer.accumulate_grad_batches", "2", *FEW],
    "uneven": ["--data.train", "nine.jsonl", "--data.batch_size", "8", *FEW],
    "pairs": ["--data.batch_size", "4", *FEW],
}


def fit(name, *arguments, config="c.yaml"):
    config = "pairs.yaml" if name.endswith("pairs") else config
    return ["fit", "--config", config, *arguments, "--trainer.default_root_dir", name]


@pytest.fixture(scope="module")
def output(folder) -> str:
    """What one launch of two processes printed; its runs are in ``folder / "two"``."""
    commands = [fit(f"two/{name}", *options) for name, options in TWO.items()]
    run = ["--config", "two/rows/config.yaml", "--trainer.default_root_dir", "two/rows"]
    commands.append(["predict", *run, "--data.predict", "nine.jsonl", "--data.batch_size", "2"])
    return launch(folder, commands)


@pytest.fixture(scope="module")
def alone(folder):
    """The same on one process, in ``folder / "one"``."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, arguments in ONE.items():
            argv = fit(f"one/{name}", *arguments, "--trainer.devices", "1", "--trainer.strategy", "auto")
            assert main(argv) == 0


def test_each_process_leaves_the_group_before_the_interpreter_ends(output):
    """Else a thread of gloo may abort it, one time in twenty, after all is saved."""
    assert output.count("in a group at exit: False") == 2


@pytest.mark.usefixtures("output", "alone")
@pytest.mark.parametrize(("name", "steps"), [("rows", 6), ("packed", 4), ("uneven", 4), ("pairs", 6)])
def test_how_rows_are_cut_into_processes_and_windows_changes_nothing(folder, name, steps):
    one, two = folder / "one" / name, folder / "two" / name
    losses = metrics(two, "train_loss")
    assert len(losses) == steps
    assert losses[0] > losses[-1]
    assert metrics(one, "train_loss") == pytest.approx(losses, rel=1e-5)
    assert metrics(one, "grad_norm") == pytest.approx(metrics(two, "grad_norm"), rel=1e-4)
    assert distance(one, two) < 1e-4


@pytest.mark.usefixtures("output")
def test_callbacks_see_the_gradients_of_the_mean_over_all_processes(folder):
    assert metrics(folder / "two" / "uneven", "seen_norm") == metrics(folder / "two" / "uneven", "grad_norm")


def test_names_of_metrics_that_differ_between_processes_are_rejected(folder):
    options = fit("two/names", "--model", "hooks.NamesByRank", "--data.batch_size", "2", *FEW)
    assert launch(folder, [options], rejected=True).count("LossSums.metrics has the names") == 2


def test_a_fault_of_one_card_makes_all_processes_take_the_plain_path(folder):
    printed = launch(folder, [fit("two/faulty", "--model", "hooks.FaultyCard", "--data.batch_size", "4", *FEW)])
    assert printed.count("computes something else than the libraries: layer output (1, allowed 0.06)") == 1
    assert [f"process {rank} runs fused: False" in printed for rank in range(2)] == [True, True]


@pytest.mark.usefixtures("output", "alone")
@pytest.mark.parametrize("metric", ["val_loss", "val_perplexity", "val_token_accuracy", "tokens_seen"])
def test_validation_judges_every_row_once_and_tokens_are_counted_over_all_processes(folder, metric):
    one, two = (metrics(folder / name / "rows", metric) for name in ("one", "two"))
    assert one
    assert two == pytest.approx(one, rel=1e-5)


@pytest.mark.usefixtures("output")
def test_predictions_stand_in_the_order_of_the_rows_each_once(folder):
    lines = (folder / "two" / "rows" / "predictions.jsonl").read_text().splitlines()
    assert [json.loads(line)["row"] for line in lines] == list(range(9))
    assert [json.loads(line)["reference"].split()[-1] for line in lines] == [str(n) for n in range(1, 10)]


def test_each_thing_is_said_and_made_once(folder, output):
    assert output.count("the adapter is better on") == 1
    assert output.count("9 predictions: ") == 1
    assert output.count("Quantizing tiny, once") == 1
    assert len(list((folder / "cache" / "samples").glob("*/entry.json"))) == 3  # of nine, pairs and rows
