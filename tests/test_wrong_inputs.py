"""Whatever a user gets wrong, in any command, is reported in one sentence with exit code 2, and no file is touched."""

import json
import logging
import math
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_lightning.cli import main
from tests.rows import counting_rows, write_rows

CONFIG = """
seed_everything: 3
model: {base: tiny, rank: 2, learning_rate: 0.01, schedule: constant, compute_dtype: fp32}
data: {train: rows.jsonl, batch_size: 2}
adapter_checkpoint: {every_n_train_steps: 1}
gpu_memory: null
throughput: null
trainer: {accelerator: cpu, devices: 1, max_steps: 2, enable_progress_bar: false, default_root_dir: new}
"""
LAST, RUN, OURS = "run/checkpoints/last.ckpt", "run/adapter", "qlora_lightning"
WEIGHTS, TENSORS = "wrong/adapter_model.safetensors", "wrong/model.safetensors"
SHARDS = '{"weight_map": {"a": "b.safetensors", "c": "c.safetensors"}}'
PT = {"format": "pt"}


def wrong(arguments: str, *words: str, prepare: Callable[[], object] = lambda: None) -> object:
    """Make a case of the table: what is behind ``fit --config c.yaml``, or a whole command; and words of the message.

    ``prepare`` makes files in the current folder.
    """
    return pytest.param(arguments, words, prepare, id=arguments)


def write(name: str, content: str) -> Callable[[], object]:
    return lambda: (Path(name).parent.mkdir(parents=True, exist_ok=True), Path(name).write_text(content))


def write_base(model_type: str) -> Callable[[], object]:
    return write("wrong/config.json", json.dumps({"model_type": model_type}))


def cut(source: str, target: str, size: int) -> Callable[[], object]:
    return lambda: Path(target).write_bytes(Path(source).read_bytes()[:size])


def edit_checkpoint(edit: Callable[[dict], object]) -> Callable[[], object]:
    """Write a checkpoint with other content."""

    def prepare() -> None:
        checkpoint = torch.load(LAST, weights_only=True)
        edit(checkpoint)
        torch.save(checkpoint, "wrong.ckpt")

    return prepare


def compress_checkpoint() -> None:
    with zipfile.ZipFile(LAST) as source, zipfile.ZipFile("wrong.ckpt", "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))


def change_folder(source: str, change: Callable[[], object]) -> Callable[[], object]:
    return lambda: (shutil.copytree(source, "wrong"), change())


def edit(source: str, name: str, **values: object) -> Callable[[], object]:
    """Write a folder with other values in one of its JSON files; without those that are ``None``."""
    file = Path("wrong", name)

    def change() -> None:
        content = {**json.loads(file.read_text()), **values}
        file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))

    return change_folder(source, change)


def edit_tensor(source: str, ending: str, edit: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[], object]:
    def change() -> None:
        (file,) = Path("wrong").glob("*.safetensors")
        tensors = load_file(file)
        save_file({name: edit(each) if name.endswith(ending) else each for name, each in tensors.items()}, file, PT)

    return change_folder(source, change)


def put_a_nan(tensor: torch.Tensor) -> torch.Tensor:
    tensor.view(-1)[7] = float("nan")
    return tensor


def put_a_nan_of_8_bits(tensor: torch.Tensor) -> torch.Tensor:
    return put_a_nan(tensor).to(torch.float8_e4m3fn)


def double_tensor() -> None:
    tensors = load_file(TENSORS)
    save_file({**tensors, UP: tensors[f"model.{UP}"].clone()}, TENSORS, PT)


def lose_file() -> None:
    os.remove(TENSORS)
    write(f"{TENSORS}.index.json", SHARDS)()


def double_file() -> None:
    shutil.copy(TENSORS, "wrong/b.safetensors")
    shutil.copy(TENSORS, "wrong/c.safetensors")
    lose_file()


class Code:
    def __reduce__(self) -> tuple[object, ...]:
        return (Path("ran").touch, ())


TWICE = "model:\n  base: tiny\ndata:\n  max_length: 64\n  train: rows.jsonl\n  max_length: 128\n"
ALIAS = "wrong/config.yaml", "data: {columns: &a {x: *a}}"
OTHER_TOOL = "base_model: tiny\nload_in_4bit: true\n"
CKPT, ADAPTER = "--ckpt_path wrong.ckpt", "--model.adapter wrong"
BASE, PICKLE = "--model.base wrong", "wrong/pytorch_model.bin"
TOKENIZED = f"{BASE} --data.tokenizer tiny"
NAN = "layers.1.mlp.up_proj.lora_B.weight are NaN or infinite"
UP, B = "layers.1.mlp.up_proj.weight", "layers.1.mlp.up_proj.lora_B.weight"
ELSEWHERE = {"base": "elsewhere", "fingerprint": "f" * 64}
OBJECTS = "or it holds objects that run code when they are loaded"
SWEEP = "sweep --config c.yaml --data.val rows.jsonl --trainer.max_steps -1"
PLAN = "plan --config c.yaml"
PREFERENCES = "--model.class_path qlora_lightning.PreferenceModule"
EVALUATE = "evaluate --config c.yaml --data.val rows.jsonl"
CHAT = "chat --adapter run/adapter"
ASK, JUDGE = "chat --adapter wrong --prompt Hi", f"{EVALUATE} --adapter wrong"
MERGE = "merge --adapter wrong --out merged --rows 0"
WITH_CONFIG = ("validate", "test", "predict", "inspect", "plan", "evaluate", "sweep")
WRONG = [
    # commands and configs
    wrong("fti --config c.yaml", "'fti' is not a command. Did you mean 'fit'?"),
    wrong("fit --config c.yaml d.yaml", "d.yaml", "Did you mean --config d.yaml?"),
    wrong("fit c.yaml --x y", "Did you mean --config c.yaml?"),
    *(wrong(f"{command} c.yaml", "Did you mean --config c.yaml?") for command in WITH_CONFIG),
    wrong("fit c", "There is no option before c. Did you mean --config c.yaml?"),
    *(
        wrong(
            f"{command} {name}",
            f"There is no option before {name}. A config is named by --config FILE",
            "`qlora-lightning recipes copy quickstart` makes configs/quickstart.yaml",
        )
        for command in ("fit", "plan")
        for name in ("quickstart", "configs/quickstart", "quickstart.yaml")
    ),
    wrong("fit 3", "There is no option before 3. A config is named by --config FILE"),
    *(
        wrong(f"fit --config {name}", f"--config {name}: no such file", "`qlora-lightning recipes copy quickstart`")
        for name in ("quickstart", "configs/quickstart.yaml")
    ),
    wrong("fit --config configs/mine.yaml", "`qlora-lightning recipes` lists configs to copy."),
    wrong("fit", "required: base"),
    wrong("fit --config wrong.yaml", "not YAML", "line 2", prepare=write("wrong.yaml", "model: {a: 1\ndata: [\n")),
    wrong("inspect --config wrong.yaml", "'max_length'", "line 4", "line 6", prepare=write("wrong.yaml", TWICE)),
    wrong(
        "evaluate --adapter wrong",
        "wrong/config.yaml cannot be read (RecursionError",
        prepare=change_folder("run", write(*ALIAS)),
    ),
    # keys
    wrong("--model.rnak 3", "model.rnak", "Did you mean 'model.rank'?"),
    wrong(
        "--trainer.val_check_interval 1000 --data.val rows.jsonl",
        "trainer.val_check_interval is 1000: expected at most",
    ),
    wrong("--trainer.accumulate_grad_batches 0", "trainer.accumulate_grad_batches is 0: expected 1 or more"),
    wrong("--trainer.devices -5", "`devices`", "should be an int > 0"),
    wrong("--data.val rows.jsonl --adapter_checkpoint.mode max", "adapter_checkpoint.mode", "Set mode: min."),
    wrong("--evaluation.max_new_tokens -5", "evaluation.max_new_tokens is -5: expected 1 or more"),
    wrong('--model.schedule={"name":"constant","nonsense":3}', "'nonsense', which constant_with_warmup lacks"),
    wrong("--model.lora_r 16", "'model.lora_r'", "Did you mean 'model.rank'?"),
    wrong("--sequence_len 4096", "'sequence_len'", "Did you mean 'data.max_length'?"),
    wrong("--trainer.batch_size 4", "'trainer.batch_size'", "Did you mean 'data.batch_size'?"),
    wrong("--config wrong.yaml", "trainer.max_epochs'?", prepare=write("wrong.yaml", "trainer: {max_epoch: 3}")),
    wrong("plan --config wrong.yaml", "Did you mean 'model.base'?", prepare=write("wrong.yaml", OTHER_TOOL)),
    wrong("--data.format subprocess.call", "expected a plain Python function"),
    wrong("--config wrong.yaml", "model is None: expected settings", prepare=write("wrong.yaml", "model: null")),
    # values
    wrong("--model.quantization 4bit", "Expected one of 'nf4', 'fp4', 'int8', 'none'. Got value: 4bit"),
    wrong("--gradient_checkpointing.enabled maybe", "Expected bool or one of 'auto'. Given value: maybe"),
    wrong("--evaluation 3", "evaluation.enabled: Expected bool"),
    wrong("--model.rank eight", "model.rank: Expected", "int", "eight"),
    wrong("--model.rank null", "model.rank: Expected int"),
    wrong("--data.shuffle null", "data.shuffle: Expected bool"),
    wrong("--data.val_fraction 5%", "data.val_fraction: Expected float or null. Given value: 5%."),
    wrong("--model.rank 0", "model.rank is 0: expected"),
    wrong("--trainer.limit_train_batches 0", "takes no step"),
    wrong("--model.target_modules q_prj", "model.target_modules", "q_proj"),
    wrong("--model.lora_options {'use_rslroa':true}", "use_rslroa", "use_rslora"),
    wrong(
        "--model.lora_options {'trainable_token_indices':[-1]}", "trainable_token_indices has -1", "from 0 to 49,151"
    ),
    wrong("--model.lora_options {'trainable_token_indices':[49152]}", "trainable_token_indices has 49152"),
    wrong("--trainer.precision bf16-true", "precision", "bf16-true"),
    wrong(f"{PREFERENCES} --model.objective ipo --model.gamma 0.1", "gamma is 0.1: expected null"),
    wrong(f"{PREFERENCES} --model.beta .inf", "beta is inf: expected a positive number"),
    wrong(f"{PREFERENCES} --model.objective dop", "Expected one of 'dpo', 'ipo', 'simpo', 'orpo', 'kto'"),
    wrong(f"{PREFERENCES} --model.objective kto --model.sft_share 0.5", "sft_share is 0.5: expected 0 with kto"),
    # bases
    wrong(BASE, UP, "NaN or infinite", prepare=edit_tensor("tiny", UP, put_a_nan)),
    wrong(BASE, UP, "NaN or infinite", prepare=edit_tensor("tiny", UP, put_a_nan_of_8_bits)),
    wrong(BASE, UP, "is stored as I32", prepare=edit_tensor("tiny", UP, lambda tensor: tensor.view(torch.int32))),
    wrong(BASE, f"of another shape: model.{UP} (1)", prepare=edit_tensor("tiny", UP, torch.t_copy)),
    wrong("--model.base run/adapter", "run/adapter an adapter: give it as model.adapter"),
    wrong(TOKENIZED, "config.json is not JSON", prepare=write("wrong/config.json", "{")),
    wrong(
        "inspect --config c.yaml --data.tokenizer wrong",
        "wrong/config.json: expected a JSON object, found list",
        prepare=change_folder("tiny", write("wrong/config.json", "[]")),
    ),
    wrong(
        "inspect --config c.yaml --data.tokenizer wrong",
        "wrong/config.json is not JSON, or it is cut off (Exceeds the limit (4300 digits)",
        prepare=change_folder("tiny", write("wrong/config.json", f'{{"eos_token_id": {"1" * 5000}}}')),
    ),
    wrong(
        BASE,
        "Pickles (pytorch_model.bin), which can run code, are refused",
        prepare=change_folder("tiny", lambda: os.rename(TENSORS, PICKLE)),
    ),
    wrong(BASE, "not a whole safetensors", prepare=change_folder("tiny", cut(TENSORS, TENSORS, 600))),
    wrong(
        BASE, "c.safetensors and b.safetensors both have model.embed_tokens", prepare=change_folder("tiny", double_file)
    ),
    wrong(BASE, f"two tensors for one weight, {UP} and model.{UP}", prepare=change_folder("tiny", double_tensor)),
    wrong(BASE, "/x is a pipe", prepare=change_folder("tiny", lambda: os.mkfifo("wrong/x"))),
    wrong("--model.base tiyn", "'tiyn'", "no such file or folder"),
    wrong("--model.base wrong.gguf", "cannot be read as a GGUF model", prepare=write("wrong.gguf", "<html>")),
    wrong(TOKENIZED, "model_type is 'llama9', which this version", "Update", prepare=write_base("llama9")),
    wrong(TOKENIZED, "a vit is no causal language model. Choose another", prepare=write_base("vit")),
    wrong("--model.base org/none", "org/none", "HF_HUB_OFFLINE"),
    wrong("--model.revision main", "only a hub id has revisions"),
    # data
    wrong("validate --config c.yaml", "data.val"),
    wrong(
        "--data.train wrong.csv --data.on_bad_row skip",
        "wrong.csv cannot be read (ValueError: the row that begins in line 7 has a quote",
        prepare=write("wrong.csv", "prompt,completion\n" + "a,b\n" * 5 + '"a,b\n' + "a,b\n" * 994),
    ),
    wrong(
        "--data.train wrong.csv",
        "wrong.csv:2: no format is recognized by the keys x y;b|z;",
        "{path: FILE, delimiter: ;}",
        prepare=write("wrong.csv", "x y;b|z\na b;c|d\n"),
    ),
    wrong('--data.train={"path":"rows.jsonl","rows":true}', "data.train: rows of rows.jsonl is True: expected a whole"),
    wrong(
        "--data.train wrong.jsonl",
        "data.train: no train files in the folder wrong.jsonl: expected .jsonl, ",
        prepare=lambda: os.mkdir("wrong.jsonl"),
    ),
    wrong("--data.train=", "data.train: expected a file, folder, glob, URL or hub id"),
    wrong(
        "--data.train wrong.jsonl",
        "wrong.jsonl is a link to nowhere, which does not exist",
        prepare=lambda: os.symlink("nowhere", "wrong.jsonl"),
    ),
    # checkpoints
    wrong("--ckpt_path none.ckpt", "none.ckpt", "no such file"),
    wrong("validate --config c.yaml --data.val rows.jsonl --ckpt_path last", "there is no checkpoint in new"),
    wrong(CKPT, "not a checkpoint", prepare=cut(LAST, "wrong.ckpt", 20_000)),
    wrong(CKPT, OBJECTS, prepare=lambda: torch.save({"state_dict": Code()}, "wrong.ckpt")),
    wrong(CKPT, "BadZipFile: it is compressed", prepare=compress_checkpoint),
    wrong(f"--ckpt_path {LAST} --model.rank 3", "model.rank 2", "here it is 3"),
    wrong(f"--ckpt_path {LAST} --model.optimizer torch.optim.SGD", "is torch.optim.sgd.SGD, "),
    wrong('--model.optimizer {"class_path":"torch.optim.SGD","init_args":{"momentun":0.9}}', "SGD rejects", "momentun"),
    # adapters
    wrong("--model.adapter none", "none", "no such folder"),
    wrong(ADAPTER, "not a whole safetensors file", prepare=change_folder(RUN, cut(WEIGHTS, WEIGHTS, 900))),
    wrong(ADAPTER, "no adapter_model.safetensors", prepare=change_folder(RUN, lambda: Path(WEIGHTS).unlink())),
    wrong(MERGE, f"{B} are NaN or infinite", prepare=edit_tensor(RUN, B, put_a_nan)),
    wrong(MERGE, "x is a pipe or a device", prepare=change_folder(RUN, lambda: os.symlink("/dev/zero", "wrong/x"))),
    # folders
    wrong("--trainer.default_root_dir run", "holds a run already", "`--ckpt_path last`", "--trainer.default_root_dir "),
    wrong("--data.train row.jsonl", "row.jsonl", "rows.jsonl"),
    wrong("--trainer.default_root_dir rows.jsonl", "rows.jsonl", "not a directory. Choose another path."),
    # other commands
    wrong(f"{PLAN} --device-memory 16", "--device-memory: '16': expected a size with its unit, such as 16GiB or"),
    wrong(f"{PLAN} --json rows.jsonl", "--json rows.jsonl exists already", "--force"),
    wrong(f"{PLAN} --trainer.accelerator gpu", "add --device-memory"),
    wrong(f"{SWEEP} --ranks 2,4 --model.adapter run/adapter", "model.adapter brings its own rank"),
    wrong(f"{SWEEP} --trainer.max_steps 4", "A trial ends at step 4, before its first validation. Shorten the epoch"),
    wrong(f"{SWEEP} --trainer.check_val_every_n_epoch 2", "A trial ends at step 5, before"),
    wrong(f"{SWEEP} --trainer.limit_val_batches 0", "trainer.limit_val_batches is 0: expected rows"),
    wrong(f"{SWEEP} --trainer.fast_dev_run 1", "leave trainer.fast_dev_run out"),
    wrong(f"{SWEEP} --adapter_checkpoint null", "leave adapter_checkpoint.enabled out"),
    wrong(f"{SWEEP} --trainer.devices 2", "A sweep needs --trainer.devices 1"),
    wrong(f"{SWEEP} --ranks 8,8", "'8,8': expected two ranks or more, each once"),
    wrong(f"{SWEEP} --trials 3", "--trials is for --search"),
    wrong(f"{SWEEP} --prune", "--prune is for --search"),
    wrong(f"{SWEEP} --ranks 2,4 --search model.rank=2,4", "--ranks doubles and --search tries: leave one out"),
    wrong(f"{SWEEP} --ranks 2,4 --model.rank 8", "The sweep sets model.rank itself"),
    wrong(f"{SWEEP} --search model.rnak=2,4", "There is no key 'model.rnak'. Did you mean 'model.rank'?"),
    wrong(f"{SWEEP} --search model.rank=1..x", "expected KEY=LOW..HIGH"),
    wrong(f"{SWEEP} --search model.rank=0..4", "model.rank is 0: expected"),
    *(
        wrong(f"{SWEEP} --search model.rank={values}", f"'model.rank={values}': expected KEY=LOW..HIGH, or two values")
        for values in ("8..2", "4..4", "2..", "2..nan", "2", "2,2", "")
    ),
    wrong(f"{SWEEP} --search model.learning_rate=1e-4..inf", "expected KEY=LOW..HIGH"),
    wrong(f"{SWEEP} --search model.rank", "'model.rank': expected KEY=LOW..HIGH"),
    wrong(f"{SWEEP} --search model.rank=2..4.5", "model.rank: Expected", "int", "2.0"),
    wrong(f"{SWEEP} --search seed_everything=1,2", "--search seed_everything: use --seeds"),
    wrong(f"{SWEEP} --search ckpt_path=best,last", "--search ckpt_path: each trial continues by itself"),
    wrong(f"{SWEEP} --search trainer.default_root_dir=a,b", "trainer.default_root_dir: each trial has a folder of its"),
    wrong(f"{SWEEP} --search trainer.devices=1,2", "--search trainer.devices: each trial has one"),
    wrong(f"{SWEEP} --search model.rank=2,4 --model.alpha 4", "The sweep sets model.alpha itself"),
    wrong(
        f"{SWEEP} --search model.dropout=0..1",
        "--search model.dropout=0..1 would draw whole numbers only, but model.dropout takes any: write 0.0..1.0.",
    ),
    wrong(f"{SWEEP} --search model.rank=2,4 --search model.rank=8..9", "--search has a key twice: model.rank"),
    wrong(f"{SWEEP} --search model.rank=2..4 --trials 4", "--search has 3 combinations: pass --trials 3"),
    wrong(f"{SWEEP} --search model.rank=1..6 --trials 5 --prune", "--prune begins after 5 trials, and there are 5"),
    wrong(f"{SWEEP} --search model.rank=1..6 --prune", "--prune needs several validations in a trial"),
    wrong(f"{SWEEP} --search data.max_length=512,50", "With data.max_length=50 the validation rows are others"),
    wrong(f"{SWEEP} --search model.rank=2,4 --trials 2", "--trials is for ranges"),
    wrong(f"{SWEEP} --search evaluation.rows=2,4", "it changes no training"),
    wrong(f"{SWEEP} --seed_everything false", "seed_everything is false", "set it to a number"),
    wrong(
        f"{SWEEP} --search model.target_modules=foo,attention",
        "model.target_modules names 'foo', which the base does not have",
    ),
    wrong(f"{CHAT} --prompt <|im_end|>", "--prompt was not answered"),
    wrong("report run --out /dev/full", "No space left on device: '/dev/full'. Make room, or choose"),
    wrong(
        "report wrong", "manifest.json: best is [1], expected object", prepare=edit("run", "manifest.json", best=[1])
    ),
    wrong("report run/adapter", "run/adapter holds no run: expected manifest.json in it"),
    wrong(f"{EVALUATE} --adapter x=run --adapter x=run", "'x' is taken"),
    wrong(f"{EVALUATE} --adapter run --scores bleu", "There is no score 'bleu': expected auto, some of exact_match"),
    wrong(f"{EVALUATE} --adapter run --forgetting nothing.jsonl", "evaluation.forgetting: data file nothing.jsonl"),
    wrong(f"{EVALUATE} --adapter run --data.test no.jsonl", "data.test: data file no.jsonl does not exist"),
    wrong(f"{EVALUATE} --adapter run --split test", "name a file in `data.test`"),
    wrong(f"{EVALUATE} --adapter run --model.adapter run", "evaluate takes adapter folders, by --adapter DIR"),
    wrong("evaluate", "Nothing to evaluate: pass --adapter DIR"),
    wrong(EVALUATE, "new/adapter is not an adapter folder: there is no such folder"),
    wrong("recipes copy quickstrat", "recipes copy quickstrat: expected one of ", "quickstart"),
]
PLAN_BASE = f"{PLAN} {BASE}"
NO_MODEL, NOT_ITS = "wrong/config.json describes no model that loads", "wrong does not hold the tensors that its config"
BASES = [  # other keys in config.json, and words of the message
    (PLAN_BASE, {"model_type": 5}, "wrong/config.json: model_type is 5, expected str"),
    (PLAN_BASE, {"use_bidirectional_attention": True}, "wrong/config.json: use_bidirectional_attention is True"),
    (TOKENIZED, {"hidden_size": "64"}, NO_MODEL, "'hidden_size' expected int, got str"),
    (BASE, {"hidden_size": 10**6}, "wrong/config.json describes", "weights, but the files next to it hold"),
    (BASE, {"tie_word_embeddings": False}, NOT_ITS, "missing: lm_head.weight (1)"),
    (BASE, {"num_hidden_layers": 1}, NOT_ITS, "left over: model.layers.1."),
    (BASE, {"rms_norm_eps": math.nan}, "Nothing is trained yet: look at the base wrong first, at its config.json"),
    (BASE, {"rope_parameters": {"rope_type": "default", "rope_theta": 0}}, "look at the base wrong first"),
    (BASE, {"quantization_config": {"quant_method": "nf4"}}, "stored quantized as nf4 (not by bitsandbytes)"),
    (BASE, {"quantization_config": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}}, NO_MODEL),
]
WRONG += [wrong(line, *words, prepare=edit("tiny", "config.json", **values)) for line, values, *words in BASES]
ADAPTERS = [  # other keys in adapter_config.json, and words of the message
    (ADAPTER, {"r": "2"}, "wrong/adapter_config.json: r is '2', expected int"),
    (ASK, {"r": 3}, "does not fit the adapter of this model", "is (2, 128) there, (3, 128) here"),
    (JUDGE, {"peft_type": "IA3"}, "peft_type is 'IA3', expected Literal['LORA']"),
    (ADAPTER, {"layer_replication": [[0, 2], [0, 2]]}, "layer_replication is [[0, 2], [0, 2]], expected None"),
]
IDENTITIES = [
    (ADAPTER, ELSEWHERE, "another base", "elsewhere (weights ffffffffffff)"),
    (ASK, {"compute_dtype": "int8"}, "wrong/qlora_lightning.json: compute_dtype is 'int8', expected Literal["),
    (ASK, {"data": {"settings": {"system": 5}}}, "data: settings: system is 5, expected str"),
]
for name, cases in (("adapter_config.json", ADAPTERS), ("qlora_lightning.json", IDENTITIES)):
    WRONG += [wrong(line, *words, prepare=edit(RUN, name, **values)) for line, values, *words in cases]
MOMENT = "exp_avg of tensor 0 is (3,), expected (2, 64)"
CHECKPOINTS = [
    (lambda saved: saved.pop(OURS), "not written by qlora_lightning"),
    (lambda saved: saved[OURS].update(format_version=99), "format version 99"),
    (lambda saved: saved[OURS]["identity"].update(ELSEWHERE), "elsewhere (weights ffffffffffff) there", "tiny (weigh"),
    (lambda saved: saved.pop("optimizer_states"), "wrong.ckpt: optimizer_states is missing, expected list"),
    (lambda saved: saved["optimizer_states"][0]["state"][0].update(exp_avg=torch.zeros(3)), MOMENT),
]
RESUME = f"{CKPT} --trainer.max_steps 3"
WRONG += [wrong(RESUME, *words, prepare=edit_checkpoint(change)) for change, *words in CHECKPOINTS]
if not torch.cuda.is_available():
    WRONG.append(wrong("--trainer.accelerator cuda", "trainer", "CUDA"))


@pytest.fixture(scope="module")
def prepared(tiny_base, tmp_path_factory):
    """A folder with a config, rows, a base and a run that was stopped inside an epoch."""
    folder = tmp_path_factory.mktemp("prepared")
    write_rows(folder / "rows.jsonl", counting_rows(10))
    (folder / "c.yaml").write_text(CONFIG)
    (folder / "tiny").symlink_to(tiny_base)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["fit", "--config", "c.yaml", "--trainer.default_root_dir", "run"]) == 0
    return folder


def written(folder: Path) -> dict[str, int]:
    """Give each file's time, without the bytecode that Python keeps of a module that is imported."""
    files = [*folder.rglob("*"), *(folder / "tiny").rglob("*")]
    return {str(file): file.stat().st_mtime_ns for file in files if file.is_file() and file.suffix != ".pyc"}


@pytest.fixture
def reject(prepared, tmp_path, monkeypatch, capsys):
    """Run a wrong input in a copy of the folder; return the message."""
    shutil.copytree(prepared, tmp_path, dirs_exist_ok=True, symlinks=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # read from the environment at import

    def run(line: str) -> str:
        before = written(tmp_path)
        capsys.readouterr()
        code = main(["fit", "--config", "c.yaml", *line.split()] if line.startswith("--") else line.split())
        captured = capsys.readouterr()
        assert code == 2, captured.out + captured.err
        assert "Traceback" not in captured.out + captured.err
        after = written(tmp_path)
        assert {name: after.get(name) for name in before} == before
        assert not [name for name in after.keys() - before.keys() if not name.startswith(f"{tmp_path}/new/")]
        return captured.err.rpartition("qlora-lightning: ")[2]

    yield run
    logging.getLogger("qlora_lightning").handlers.clear()


@pytest.mark.filterwarnings("ignore")  # what libraries warn of before the input is rejected is not at issue here
@pytest.mark.parametrize(("arguments", "words", "prepare"), WRONG)
def test_wrong_input_is_reported_in_one_sentence_and_touches_nothing(reject, arguments, words, prepare):
    prepare()
    message = reject(arguments)
    assert [word for word in words if word not in message] == [], message
    assert message.count("\n") <= 1, message


@pytest.mark.parametrize("value", ["/proc/no", "rows.jsonl"])
def test_a_cache_that_cannot_be_written_to_is_reported(reject, monkeypatch, value):
    monkeypatch.setenv("QLORA_LIGHTNING_CACHE", value)
    message = reject("--data.train rows.jsonl")
    assert all(word in message for word in (value, "QLORA_LIGHTNING_CACHE")), message
