"""From three processes on a sum depends on its order: where a gradient lies in DDP's buckets must not change."""

import pytest
import yaml

from tests.distributed.runs import CONFIG, adapter_bytes, launch


@pytest.mark.slow
@pytest.mark.parametrize("streaming", [False, True])
def test_three_processes_go_on_to_the_same_bytes_too(folder, streaming):
    saving = {"class_path": "hooks.SaveAt", "init_args": {"batches": [2, 3, 4], "folder": f"three-{streaming}"}}
    trainer = {**CONFIG["trainer"], "devices": 3, "callbacks": [saving], "accumulate_grad_batches": 2, "max_steps": 3}
    data = {"train": "rows.jsonl", "batch_size": 1, "streaming": streaming}
    model = {**CONFIG["model"], "dropout": 0.1}
    config = {**CONFIG, "model": model, "data": data, "trainer": trainer}
    (folder / f"three-{streaming}.yaml").write_text(yaml.safe_dump(config))
    fit = ["fit", "--config", f"three-{streaming}.yaml", "--trainer.default_root_dir"]
    runs = {number: f"{streaming}-from-{number}" for number in (2, 3, 4)}
    checkpoints = {number: ["--ckpt_path", f"three-{streaming}/{number}.ckpt"] for number in runs}
    resumed = [[*fit, runs[number], *checkpoints[number], "--trainer.callbacks", "null"] for number in runs]
    launch(folder, [[*fit, f"{streaming}-whole"], *resumed], processes=3)
    for run in runs.values():
        assert adapter_bytes(folder / run) == adapter_bytes(folder / f"{streaming}-whole")
