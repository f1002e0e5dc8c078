"""Whatever a user gets wrong is told in one sentence, with exit code 2, and nothing of theirs is touched."""

import gzip
import hashlib
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import yaml

from qlora_lightning.cli import main

CONFIG = {
    "seed_everything": 3,
    "model": {"base": "tiny", "rank": 2, "learning_rate": 0.01, "schedule": "constant", "compute_dtype": "fp32"},
    "data": {"train": "rows.jsonl", "batch_size": 2},
    "adapter_checkpoint": {"every_n_train_steps": 1},
    "gpu_memory": None,
    "throughput": None,
    "trainer": {
        "accelerator": "cpu",
        "devices": 1,
        "max_steps": 2,
        "enable_progress_bar": False,
        "default_root_dir": "new",
    },
}
LAST = "run/checkpoints/last.ckpt"


class Wrong(NamedTuple):
    """A wrong input.

    Attributes:
        name: Of the test.
        arguments: Behind ``fit --config c.yaml``, or a whole command line where they begin with a command.
        words: What the message must hold.
        prepare: Makes the files that the input needs, in the current folder.
        lines: Lines of the message: more than one only where rows are listed.
    """

    name: str
    arguments: str
    words: tuple[str, ...]
    prepare: Callable[[], object] = lambda: None
    lines: int = 1


def write(name: str, content: str | bytes) -> Callable[[], object]:
    data = content.encode() if isinstance(content, str) else content
    return lambda: (Path(name).parent.mkdir(parents=True, exist_ok=True), Path(name).write_bytes(data))


def rows(*values: object) -> Callable[[], object]:
    return write("wrong.jsonl", "".join(json.dumps(value) + "\n" for value in values))


def cut(source: str, target: str, size: int) -> Callable[[], object]:
    return lambda: Path(target).write_bytes(Path(source).read_bytes()[:size])


def flip(content: bytes, at: bytes) -> bytes:
    place = content.index(at)
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


def change_checkpoint(change: Callable[[dict], object]) -> Callable[[], object]:
    def prepare() -> None:
        checkpoint = torch.load(LAST, weights_only=True)
        change(checkpoint)
        torch.save(checkpoint, "wrong.ckpt")

    return prepare


def change_adapter(change: Callable[[Path], object]) -> Callable[[], object]:
    return lambda: change(Path(shutil.copytree("run/adapter", "wrong")))


def edit_json(name: str, **values: object) -> Callable[[Path], object]:
    def edit(folder: Path) -> None:
        file = folder / name
        file.write_text(json.dumps({**json.loads(file.read_text()), **values}))

    return edit


ALPACA = {"instruction": "Say it.", "output": "it"}
KEYS = [
    Wrong("empty_config", "fit --config wrong.yaml", ("empty",), write("wrong.yaml", "")),
    Wrong("no_yaml", "fit --config wrong.yaml", ("not YAML", "line 2"), write("wrong.yaml", "model: {a: 1\ndata: [\n")),
    Wrong(
        "code_in_config",
        "fit --config wrong.yaml",
        ("not YAML", "python/object"),
        write("wrong.yaml", "model: !!python/object/apply:os.mkdir [ran]\n"),
    ),
    Wrong(
        "key_twice",
        "inspect --config wrong.yaml",
        ("'max_length'", "line 4", "line 6", "wrong.yaml"),
        write(
            "wrong.yaml",
            "model:\n  base: tiny\ndata:\n  max_length: 64\n  train: rows.jsonl\n  max_length: 128\n",
        ),
    ),
    Wrong("binary_config", "fit --config wrong.yaml", ("utf-8",), write("wrong.yaml", b"\x00\xff\xfe")),
    Wrong("unknown_model_key", "--model.rnak 3", ("model.rnak", "Did you mean model.rank?")),
    Wrong("folder_is_a_file", "--trainer.default_root_dir rows.jsonl", ("rows.jsonl is a file: name a folder",)),
    Wrong("report_of_a_file", "report rows.jsonl", ("rows.jsonl holds no run",)),
    Wrong(
        "merged_for_an_adapter",
        "chat --adapter wrong --prompt a",
        ("wrong is a merged model", "`vllm serve wrong`"),
        write("wrong/merge.json", "{}"),
    ),
    Wrong("positional", "fit c.yaml", ("c.yaml stands alone: a config is named as --config c.yaml.",)),
    Wrong("recipe", "fit --config quickstart", ("`qlora-lightning recipes copy quickstart` writes the recipe.",)),
    Wrong("gpus", "--trainer.gpus 1", ("'trainer.gpus'", "Did you mean trainer.devices?")),
    Wrong("batch_size", "--trainer.batch_size 4", ("'trainer.batch_size'", "Did you mean data.batch_size?")),
    Wrong(
        "4bit",
        "--model.quantization 4bit",
        ("Expected one of 'nf4', 'fp4', 'int8', 'none'. Got value: 4bit", "4 bits are nf4"),
    ),
    Wrong("no_base", "fit --data.train rows.jsonl", ("arguments are required: base",)),
    Wrong("unknown_class", "--model.class_path no.such.Module", ("no.such.Module", "No module named")),
]
VALUES = [
    Wrong("rank_word", "--model.rank eight", ("model.rank: Expected", "int", "eight")),
    Wrong("rank_zero", "--model.rank 0", ("model.rank is 0: expected",)),
    Wrong("quantization", "--model.quantization nf5", ("model.quantization: ", "nf4", "nf5")),
    Wrong("layers_word", "--model.layers first:2", ("model.layers", "last:N")),
    Wrong("layers_beyond", "--model.layers last:9", ("model.layers", "2 layers")),
    Wrong("target_modules", "--model.target_modules q_prj", ("model.target_modules", "q_proj")),
    Wrong("lora_options", "--model.lora_options {'use_rslroa':true}", ("use_rslroa", "use_rslora")),
    Wrong("learning_rate", "--model.learning_rate -1", ("model.learning_rate is -1", "positive")),
    Wrong("optimizer_path", "--model.optimizer no.such.Optimizer", ("no.such.Optimizer", "cannot be imported")),
    Wrong("optimizer_kind", "--model.optimizer os.system", ("os.system", "not a torch optimizer class")),
    Wrong("schedule", "--model.schedule cosin", ("model.schedule", "cosine")),
    Wrong("warmup_ratio", "--model.warmup_ratio 1.0", ("model.warmup_ratio is 1.0",)),
    Wrong("batch_size", "--data.batch_size 0", ("batch_size", "at least 1")),
    Wrong("val_fraction_0", "--data.val_fraction 0", ("val_fraction: expected a share between 0 and 1, found 0",)),
    Wrong("two_sizes", "--data.tokens_per_batch 64", ("batch_size and tokens_per_batch",)),
    Wrong("train_on", "--data.train_on everything", ("data.train_on: ", "everything", "assistant")),
    Wrong("format", "--data.format alpca", ("format", "alpaca")),
    Wrong("clip", "--trainer.gradient_clip_val -1", ("gradient_clip_val is -1",)),
    Wrong("max_epochs", "--trainer.max_epochs two", ("trainer.max_epochs: Expected", "int", "two")),
    Wrong("precision", "--trainer.precision bf16-true", ("precision", "bf16-true")),
    Wrong("strategy", "--trainer.strategy dpp", ("trainer", "dpp")),
    Wrong("every_n", "--adapter_checkpoint.every_n_train_steps 0", ("every_n_train_steps is 0",)),
    Wrong("mode", "--adapter_checkpoint.monitor val_token_accuracy", ("val_token_accuracy", "adapter_checkpoint.mode")),
    Wrong(
        "offload",
        "--gradient_checkpointing.enabled false --gradient_checkpointing.offload true",
        ("offload is true, but enabled is false",),
    ),
    Wrong(
        "plan",
        "plan --config c.yaml --gradient_checkpointing.enabled false --gradient_checkpointing.offload true",
        ("offload is true, but enabled",),
    ),
]
BASES = [
    Wrong("base_typo", "--model.base tiyn", ("'tiyn'", "no such file or folder")),
    Wrong(
        "base_no_gguf", "--model.base wrong.gguf", ("cannot be read as a GGUF model",), write("wrong.gguf", "<html>")
    ),
    Wrong("base_of_hub", "--model.base org/none", ("org/none", "HF_HUB_OFFLINE")),
    Wrong("revision", "--model.revision main", ("only a hub id has revisions",)),
    Wrong("tokenizer", "--data.tokenizer wrong", ("wrong",), write("wrong/a.txt", "")),
]
DATA = [
    Wrong("no_train", "--data.train null", ("data.train",)),
    Wrong("train_typo", "--data.train row.jsonl", ("row.jsonl", "rows.jsonl")),
    Wrong("val_typo", "--data.val vla.jsonl", ("vla.jsonl", "hub name the split).\n")),  # no file has such a name
    Wrong("empty_file", "--data.train wrong.jsonl", ("wrong.jsonl", "empty"), write("wrong.jsonl", "")),
    Wrong(
        "no_json", "--data.train wrong.jsonl", ("wrong.jsonl:2",), write("wrong.jsonl", json.dumps(ALPACA) + "\n{'a"), 9
    ),
    Wrong(
        "key_twice_in_a_row",
        "--data.train wrong.jsonl",
        ("wrong.jsonl:2", "'output'", "twice"),
        write("wrong.jsonl", json.dumps(ALPACA) + '\n{"instruction": "Say it.", "output": "it", "output": "no"}\n'),
        9,
    ),
    Wrong("no_format", "--data.train wrong.jsonl", ("wrong.jsonl", "format"), rows({"a": "b", "c": "d"})),
    Wrong("columns", "--data.columns {'instruktion':'input'}", ("columns", "instruktion", "'instruction'")),
    Wrong(
        "cut_gzip",
        "--data.train wrong.jsonl.gz",
        ("wrong.jsonl.gz",),
        write("wrong.jsonl.gz", gzip.compress(b'{"instruction": "a", "output": "b"}\n' * 500)[:50]),
        9,
    ),
    Wrong("template", "--data.chat_template none.jinja", ("none.jinja",)),
    Wrong("broken_template", "--data.chat_template t.jinja", ("t.jinja",), write("t.jinja", "{% for m in %}")),
    Wrong("predict_nothing", "predict --config c.yaml", ("data.predict",)),
]
CHECKPOINTS = [
    Wrong("no_checkpoint", "--ckpt_path none.ckpt", ("none.ckpt", "no such file")),
    Wrong("cut_checkpoint", "--ckpt_path wrong.ckpt", ("no checkpoint",), cut(LAST, "wrong.ckpt", 20_000)),
    Wrong(
        "foreign_checkpoint",
        "--ckpt_path wrong.ckpt",
        ("wrong.ckpt", "not written by qlora_lightning"),
        lambda: torch.save({"state_dict": {}, "epoch": 3}, "wrong.ckpt"),
    ),
    Wrong(
        "newer_checkpoint",
        "--ckpt_path wrong.ckpt",
        ("format version 99", "update qlora_lightning"),
        change_checkpoint(lambda found: found["qlora_lightning"].update(format_version=99)),
    ),
    Wrong(
        "checkpoint_of_another_base",
        "--ckpt_path wrong.ckpt",
        ("another base", "elsewhere (weights ffffffffffff) there", "tiny (weights"),
        change_checkpoint(lambda f: f["qlora_lightning"]["identity"].update(base="elsewhere", fingerprint="f" * 64)),
    ),
    Wrong(
        "flipped_bit",
        f"--ckpt_path {LAST}",
        ("last.ckpt is damaged", "checksum"),
        lambda: Path(LAST).write_bytes(flip(Path(LAST).read_bytes(), b".lora_A.")),
    ),
    Wrong(
        "optimizer_of_a_checkpoint",
        "validate --config c.yaml --data.val rows.jsonl --ckpt_path wrong.ckpt",
        ("wrong.ckpt names the optimizer evil.X", "`--model.optimizer evil.X`"),
        change_checkpoint(lambda found: found["qlora_lightning"]["settings"].update(optimizer="evil.X")),
    ),
    Wrong("another_rank", f"--ckpt_path {LAST} --model.rank 3", ("model.rank 2", "here it is 3")),
    Wrong("other_targets", f"--ckpt_path {LAST} --model.target_modules mlp", ("model.target_modules", "down_proj")),
    Wrong("another_quantization", f"--ckpt_path {LAST} --model.quantization int8", ("model.quantization nf4", "int8")),
    Wrong(
        "judged_on_another_quantization",
        f"validate --config c.yaml --data.val rows.jsonl --ckpt_path {LAST} --model.quantization none",
        ("model.quantization nf4", "none"),
    ),
    Wrong(
        "other_rows_inside_an_epoch",
        f"--ckpt_path {LAST} --data.train wrong.jsonl",
        ("inside an epoch", "training samples"),
        lambda: write("wrong.jsonl", Path("rows.jsonl").read_text().replace("Count to 3.", "Count to 4."))(),
    ),
]
ADAPTERS = [
    Wrong("no_adapter", "--model.adapter none", ("none", "adapter_config.json")),
    Wrong(
        "adapter_of_another_base",
        "--model.adapter wrong",
        ("another base", "elsewhere (weights ffffffffffff)"),
        change_adapter(edit_json("qlora_lightning.json", base="elsewhere", fingerprint="f" * 64)),
    ),
    Wrong(
        "newer_adapter",
        "--model.adapter wrong",
        ("format version 99",),
        change_adapter(edit_json("qlora_lightning.json", format_version=99)),
    ),
    Wrong(
        "cut_adapter_config",
        "--model.adapter wrong",
        ("adapter_config.json", "not JSON"),
        change_adapter(lambda folder: cut("run/adapter/adapter_config.json", "wrong/adapter_config.json", 90)()),
    ),
    Wrong(
        "cut_adapter",
        "--model.adapter wrong",
        ("wrong", "not a whole safetensors file"),
        change_adapter(
            lambda folder: cut("run/adapter/adapter_model.safetensors", "wrong/adapter_model.safetensors", 900)()
        ),
    ),
    Wrong(
        "pickled_adapter",
        "--model.adapter wrong",
        ("no adapter_model.safetensors",),
        change_adapter(lambda folder: (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")),
    ),
]
ENVIRONMENT = [
    Wrong("started_folder", "--trainer.default_root_dir run", ("holds a run already", "--ckpt_path last")),
    Wrong(
        "started_folder_of_another_run",
        "--trainer.default_root_dir run --ckpt_path other/last.ckpt",
        ("run holds a run already", "other/last.ckpt is not of it"),
        lambda: shutil.copytree("run/checkpoints", "other"),
    ),
    Wrong("unwritable_folder", "--trainer.default_root_dir /proc/no", ("/proc/no", "cannot be written to")),
    Wrong("no_devices", "--trainer.devices 0", ("trainer", "devices")),
]
if not torch.cuda.is_available():
    ENVIRONMENT += [
        Wrong("no_cuda", "--trainer.accelerator cuda", ("trainer", "CUDA")),
    ]
ALL = [*KEYS, *VALUES, *BASES, *DATA, *CHECKPOINTS, *ADAPTERS, *ENVIRONMENT]


@pytest.fixture(scope="module")
def prepared(tiny_base, tmp_path_factory):
    """A folder with a config, rows, a base and a run that was stopped inside an epoch."""
    folder = tmp_path_factory.mktemp("prepared")
    lines = [{"instruction": f"Count to {n}.", "output": " ".join(map(str, range(n)))} for n in range(1, 11)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    (folder / "c.yaml").write_text(yaml.safe_dump(CONFIG))
    (folder / "tiny").symlink_to(tiny_base)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["fit", "--config", "c.yaml", "--trainer.default_root_dir", "run"]) == 0
    return folder


def contents(folder: Path) -> dict[str, str]:
    files = [*folder.rglob("*"), *(folder / "tiny").rglob("*")]
    return {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in files if file.is_file()}


@pytest.fixture
def refused(prepared, tmp_path, monkeypatch, capsys):
    """Run a wrong input in a copy of the folder; gives the message."""
    shutil.copytree(prepared, tmp_path, dirs_exist_ok=True, symlinks=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # read from the environment at import

    def run(wrong: Wrong) -> str:
        wrong.prepare()
        before = contents(tmp_path)
        arguments = wrong.arguments.split()
        if arguments[0].startswith("--"):
            arguments = ["fit", "--config", "c.yaml", *arguments]
        capsys.readouterr()
        code = main(arguments)
        captured = capsys.readouterr()
        assert code == 2, captured.out + captured.err
        assert "Traceback" not in captured.out + captured.err
        after = contents(tmp_path)
        assert {name: after.get(name) for name in before} == before
        assert not [name for name in after.keys() - before.keys() if not name.startswith(f"{tmp_path}/new/")]
        _, _, message = captured.err.rpartition("qlora-lightning: ")
        return message

    yield run
    logging.getLogger("qlora_lightning").handlers.clear()


@pytest.mark.filterwarnings("ignore")  # what libraries warn of, before the refusal, is not at issue here
@pytest.mark.parametrize("wrong", ALL, ids=[wrong.name for wrong in ALL])
def test_wrong_inputs_are_told_in_one_sentence_and_touch_nothing(refused, wrong):
    message = refused(wrong)
    assert [word for word in wrong.words if word not in message] == [], message
    assert message.count("\n") <= wrong.lines, message


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("QLORA_LIGHTNING_CACHE", "/proc/no", ("/proc/no", "QLORA_LIGHTNING_CACHE")),
        ("QLORA_LIGHTNING_CACHE", "rows.jsonl", ("rows.jsonl", "QLORA_LIGHTNING_CACHE")),
    ],
)
def test_wrong_variables_of_the_environment_are_told_too(refused, monkeypatch, name, value, words):
    monkeypatch.setenv(name, value)
    message = refused(Wrong(name, "--seed_everything true --data.train rows.jsonl", words))
    assert all(word in message for word in words), message
