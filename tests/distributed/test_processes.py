"""Several processes train, evaluate and predict what one does, write each thing once, and resume exactly."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from qlora_lightning.cli import main
from qlora_lightning.model.adapters.lora import trainable_tensors
from qlora_lightning.model.module import QLoRAModule
from tests.distributed.runs import CONFIG, distance, launch, metrics
from tests.equality import adapter_bytes

EPOCHS = ["--trainer.max_epochs", "5", "--trainer.check_val_every_n_epoch", "5"]  # ten steps of eight rows
FEW = ["--trainer.max_epochs", "2"]
DROPOUT = ["--model.dropout", "0.1", "--trainer.max_epochs", "2", "--trainer.accumulate_grad_batches", "4"]
SAVED = (4, 12)  # batches: at the end of the first window, and of one in the second epoch
TWO = {
    "rows": ["--data.batch_size", "4", "--data.val", "nine.jsonl", *EPOCHS],
    "packed": ["--data.tokens_per_batch", "256", *FEW],
    "uneven": ["--data.train", "nine.jsonl", "--data.batch_size", "4", *FEW],
    "pairs": ["--data.batch_size", "2", *FEW],
    "dropout": ["--data.batch_size", "1", *DROPOUT],
}
ONE = {
    "rows": ["--data.batch_size", "8", "--data.val", "nine.jsonl", *EPOCHS],
    "windows": ["--data.batch_size", "2", "--trainer.accumulate_grad_batches", "4", *EPOCHS],
    "packed": ["--data.tokens_per_batch", "256", "--trainer.accumulate_grad_batches", "2", *FEW],
    "uneven": ["--data.train", "nine.jsonl", "--data.batch_size", "8", *FEW],
    "pairs": ["--data.batch_size", "4", *FEW],
}


def fit(name, *arguments, config="c.yaml"):
    config = "pairs.yaml" if name.endswith("pairs") else config
    return ["fit", "--config", config, *arguments, "--trainer.default_root_dir", name]


@pytest.fixture(scope="module")
def said(folder) -> str:
    """What one launch of two processes said; its runs lie in ``folder / "two"``."""
    config = json.loads(json.dumps(CONFIG))
    config["trainer"]["callbacks"] = [
        {"class_path": "hooks.SaveAt", "init_args": {"batches": SAVED, "folder": "saved"}}
    ]
    (folder / "saving.yaml").write_text(yaml.safe_dump(config))
    commands = [fit(f"two/{name}", *TWO[name]) for name in ("rows", "packed", "uneven", "pairs")]
    commands.append(fit("two/dropout", *TWO["dropout"], config="saving.yaml"))
    for number in SAVED:
        commands.append(fit(f"two/from-{number}", *TWO["dropout"], "--ckpt_path", f"saved/{number}.ckpt"))
    judged = ["--config", "two/rows/config.yaml", "--trainer.default_root_dir", "two/rows"]
    commands.append(["predict", *judged, "--data.predict", "nine.jsonl", "--data.batch_size", "2"])
    return launch(folder, commands)


@pytest.fixture(scope="module")
def alone(folder):
    """The same on one process, in ``folder / "one"``."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("COLUMNS", "200")
        for name, arguments in ONE.items():
            argv = fit(f"one/{name}", *arguments, "--trainer.devices", "1", "--trainer.strategy", "auto")
            assert main(argv) == 0


@pytest.mark.usefixtures("said", "alone")
@pytest.mark.parametrize(
    ("one", "two", "steps"),
    [
        ("rows", "rows", 10),
        ("windows", "rows", 10),
        ("packed", "packed", 4),
        ("uneven", "uneven", 4),
        ("pairs", "pairs", 6),
    ],
)
def test_how_rows_are_cut_into_processes_and_windows_changes_nothing(folder, one, two, steps):
    one, two = folder / "one" / one, folder / "two" / two
    losses = metrics(two, "train_loss")
    assert len(losses) == steps
    assert losses[0] > losses[-1]
    assert metrics(one, "train_loss") == pytest.approx(losses, rel=1e-5)
    assert metrics(one, "grad_norm") == pytest.approx(metrics(two, "grad_norm"), rel=1e-4)
    assert distance(one, two) < 1e-4


@pytest.mark.usefixtures("said", "alone")
def test_validation_judges_every_row_once_over_all_processes(folder):
    for name in ("val_loss", "val_perplexity", "val_token_accuracy"):
        expected = metrics(folder / "one" / "rows", name)
        assert len(expected) == 1
        assert metrics(folder / "two" / "rows", name) == pytest.approx(expected, rel=1e-5)


@pytest.mark.usefixtures("said", "alone")
def test_tokens_are_counted_over_all_processes(folder):
    expected = metrics(folder / "one" / "rows", "tokens_seen")
    assert metrics(folder / "two" / "rows", "tokens_seen") == expected
    packed = metrics(folder / "two" / "packed", "tokens_seen")[-1]
    assert packed / 2 == expected[-1] / 5  # in an epoch


@pytest.mark.usefixtures("said")
@pytest.mark.parametrize("number", SAVED)
def test_a_resumed_run_ends_in_the_same_bytes(folder, number):
    whole, resumed = folder / "two" / "dropout", folder / "two" / f"from-{number}"
    assert adapter_bytes(resumed) == adapter_bytes(whole)
    steps = len(metrics(resumed, "train_loss"))
    for column in ("train_loss", "grad_norm", "tokens_seen"):
        assert metrics(resumed, column) == metrics(whole, column)[-steps:]


@pytest.mark.usefixtures("said")
def test_each_process_has_its_own_generators_in_a_checkpoint(folder):
    content = torch.load(folder / "saved" / "4.ckpt", weights_only=True)["qlora_lightning"]
    one, other = content["generators"]
    assert not torch.equal(one["torch"], other["torch"])


@pytest.mark.usefixtures("said")
def test_another_number_of_processes_trains_the_same_rows_and_says_what_is_not_exact(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "400")
    argv = ["--data.batch_size", "2", "--ckpt_path", "saved/4.ckpt", "--trainer.devices", "1"]
    assert main(fit("one/from-4", *TWO["dropout"], *argv, "--trainer.strategy", "auto")) == 0
    assert "Processes: 2 saved the checkpoint, 1 resume it." in " ".join(capsys.readouterr().out.split())
    mine, whole = folder / "one" / "from-4", folder / "two" / "dropout"
    assert metrics(mine, "tokens_seen") == metrics(whole, "tokens_seen")[1:]


@pytest.mark.usefixtures("said")
def test_predictions_stand_in_the_order_of_the_rows_each_once(folder):
    lines = (folder / "two" / "rows" / "predictions.jsonl").read_text().splitlines()
    assert [json.loads(line)["row"] for line in lines] == list(range(9))
    assert [json.loads(line)["reference"].split()[-1] for line in lines] == [str(n) for n in range(1, 10)]


def test_each_thing_is_said_once(said):
    assert said.count("Memory after loading") == len(TWO) + len(SAVED)
    assert said.count("the adapter is better on") == 1
    assert said.count("9 predictions: ") == 1
    assert "sync_dist" not in said
    assert "code 2" not in said


def test_two_processes_that_start_on_an_empty_cache_make_each_entry_once(folder, said):
    assert said.count("Quantizing tiny, once") == 1
    cache = folder / "cache"
    (base,) = [entry for entry in (cache / "quantized").iterdir() if entry.is_dir()]
    assert (base / "config.json").exists()
    samples = [entry for entry in (cache / "samples").iterdir() if entry.is_dir()]
    labels = [json.loads((entry / "entry.json").read_text())["label"] for entry in samples]
    assert sorted(labels) == ["nine.jsonl", "pairs.jsonl", "rows.jsonl"]


@pytest.mark.usefixtures("said")
def test_no_unfinished_file_is_left(folder):
    left = [file.name for file in Path(folder / "two").rglob("*") if "unfinished" in file.name]
    assert left == []


@pytest.mark.slow
@pytest.mark.parametrize("streaming", [False, True])
def test_three_processes_resume_to_the_same_bytes_too(folder, streaming):
    """From three on a sum depends on its order: where a gradient is in DDP's buckets must not change."""
    saving = {"class_path": "hooks.SaveAt", "init_args": {"batches": [2, 4], "folder": f"three-{streaming}"}}
    trainer = {**CONFIG["trainer"], "devices": 3, "callbacks": [saving], "accumulate_grad_batches": 2, "max_steps": 3}
    data = {"train": "rows.jsonl", "batch_size": 1, "streaming": streaming}
    model = {**CONFIG["model"], "dropout": 0.1}
    config = {**CONFIG, "model": model, "data": data, "trainer": trainer}
    (folder / f"three-{streaming}.yaml").write_text(yaml.safe_dump(config))
    fit = ["fit", "--config", f"three-{streaming}.yaml", "--trainer.default_root_dir"]
    runs = {number: f"{streaming}-from-{number}" for number in (2, 4)}
    checkpoints = {number: ["--ckpt_path", f"three-{streaming}/{number}.ckpt"] for number in runs}
    resumed = [[*fit, runs[number], *checkpoints[number], "--trainer.callbacks", "null"] for number in runs]
    launch(folder, [[*fit, f"{streaming}-whole"], *resumed], processes=3)
    for run in runs.values():
        assert adapter_bytes(folder / run) == adapter_bytes(folder / f"{streaming}-whole")


def test_ddp_sends_adapters_only_and_leaves_the_base_where_it_is_mapped(tiny_base):
    module = QLoRAModule(base=str(tiny_base), rank=2)
    module.configure_model()
    sent = module.state_dict().keys() | dict(module.named_parameters()).keys()
    sent -= set(module._ddp_params_and_buffers_to_ignore)
    assert sent == trainable_tensors(module).keys()
