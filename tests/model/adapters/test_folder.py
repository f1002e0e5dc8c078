"""The adapter folder: what plain PEFT loads, whole or not at all; rejected if its tensors, base or shape do not fit."""

import json
import os
import re
import shutil
import socket

import lightning
import pytest
import torch
from huggingface_hub import metadata_load
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_lightning import AdapterCheckpoint, InstructionDataModule, LossSums, QLoRAModule
from qlora_lightning.cli import main
from qlora_lightning.sources.folders import load_tokenizer
from tests.adapters import load_by_card, make_adapter
from tests.equality import contents, same
from tests.errors import MachineFailed, rejects
from tests.rows import change_json, counting_rows, write_rows
from tests.steps import fit, make_module, make_trainer

IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])
FILES = {"README.md", "adapter_config.json", "adapter_model.safetensors", "qlora_lightning.json"}
TOKENIZER_FILES = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"}
WEIGHTS = "adapter_model.safetensors"

# PEFT 0.21 asks transformers 5.24 for an attribute by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")


# ---- what others load ------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize(
    "quantization", ["nf4", pytest.param("int8", marks=pytest.mark.slow), pytest.param("none", marks=pytest.mark.slow)]
)
def test_plain_peft_computes_the_same_logits_by_the_lines_of_the_card(tiny_base, tmp_path, quantization):
    model = make_adapter(tmp_path, tiny_base, quantization=quantization, std=0.1)
    plain, tokenizer = load_by_card(tmp_path)
    assert len(tokenizer) == plain.config.vocab_size
    ours = model(input_ids=IDS).logits
    # no dropout; in eval() bitsandbytes' int8 layers on a CPU compute another function
    torch.testing.assert_close(plain.train()(input_ids=IDS).logits, ours, rtol=1e-4, atol=1e-4)
    with model.disable_adapter():
        assert (model(input_ids=IDS).logits - ours).abs().max() > 0.1  # the adapter does something


class Regression(QLoRAModule):
    """Learns a value of each predicted token too, by a head of its own."""

    def __init__(self, *args, width=64, **options):
        super().__init__(*args, **options)
        self.value_head = torch.nn.Linear(width, 1)
        self.target = torch.nn.Linear(width, 1).requires_grad_(False)  # such as a moving average
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("last", torch.zeros(0), persistent=False)

    def configure_model(self):
        super().configure_model()
        if not hasattr(self, "late"):  # where Lightning's pages make layers
            self.late = torch.nn.Linear(self.causal_lm.config.hidden_size, 1)

    def compute_loss(self, batch):
        hidden, targets = self.last_states(batch)
        self.seen += 1
        nll, _ = self.token_losses(batch)
        heads = self.value_head(hidden.float()) + self.late(hidden.float()) + self.target(hidden.float())
        return LossSums.of(nll + (heads[:, 0] - targets).square() * 1e-6)


@pytest.fixture(scope="module")
def run_with_a_head(tiny_base, tmp_path_factory):
    """A run folder of :class:`Regression`, and the module that trained."""
    folder = tmp_path_factory.mktemp("head")
    write_rows(folder / "rows.jsonl", counting_rows())
    lightning.seed_everything(3, verbose=False)
    module = Regression(str(tiny_base), rank=2, compute_dtype="fp32", learning_rate=1e-2)
    options = {"callbacks": [AdapterCheckpoint()], "enable_checkpointing": True}
    fit(module, folder, folder / "rows.jsonl", batch_size=8, max_epochs=1, **options)
    return folder, module


def test_what_a_subclass_trains_beside_the_adapter_is_saved_with_it_and_trained_further(
    run_with_a_head, tiny_base, capsys
):
    folder, trained = run_with_a_head
    again = Regression(str(tiny_base), adapter=str(folder), compute_dtype="fp32")
    again.configure_model()
    again.fill_own_tensors()  # as each run does when it starts
    assert same(again.state_dict(), trained.state_dict())
    assert float(again.seen) > 0
    assert {"target.weight", "late.weight"} < again.state_dict().keys()
    assert "last" not in again.state_dict()
    assert "extra.safetensors" in (folder / "adapter" / "README.md").read_text()
    assert "start from scratch" not in capsys.readouterr().out


def test_a_run_is_opened_again_by_its_folder_and_trains_further(run_with_a_head, tiny_base, rows_file, tmp_path):
    folder, trained = run_with_a_head
    for named in (folder, folder / "adapter"):
        module = Regression.from_run(named, learning_rate=1e-3)
        assert same(module.state_dict(), trained.state_dict())
        assert (module.base, module.quantization, module.adapter_options["rank"]) == (str(tiny_base), "nf4", 2)
        assert torch.equal(module.model(IDS).logits, trained.eval().model(IDS).logits)
    fit(module.train(), tmp_path, rows_file, max_steps=2, batch_size=4)
    assert not same(module.state_dict(), trained.state_dict())
    with rejects("adapter.folder", "no such folder"):
        QLoRAModule.from_run(tmp_path / "none")
    (tmp_path / "checkpoints").mkdir(exist_ok=True)
    with rejects("adapter.folder", "AdapterCheckpoint", "load_from_checkpoint"):
        QLoRAModule.from_run(tmp_path)


def test_a_head_without_a_place_or_a_start_is_told_and_one_of_another_shape_rejected(
    run_with_a_head, tiny_base, tmp_path, capsys
):
    folder, _ = run_with_a_head
    options = {"adapter": str(folder), "compute_dtype": "fp32"}
    QLoRAModule(str(tiny_base), **options).configure_model()
    assert "value_head.weight" in capsys.readouterr().out
    make_adapter(tmp_path / "plain", tiny_base, quantization="nf4")
    Regression.from_run(tmp_path / "plain")
    assert "start from scratch" in capsys.readouterr().out
    with rejects("adapter.extra", "value_head.weight (1, 32)"):
        Regression(str(tiny_base), width=32, **options).configure_model()


def test_a_teacher_beside_the_model_is_in_no_file_and_named(tiny_base, rows_file, tmp_path, capsys):
    module = QLoRAModule(str(tiny_base), rank=2, compute_dtype="fp32")
    module.teacher = AutoModelForCausalLM.from_pretrained(tiny_base, use_kernels=False).requires_grad_(False).train()
    fit(module, tmp_path, rows_file, max_steps=1)
    assert "teacher, frozen outside the model, is saved in no checkpoint" in " ".join(capsys.readouterr().out.split())
    assert not any(name.startswith("teacher.") for name in module.state_dict())


def test_a_folder_loses_the_head_of_an_earlier_adapter(run_with_a_head, tiny_base, tmp_path):
    folder = shutil.copytree(run_with_a_head[0] / "adapter", tmp_path / "adapter")
    make_adapter(folder, tiny_base, quantization="nf4")
    assert not (folder / "extra.safetensors").exists()


def test_a_bases_config_has_no_say_in_the_names_of_an_adapter(tiny_base, tmp_path):
    base = shutil.copytree(tiny_base, tmp_path / "base")
    swapped = {"model.layers.0.": "model.layers.1.", "model.layers.1.": "model.layers.0."}
    change_json(base / "config.json", wrapper="x", names_in_wrapper=swapped)
    for name, folder in (("plain", tiny_base), ("renamed", base)):
        make_adapter(tmp_path / name, folder, quantization="nf4", std=0.1)
    assert same(*(load_file(tmp_path / name / WEIGHTS) for name in ("plain", "renamed")))


@pytest.mark.slow
def test_the_model_of_the_card_stops_where_the_bases_generation_config_would_not(tiny_base, tmp_path):
    module, tokenizer = make_module(tiny_base, quantization="none"), AutoTokenizer.from_pretrained(tiny_base)
    module.save_adapter(tmp_path / "known", tokenizer)

    def generate(folder):
        plain, _ = load_by_card(folder)
        answer = plain.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=8)
        return answer[0, IDS.shape[1] :].tolist()

    endless = generate(tmp_path / "known")  # the base's config knows the tokenizer's end
    assert len(endless) == 8
    stop = endless[3]
    module.save_adapter(tmp_path / "lacking", tokenizer, [stop])
    assert generate(tmp_path / "lacking") == endless[: endless.index(stop) + 1]
    written = json.loads((tmp_path / "lacking" / "generation_config.json").read_text())
    assert written["eos_token_id"] == [tokenizer.eos_token_id, stop]


def test_on_a_base_of_the_hub_it_is_saved_without_network_and_names_no_path(tiny_base, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a socket was opened")

    snapshot = shutil.copytree(tiny_base, tmp_path / "hub" / "snapshots" / ("ab" * 20))
    (snapshot / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *args, **options: str(snapshot))
    tokenizer, start = load_tokenizer("org/tiny"), None
    for folder in (tmp_path / "first", tmp_path / "second"):
        module = QLoRAModule("org/tiny", compute_dtype="fp32", adapter=start)
        module.configure_model()
        with monkeypatch.context() as patch:
            patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
            patch.setattr(socket, "socket", refuse)
            patch.setattr(socket, "getaddrinfo", refuse)
            module.save_adapter(folder, tokenizer)
        assert contents(folder).keys() >= FILES | TOKENIZER_FILES
        config = json.loads((folder / "adapter_config.json").read_text())
        assert config["revision"] == "ab" * 20
        card = {"base_model": "org/tiny", "license": "apache-2.0", "pipeline_tag": "text-generation"}
        assert metadata_load(folder / "README.md") == {**card, "library_name": "peft", "tags": ["lora", "qlora"]}
        assert config["target_modules"] == sorted(config["target_modules"])
        assert not [name for name, content in contents(folder).items() if bytes(tmp_path) in content]
        start = str(folder)
    assert contents(tmp_path / "first") == contents(tmp_path / "second")


# ---- whole or not at all ---------------------------------------------------------------------------------------------


class Renames:
    """Renames some files, and dies in front of the next."""

    def __init__(self, left):
        self.left, self.replace = left, os.replace

    def __call__(self, *paths):
        if not self.left:
            raise MachineFailed
        self.left -= 1
        self.replace(*paths)


def test_a_kill_between_any_two_renames_mixes_no_two_adapters(tiny_base, tmp_path, monkeypatch):
    """Files of the user's stay."""
    make_module(tiny_base, rank=4).save_adapter(tmp_path / "old")
    module = make_module(tiny_base, rank=2)
    module.save_adapter(tmp_path / "new")
    old, new = contents(tmp_path / "old"), contents(tmp_path / "new")
    for number in range(len(new) + 1):  # the identity is written aside by a rename of its own
        folder = shutil.copytree(tmp_path / "old", tmp_path / f"{number}")
        (folder / "notes.txt").write_text("mine")
        monkeypatch.setattr("os.replace", Renames(number))
        with pytest.raises(MachineFailed):
            module.save_adapter(folder)
        monkeypatch.undo()
        found = {name: content for name, content in contents(folder).items() if not name.startswith(".writing/")}
        assert found.pop("notes.txt") == b"mine"
        assert found == old or WEIGHTS not in found
        module.save_adapter(folder)
        assert contents(folder) == {**new, "notes.txt": b"mine"}


def test_a_kill_before_the_weights_of_a_card_with_an_evaluation_leaves_the_old_ones(tiny_base, tmp_path, monkeypatch):
    module = make_module(tiny_base)
    module.save_adapter(tmp_path)
    (tmp_path / "README.md").write_text("---\nmodel-index: []\n---\n")
    monkeypatch.setattr("os.replace", Renames(2))
    with pytest.raises(MachineFailed):
        module.save_adapter(tmp_path)
    assert (tmp_path / WEIGHTS).is_file()


# ---- its base and shape ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tiny_base, tmp_path_factory):
    """A module of rank 4 whose B is not zero, and its adapter folder."""
    module = make_module(tiny_base, target_modules="attention")
    folder = tmp_path_factory.mktemp("run") / "adapter"
    module.save_adapter(folder)
    return module, folder


def test_a_base_that_moved_is_found_where_it_was_loaded_from_or_by_another_name(made, tiny_base, tmp_path, capsys):
    folder = shutil.copytree(made[1], tmp_path / "run" / "adapter")
    change_json(folder / "qlora_lightning.json", base="./models/gone")
    chat = ["chat", "--adapter", str(folder.parent), "--prompt", "Hi.", "--max-new-tokens", "1"]
    assert main(chat) == 0
    change_json(folder / "adapter_config.json", base_model_name_or_path=str(tmp_path / "gone"))
    assert main(chat) == 2
    words = r"The base of .* is not found\. Base './models/gone'.*name it with --base"
    assert re.search(words, capsys.readouterr().err)
    assert main([*chat, "--base", str(tiny_base)]) == 0


def test_training_continues_with_the_shape_of_the_folder(tiny_base, made, tmp_path):
    """Its tensors say which modules that are, and not an expression, which might be matched for ever."""
    module, folder = made[0], shutil.copytree(made[1], tmp_path / "adapter")
    change_json(folder / "adapter_config.json", target_modules="([a-z._0-9]+)+x")
    again = make_module(tiny_base, adapter=str(folder), rank=8)  # the default: not asked for
    assert again.identity["adapter"] == module.identity["adapter"]
    again = make_module(
        tiny_base, adapter=str(folder), alpha=8.0, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]
    )
    assert same(dict(again.state_dict()), dict(module.state_dict()))


def test_how_a_folder_began_does_not_count_where_its_values_are(tiny_base, tmp_path):
    """PEFT's orthogonal start takes even ranks alone, and another program may know a start that PEFT does not."""
    make_adapter(tmp_path / "adapter", tiny_base, rank=3)
    for start in ("orthogonal", "new"):
        change_json(tmp_path / "adapter" / "adapter_config.json", init_lora_weights=start)
        module = make_module(tiny_base, adapter=str(tmp_path / "adapter"), rank=3)
        module.save_adapter(tmp_path / start, None)
        assert same(load_file(tmp_path / start / WEIGHTS), load_file(tmp_path / "adapter" / WEIGHTS))


# ---- settings beside a folder ----------------------------------------------------------------------------------------

SHAPE = {"rank": 4, "alpha": 12, "dropout": 0.1, "target_modules": "attention", "layers": [1]}
SHAPE["lora_options"] = {"use_rslora": True, "rank_pattern": {"q_proj": 2}}


@pytest.fixture(scope="module")
def shaped(tiny_base, tmp_path_factory):
    """An adapter folder that has nothing at its default, but experts."""
    make_adapter(folder := tmp_path_factory.mktemp("shaped"), tiny_base, **SHAPE)
    return str(folder)


@pytest.mark.parametrize(
    ("name", "value", "stored"),
    [
        ("rank", 5, "4"),
        ("alpha", 8, "12"),
        ("dropout", 0.5, "0.1"),
        ("target_modules", "mlp", "'q_proj', 'k_proj', 'v_proj', 'o_proj'"),
        ("target_modules", ["q_proj"], "'q_proj', 'k_proj', 'v_proj', 'o_proj'"),
        ("layers", "last:2", "[1]"),
        ("target_experts", True, "False"),
        ("lora_options", {"use_rslora": True}, "'q_proj': 2"),
    ],
)
def test_a_setting_that_is_not_the_folders_ends_a_fit_before_the_base_is_loaded(
    tiny_base, shaped, rows_file, tmp_path, name, value, stored
):
    base = shutil.copytree(tiny_base, tmp_path / "base", ignore=shutil.ignore_patterns("*.safetensors"))
    with rejects(f"model.{name}", f"model.{name} is {value!r}", shaped, stored):
        fit(QLoRAModule(str(base), adapter=shaped, **{name: value}), tmp_path, rows_file, max_steps=1)


def test_settings_that_say_the_same_as_the_folder_stay_and_others_are_recorded_as_they_train(tiny_base, shaped):
    say_the_same = {
        "target_modules": ["v_proj", "o_proj", "self_attn.q_proj", "k_proj"],
        "layers": "last:1",
        "lora_options": {"use_rslora": True, "use_dora": False, "rank_pattern": {".*q_proj": 2}},
    }
    all_names = ["q_proj", "k_proj", "v_proj", "o_proj"]
    for settings in (SHAPE, say_the_same, {}):
        module = make_module(tiny_base, adapter=shaped, **settings)
        expected = SHAPE | {"target_modules": all_names, "target_experts": False} | settings
        assert module.adapter_options == expected
        assert {name: module.hparams[name] for name in expected} == expected
        assert {name: module.hparams_initial[name] for name in expected} == expected  # for loggers


def test_modules_that_no_short_setting_names_are_recorded_one_by_one(tiny_base, tmp_path):
    names = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"]
    make_adapter(tmp_path, tiny_base, target_modules=names)
    for _ in range(2):
        module = make_module(tiny_base, adapter=str(tmp_path), target_modules=names)
        assert (module.adapter_options["target_modules"], module.adapter_options["layers"]) == (names, "all")
    assert make_module(tiny_base, adapter=str(tmp_path)).adapter_options == module.adapter_options


def test_an_evaluation_takes_any_adapter_whatever_the_settings_would_train(tiny_base, shaped, rows_file, tmp_path):
    module = QLoRAModule(str(tiny_base), adapter=shaped, rank=16, micro_batch_tokens=512)
    data = InstructionDataModule(val=str(rows_file), train=str(rows_file), tokenizer=str(tiny_base), batch_size=8)
    make_trainer(tmp_path, limit_val_batches=1).validate(module, data, verbose=False)
    with rejects("model.rank", "16", "4"):
        make_trainer(tmp_path, max_steps=1).fit(module, data)
