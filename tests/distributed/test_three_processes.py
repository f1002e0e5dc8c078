"""From three processes on a sum depends on its order: where a gradient lies in DDP's buckets must not change."""

import pytest
import yaml

from tests.distributed.runs import CONFIG, adapter_bytes, launch


@pytest.mark.slow
def test_three_processes_go_on_to_the_same_bytes_too(folder):
    saving = {"class_path": "hooks.SaveAt", "init_args": {"batches": [2, 4], "folder": "three"}}
    trainer = {**CONFIG["trainer"], "devices": 3, "callbacks": [saving]}
    data = {"train": "rows.jsonl", "batch_size": 1}
    model = {**CONFIG["model"], "dropout": 0.1}
    (folder / "three.yaml").write_text(yaml.safe_dump({**CONFIG, "model": model, "data": data, "trainer": trainer}))
    fit = ["fit", "--config", "three.yaml", "--trainer.accumulate_grad_batches", "2", "--trainer.default_root_dir"]
    resumed = [[*fit, f"from-{n}", "--ckpt_path", f"three/{n}.ckpt", "--trainer.callbacks", "null"] for n in (2, 4)]
    launch(folder, [[*fit, "whole"], *resumed], processes=3)
    assert adapter_bytes(folder / "from-2") == adapter_bytes(folder / "whole")
    assert adapter_bytes(folder / "from-4") == adapter_bytes(folder / "whole")
