"""What runs on the stub of a card: ``python -m tests.gpu.on_card NAME FOLDER`` prints what NAME finds, as JSON."""

import ctypes
import json
import struct
import sys
import warnings
from math import prod
from pathlib import Path

import pytest
import torch
from lightning import Callback
from transformers import AutoConfig, AutoModelForCausalLM

from qlora_lightning import LossSums, QLoRAModule, UserError
from qlora_lightning.callbacks import Evaluation, GradientCheckpointing, ThroughputMonitor
from qlora_lightning.cli import main
from qlora_lightning.model import guards, self_check
from qlora_lightning.model.memory.budget import TokenBudget
from qlora_lightning.model.step import validation
from qlora_lightning.report import read_metrics
from tests.benchmarks.stub_step import counts
from tests.gpu.conftest import make_base, make_module
from tests.random_base import save_tokenizer
from tests.rows import write_rows
from tests.steps import fit, make_batch

CARD = ctypes.CDLL(None)  # the stub is loaded before Python
MIB, ALL = 2**20, 2**60
for room in (guards, validation):  # the stub computes nothing: each count that is read from it is 0
    room.reject_uncounted = lambda what: None


def leave(size):
    """Leave so many bytes free: another process takes all else."""
    torch.cuda.empty_cache()
    CARD.card_hold(ctypes.c_size_t(0))
    CARD.card_hold(ctypes.c_size_t(max(0, torch.cuda.mem_get_info()[0] - int(size))))


def save_wide(folder, layers, vocabulary=512):
    """Write a base of Llama-3.1-8B's width with few layers, whose weights are zeros that take no space on the disk."""
    folder.mkdir()
    save_tokenizer(folder, [f"Count to {n}: " + " ".join(map(str, range(n))) for n in range(24)], size=512)
    sizes = {"num_hidden_layers": layers, "vocab_size": vocabulary, "bos_token_id": 0, "eos_token_id": 1}
    config = AutoConfig.from_pretrained("configs/shapes/llama-3.1-8b", dtype="bfloat16", **sizes)
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, param in model.named_parameters():
        start, end = end, end + 2 * prod(param.shape)
        header[name] = {"dtype": "BF16", "shape": list(param.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return folder


def rows_of(lengths):
    """Make a row of about so many tokens each."""
    return [{"instruction": f"Count. Row {n}.", "output": " 7" * length} for n, length in enumerate(lengths)]


def run(command, **settings):
    """Run a command; its settings have two underscores in the place of a dot."""
    options = [f"--{name.replace('__', '.')}={value}" for name, value in settings.items()]
    assert main([command, *options]) == 0, options


# ---- whole runs ------------------------------------------------------------------------------------------------------


def whole(folder):
    """Train with validations and answers in a first and a second start, and resume the second."""
    rows = write_rows(folder / "rows.jsonl", rows_of(range(10, 42, 2)))
    settings = {"model__base": save_wide(folder / "base", 2), "data__train": rows, "data__val": rows}
    settings |= {"data__batch_size": 4, "trainer__max_steps": 6, "trainer__max_epochs": 4, "evaluation__rows": 4}
    for name in ("first", "second"):
        torch.cuda.reset_peak_memory_stats()
        run("fit", **settings, trainer__default_root_dir=folder / name)
    run("fit", **settings | {"trainer__max_steps": 8}, trainer__default_root_dir=folder / name, ckpt_path="last")
    evaluation = json.loads((folder / name / "evaluation.json").read_text())
    steps = [step for step, _ in read_metrics(folder / name / "metrics.csv")["train_loss"]]
    return {"steps": steps, "answered": evaluation["answered_rows"]}


def preferences(folder):
    """Train by DPO, and merge the adapter."""
    pairs = [{"prompt": f"Count to {n}.", "chosen": "1 2 3", "rejected": "No. " * n} for n in range(1, 9)]
    rows = write_rows(folder / "rows.jsonl", pairs)
    settings = {"model": "qlora_lightning.PreferenceModule", "model__base": make_base(folder), "data__train": rows}
    settings |= {"data": "qlora_lightning.PreferenceDataModule", "data__val": rows, "trainer__max_steps": 2}
    # the evaluation would read from the card that there is no pair
    run("fit", **settings, evaluation="null", trainer__default_root_dir=folder / "run")
    run("merge", adapter=folder / "run" / "adapter", out=folder / "merged")
    return {"merged": (folder / "merged" / "model.safetensors").exists()}


# ---- out of memory ---------------------------------------------------------------------------------------------------


class Watched(QLoRAModule):
    """Counts the passes whose forward did not end, and keeps the peak of the last one that did."""

    unfinished = peak = 0

    def compute_loss(self, batch):
        self.unfinished += 1
        sums = super().compute_loss(batch)
        self.unfinished -= 1
        self.peak = torch.cuda.max_memory_allocated()
        return sums


class OtherProcess(Callback):
    """Takes all memory but some bytes during the second step, validations, or behind the fit; and measures steps."""

    def __init__(self, place, free):
        self.place, self.free = place, free

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self._take("step", trainer.global_step == 1)
        self.tokens = batch["input_ids"].numel()
        self.held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.forward, self.step = pl_module.peak - self.held, torch.cuda.max_memory_allocated() - self.held
        leave(ALL)

    def on_validation_batch_start(self, *_):
        self._take("validation")

    def on_validation_end(self, *_):
        leave(ALL)

    def on_fit_end(self, *_):
        self._take("evaluation")

    def _take(self, place, is_due=True):
        if place == self.place and is_due:
            leave(self.free)


def scarce(folder):
    """Train on a card whose memory is short in one place."""
    rows = write_rows(folder / "rows.jsonl", rows_of([200] * 16))
    long = write_rows(folder / "long.jsonl", rows_of([1000] * 4))
    module, found = Watched(str(save_wide(folder / "base", 6)), cache=False), {}

    def train(name, rows, place=None, free=0, tokens=1 << 20, checkpointed="auto"):
        module.token_budget, module.unfinished = TokenBudget(tokens), 0
        other = OtherProcess(place, free)
        callbacks = [other, Evaluation(enabled=place == "evaluation", rows=4), GradientCheckpointing(checkpointed)]
        fit(module, folder, rows, val=True, batch_size=16, accelerator="gpu", max_steps=2, callbacks=callbacks)
        leave(ALL)
        budget = module.token_budget
        found[name] = [budget.tokens / other.tokens, str(budget.fits[0].choice), module.unfinished]
        return other

    for name, tokens in (("planned", "auto"), ("loaded", 1 << 20)):
        leave(200 * MIB)
        with pytest.raises(UserError) as error:
            train(name, rows, tokens=tokens)
        found[name] = [str(error.value), module.model is None]
        leave(ALL)
    ample = train("ample", rows)
    train("forward", rows, "step", ample.forward / 2)
    train("validation", rows, "validation", 300 * MIB)
    train("evaluation", rows, "evaluation", 100 * MIB)
    alone = train("alone", long, tokens=1)
    train("row", long, "step", 0.8 * alone.step, tokens="auto")
    again = train("again", rows, checkpointed=True)
    train("backward", rows, "step", (again.forward + again.step) / 2, checkpointed=True)
    return found


# ---- memory, launches and waits --------------------------------------------------------------------------------------


def memory(folder):
    """Plan steps of a base with Llama-3.1-8B's vocabulary and heads, and take them; and many with ragged rows."""
    base, rows, found = save_wide(folder / "base", 8, 128_256), folder / "rows.jsonl", {}
    settings = {"model__base": base, "model__cache": "false", "model__rank": 16, "data__train": rows}
    settings |= {"data__format": "tokens", "data__val_fraction": "null", "trainer__log_every_n_steps": 1}
    for name, dtype, tokens, enabled, offload in (
        ("plain", "bf16", 4892, "false", "false"),
        ("plain in fp32", "fp32", 3892, "false", "false"),
        ("checkpointed", "bf16", 9462, "true", "false"),
        ("offloaded", "bf16", 3859, "true", "true"),
    ):
        write_rows(rows, tokens_of(4 * [*[1024] * (tokens // 1024), tokens % 1024]))
        choice = {"gradient_checkpointing__enabled": enabled, "gradient_checkpointing__offload": offload}
        choice |= {"model__compute_dtype": dtype}
        options = settings | choice | {"data__shuffle": "false", "data__batch_size": 1 + tokens // 1024}
        found[name] = peak_and_plan(folder / name, options)
    lengths = torch.randint(50, 1500, (60 * 16,), generator=torch.Generator().manual_seed(0))
    write_rows(rows, tokens_of(lengths.tolist()))
    leave(8 << 30)
    torch.cuda.reset_accumulated_memory_stats()
    run("fit", **settings, data__batch_size=16, trainer__default_root_dir=folder / "ragged")
    found |= {name: read_gib(folder / "ragged", name) for name in ("allocated", "peak", "reserved")}
    return found | {"retries": torch.cuda.memory_stats()["num_alloc_retries"]}


def peak_and_plan(folder, settings):
    """Plan steps, and take them; return both numbers of bytes."""
    folder.mkdir(exist_ok=True)
    run("plan", **settings, json=folder / "plan.json")
    run("fit", **settings, trainer__default_root_dir=folder / "run")
    plan = json.loads((folder / "plan.json").read_text())["memory"]
    peak = max(read_gib(folder / "run", "peak"))
    return [peak * 2**30, plan["peak_bytes"] - plan["parts"]["context"]]  # which is not torch's


def kinds(folder):
    """Plan steps of an int8 base of Llama-3.1-8B's width, and of pairs with a reference, and take them."""
    base, rows = save_wide(folder / "base", 8, 128_256), write_rows(folder / "rows.jsonl", tokens_of(8 * [1024]))
    plain = {"model__base": base, "model__cache": "false", "trainer__log_every_n_steps": 1, "data__batch_size": 4}
    plain |= {"data__val_fraction": "null", "gradient_checkpointing__enabled": "false"}
    checkpointed = plain | {"gradient_checkpointing__enabled": "true", "gradient_checkpointing__offload": "false"}
    found, rows_of_tokens = {}, {"data__train": rows, "data__format": "tokens"}
    for name, settings in {"plain": plain, "checkpointed": checkpointed}.items():
        settings = settings | rows_of_tokens | {"model__quantization": "int8"}
        found[f"int8 {name}"] = peak_and_plan(folder / f"int8-{name}", settings)
    answers = {"chosen": "1 2 3 " * 80, "rejected": "No. " * 80}
    pairs = [{"prompt": f"Count to {n}.", **answers} for n in range(8)]
    kinds = {"model": "qlora_lightning.PreferenceModule", "data": "qlora_lightning.PreferenceDataModule"}
    settings = plain | kinds | {"data__train": write_rows(folder / "pairs.jsonl", pairs), "evaluation": "null"}
    found["dpo"] = peak_and_plan(folder / "dpo", settings)
    return found


def read_gib(run_folder, name):
    return [gib for _, gib in read_metrics(run_folder / "metrics.csv")[f"memory_{name}_gib"]]


def tokens_of(lengths):
    return [{"input_ids": [2] * length, "labels": [-100] + [2] * (length - 1)} for length in lengths]


class Logs(QLoRAModule):
    def compute_loss(self, batch):
        sums = super().compute_loss(batch)
        return LossSums(sums.loss_sum, sums.count, {"nll": sums.loss_sum, "tokens": sums.count})


class Steps(Callback):
    """What the host waits for and reads in each step."""

    def __init__(self):
        self.found = []

    def on_train_batch_start(self, *_):
        CARD.card_reset()

    def on_train_batch_end(self, *_):
        self.found.append(counts()[1:])


def count_kernels(module, lengths=(200, 100, 300)):
    """Count the kernels of a step's forward and backward, on a batch of such samples."""
    for _ in range(2):  # the first compiles
        batch = make_batch(lengths) | {"row_ids": torch.arange(len(lengths)), "source": torch.zeros(len(lengths))}
        micro_batch = module.micro_batch_of(batch)
        module.zero_grad(set_to_none=True)
        CARD.card_reset()
        loss = module.compute_loss(micro_batch).loss_sum
        forward = counts()[0]
        loss.backward()
    return torch.tensor([forward, counts()[0] - forward])


def rows(folder):
    """Count the kernels of few and of many samples in fp16 and in fp32."""
    base = save_wide(folder / "base", 2)
    modules = {dtype: make_module(base, "cuda", compute_dtype=dtype) for dtype in ("fp16", "fp32")}
    lengths = (200, 400), (60,) * 10
    return {name: [count_kernels(module, each).tolist() for each in lengths] for name, module in modules.items()}


def launches(folder):
    """Count the kernels of a layer, by models of two and of six, and what the host waits for."""
    kernels = []
    for layers in (2, 6):
        base = save_wide(folder / str(layers), layers)
        kernels.append(count_kernels(make_module(base, "cuda", compute_dtype="bf16")))
    found = {"layer": ((kernels[1] - kernels[0]) / 4).tolist(), "passes": counts()[1:]}
    rows = write_rows(folder / "rows.jsonl", rows_of([50] * 16))
    options = {"accelerator": "gpu", "deterministic": True, "max_steps": 6}
    fit(Logs(str(base), cache=False), folder, rows, **options, callbacks=[ThroughputMonitor(), steps := Steps()])
    return found | {"steps": steps.found}


def check(folder):
    """Count what the check of a first start takes at Llama-3.1-8B's widths; and train where it finds a fault."""
    base, found = save_wide(folder / "base", 2, 128_256), {}
    for name in ("auto", "fp16", "fp32"):
        module = make_module(base, "cuda", compute_dtype=name)
        model_dtype = module.precision.dtype
        assert self_check.find_faults(module.causal_lm, model_dtype) == []  # kernels are compiled
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        CARD.card_reset()
        self_check.find_faults(module.causal_lm, model_dtype)
        launches, _, reads = counts()
        found[name] = [launches, reads, (torch.cuda.max_memory_allocated() - held) / 2**30]
        del module
    rows = write_rows(folder / "rows.jsonl", rows_of([200] * 16))
    settings = {"model__base": base, "model__cache": "false", "data__train": rows, "data__val_fraction": "null"}
    settings |= {"trainer__max_steps": 2, "evaluation": "null"}
    for name in ("healthy", "faulty"):
        run("fit", **settings, trainer__default_root_dir=folder / name)
        self_check.compare_paths = lambda *_: [self_check.Comparison("layer", "output", 1.0, 0.06)]
        main(["cache", "clear", "--kind", "checks"])
    return found


if __name__ == "__main__":
    warnings.filterwarnings("error", "The .grad attribute of a Tensor")  # when a region is compiled
    name, folder = sys.argv[1:]
    print(json.dumps(globals()[name](Path(folder))))
