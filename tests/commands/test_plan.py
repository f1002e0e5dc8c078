"""The command as a user runs it: on a tiny base, and on the recipes, whose bases are not here."""

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import yaml

from tests.commands.conftest import run_command
from tests.rows import counting_rows, write_rows

ROOT = Path(__file__).parents[2]
CONFIG = {
    "model": {"base": "tiny", "rank": 2, "compute_dtype": "bf16"},
    "data": {"train": "rows.jsonl", "batch_size": 4},
    "trainer": {"accelerator": "cpu", "accumulate_grad_batches": 2, "default_root_dir": "run"},
}
# A and B of seven linears in two layers: 64 → 64, 32, 32, 64; 64 → 128 twice; 128 → 64
ADAPTERS = 2 * 2 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 128))


@pytest.fixture(scope="module")
def folder(bare_folder):
    """The current folder, with a config, its rows, and a base without weights."""
    write_rows(bare_folder / "rows.jsonl", counting_rows())
    (bare_folder / "quickstart.yaml").write_text(yaml.safe_dump(CONFIG))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "120")
        yield bare_folder


def plan(*arguments, config="quickstart.yaml"):
    """Run the command; return exit code, figures, what it printed and its error; nothing but plan.json is written."""
    before = set(Path.cwd().rglob("*"))
    code, out, err = run_command("plan", f"--config={config}", "--json", "plan.json", *arguments)
    assert {file.name for file in set(Path.cwd().rglob("*")) - before} == ({"plan.json"} if code in (0, 1) else set())
    figures = None
    if code in (0, 1):
        figures = json.loads(Path("plan.json").read_text())
        Path("plan.json").unlink()
    return code, figures, out, err


def test_model_memory_and_length_of_a_run_are_reported(folder):
    _, figures, out, _ = plan()
    assert figures["adapters"]["parameters"] == ADAPTERS
    parts = figures["memory"]["parts"]
    assert parts.keys() == {"base", "scales", "vocabulary", "adapters", "gradients", "optimizer"}  # of a CPU
    assert parts["adapters"] == parts["gradients"] == 4 * ADAPTERS
    assert parts["optimizer"] == 8 * ADAPTERS
    assert (figures["memory"]["peak_bytes"], figures["memory"]["fits"]) == (None, True)
    # 16 rows: four batches of four, two of them a step
    assert figures["run"]["steps"] == 2
    assert figures["run"]["tokens"] == figures["run"]["epoch"]["tokens"]
    batch = figures["largest_batch"]
    assert batch["rows"] == 4
    assert 4 * batch["longest"] >= batch["tokens"] > batch["longest"]
    for words in ("2 layers, 64 wide", "Memory of a step", "The run", "what a step adds on a CPU is not planned"):
        assert words in out
    assert f"{figures['run']['tokens']:,}" in out


def test_llama_8b_is_planned_without_weights_data_or_network(folder):
    recipe = ROOT / "configs/llama-3.1-8b.yaml"
    code, figures, out, _ = plan("--device-memory", "16GiB", config=recipe)
    memory = figures["memory"]
    assert figures["base"]["parameters"] == 8_030_261_248
    assert figures["device"] == {"kind": "cuda", "memory": 16 * 2**30, "named": True}
    assert (code, memory["fits"]) == (0, True)
    assert memory["peak_bytes"] == sum(memory["parts"].values()) <= memory["usable_bytes"] == round(0.9 * 16 * 2**30)
    assert sum(memory["parts"][part] for part in ("base", "scales", "vocabulary")) == pytest.approx(5.70e9, rel=0.01)
    assert figures["run"] is None
    assert figures["largest_batch"] == {"rows": 16, "tokens": 65_536, "longest": 4096}
    assert 4096 < memory["micro_batch_tokens"] == memory["most_tokens"] < 65_536
    assert memory["gradient_checkpointing"] == {"checkpointed": True, "offload": False}
    for words in ("32 layers, 4,096 wide", "4,096 → 14,336", "self_attn.k_proj"):
        assert words in out
    assert "It fits, with gradient checkpointing, up to " in out
    assert "for rows of data.max_length" in " ".join(out.split())
    roomy = plan("--device-memory", "80GiB", config=recipe)[1]["memory"]
    assert (roomy["fits"], roomy["gradient_checkpointing"]["checkpointed"]) == (True, False)
    code, figures, out, _ = plan("--device-memory", "6GiB", config=recipe)
    assert (code, figures["memory"]["fits"]) == (1, False)
    assert "It does not fit: " in out
    assert "What is left: a smaller data.max_length" in " ".join(out.split())


def test_processes_share_a_base(folder):
    options = ["--trainer.accelerator", "gpu", "--device-memory", "4GB", "--data.train=null"]
    whole = plan(*options)[1]["memory"]
    _, figures, out, _ = plan(*options, "--trainer.devices", "2", "--trainer.strategy", "ddp_sharded_offload")
    # in 4 bits: packed weights of q and o, k and v, and the MLP; two norms, and a last one, which all have
    layer, norm = (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128) // 2 + 2 * 2 * 64, 2 * 64
    assert whole["parts"]["base"] == 2 * layer + norm
    assert figures["memory"]["parts"]["base"] == norm
    assert figures["memory"]["parts"]["gradients"] == 2 * 4 * ADAPTERS  # DDP has a copy
    assert figures["memory"]["host_bytes"] >= layer  # half of two layers
    assert "in host memory, pinned" in out


@pytest.mark.slow
def test_llama_70b_takes_of_two_devices_what_its_recipe_says(folder):
    recipe = ROOT / "configs/llama-3.1-70b-2x24gb.yaml"
    _, figures, _, _ = plan("--device-memory", "23GiB", config=recipe)
    memory = figures["memory"]
    assert figures["base"]["parameters"] == 70_553_706_496
    said = f"{memory['peak_bytes'] / 2**30:.1f} GiB planned on each, and {memory['host_bytes'] / 1e9:.1f} GB of host"
    assert said in recipe.read_text().partition("\n")[0]
    assert memory["fits"]
    assert memory["peak_bytes"] + memory["host_bytes"] > 24 * 2**30  # what is offloaded has no room on the device


@pytest.mark.parametrize(
    "adapted",
    [["self_attn.q_proj, down_proj", "--model.layers", "last:1"], [r"model\.layers\.1{1,2}\..*\.(q|down)_proj"]],
    ids=["names", "expression"],
)
def test_what_is_adapted_is_shown_and_missing_data_are_planned_at_their_longest(folder, adapted):
    """Names with commas are a list, and an expression with commas stays one."""
    _, found, out, _ = plan("--model.target_modules", *adapted, "--data.train", "nothing.jsonl")
    lines = [line.replace("│", "").split() for line in out.splitlines() if "_proj " in line]
    assert [" ".join(line) for line in lines] == ["self_attn.q_proj 64 → 64 2 1", "mlp.down_proj 128 → 64 2 1"]
    assert "The data were not read. data.train: data file nothing.jsonl does not exist" in out
    assert found["run"] is None
    assert found["largest_batch"]["tokens"] == 4 * 2048


@pytest.mark.slow
def test_a_hub_id_is_planned_by_the_hubs_cache_else_by_a_known_shape(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    name = "someone/Meta-Llama-3.1-8B"
    _, figures, out, _ = plan("--model.base", name)
    assert "the shape of llama-3.1-8b" in figures["base"]["config"]
    assert "4,096 wide" in out
    assert f"The data were not read. Base {name} is no folder or file here" in " ".join(out.split())
    cached = tmp_path / f"models--{name.replace('/', '--')}"
    shutil.copytree("tiny", cached / "snapshots/abc")
    (cached / "refs").mkdir()
    (cached / "refs/main").write_text("abc")
    _, figures, out, _ = plan("--model.base", name)
    assert figures["base"]["config"] == str(cached / "snapshots/abc/config.json")
    assert "64 wide" in out
    assert figures["run"]["steps"] == 2


def test_tokens_are_those_of_all_rows_and_epochs(folder):
    """About: by the average step, since a rank has the filler of another's row."""
    alone = ["--trainer.accelerator=gpu", "--device-memory=4GB", "--trainer.accumulate_grad_batches=1"]
    run = plan(*alone, "--data.batch_size=6", "--trainer.max_epochs=3", "--trainer.devices=0,1,")[1]["run"]
    epoch = run["epoch"]
    assert (epoch["batches"], epoch["devices"], run["tokens"]) == (2, 2, 4 * epoch["tokens"])  # 12 batches of a third
    run = plan(*alone, "--data.batch_size=null", "--data.tokens_per_batch=200", "--trainer.max_steps=2")[1]["run"]
    assert run["tokens"] == round(2 * run["epoch"]["tokens"] / run["epoch"]["batches"])


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({}, 8),
        ({"max_steps": 40}, 40),  # no epoch ends it
        ({"max_steps": 40, "max_epochs": 2}, 16),
        ({"max_steps": 7, "max_epochs": 3, "limit_train_batches": 4}, 6),
        ({"limit_train_batches": 4, "accumulate_grad_batches": 3}, 2),
        ({"limit_train_batches": 0.7, "accumulate_grad_batches": 4, "max_epochs": 2}, 6),  # of 11 batches
        ({"max_epochs": -1}, None),
    ],
)
def test_steps_follow_from_epochs_limits_and_accumulation(folder, settings, steps):
    options = [f"--trainer.{name}={value}" for name, value in settings.items()]
    assert plan("--data.batch_size=1", *options)[1]["run"]["steps"] == steps
