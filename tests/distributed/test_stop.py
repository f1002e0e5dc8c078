"""A signal that only one of two processes gets stops both at the same batch, and the run goes on to the same end."""

import signal

import pytest
import yaml

from tests.distributed.runs import CONFIG, adapter_bytes, launch, metrics

pytestmark = pytest.mark.slow

STOPS = {
    "training": {"rank": 1, "batch": 4},  # the first batch of the second window
    "validation": {"rank": 1, "batch": 1, "validation": True, "number": int(signal.SIGHUP)},
}
STREAM = ["--data.streaming", "true", "--trainer.max_steps", "4"]


@pytest.fixture(scope="module")
def said(folder) -> str:
    options = ["--model.dropout", "0.1", "--data.batch_size", "1", "--data.val", "nine.jsonl"]
    options += ["--trainer.accumulate_grad_batches", "3"]
    runs = {"whole": (None, []), "stream": (None, STREAM)}
    runs |= {name: (stop, []) for name, stop in STOPS.items()} | {"stream-training": (STOPS["training"], STREAM)}
    commands, resumes = [], []
    for name, (stop, more) in runs.items():
        config = {**CONFIG, "trainer": {**CONFIG["trainer"], "default_root_dir": f"stop/{name}"}}
        if stop:
            callback = {"class_path": "stop_hooks.Ask", "init_args": stop}
            config["trainer"] = {**config["trainer"], "callbacks": [callback]}
            more = [*more, "--adapter_checkpoint.every_minutes", "1e-6"]
            again = ["--trainer.default_root_dir", f"stop/{name}", "--ckpt_path", "last"]
            resumes.append(["fit", "--config", "whole.yaml", *options, *more, *again])
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))
        commands.append(["fit", "--config", f"{name}.yaml", *options, *more])
    return launch(folder, commands + resumes)


def test_both_end_with_the_code_of_the_signal(said):
    # of the SIGHUP that the second process got, the first knows only that one came
    assert (said.count("code 143"), said.count("code 129"), said.count("code 0")) == (5, 1, 10)
    assert said.count("saved in stop/training/checkpoints/last.ckpt. To resume, add `--ckpt_path last`") == 1


@pytest.mark.parametrize(
    ("name", "whole"), [("training", "whole"), ("validation", "whole"), ("stream-training", "stream")]
)
def test_the_resumed_run_ends_as_the_one_that_never_stopped(said, folder, name, whole):
    assert adapter_bytes(folder / "stop" / name) == adapter_bytes(folder / "stop" / whole)
    for column in ("step", "train_loss", "val_loss", "tokens_seen"):
        assert metrics(folder / "stop" / name, column) == metrics(folder / "stop" / whole, column)
