"""Steps of a model of Llama-3.1-8B's shape on the stub of a card: ours, PEFT's as it is, Unsloth's; and fits.

Unsloth's interpreter needs no more of this project than this folder.
"""

import contextlib
import ctypes
import gc
import io
import itertools
import json
import re
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from tests.benchmarks.child import ROOT

GIB = 2**30
SHAPES = ROOT / "configs" / "shapes"
ROW = 1024  # tokens
RANK = 16


def counts() -> list[int]:
    """Return launches, waits, and reads by the host."""
    values = (ctypes.c_long * 3)()
    ctypes.CDLL(None).card_counts(values)
    return list(values)


def make_model(shape: str, layers: int) -> Any:
    """Return a model with adapters whose tensors are memory of the card, without loading anything."""
    from bitsandbytes.functional import QuantState
    from bitsandbytes.nn import Params4bit
    from bitsandbytes.nn.parametrize import replace_parameter_4bit
    from transformers import AutoConfig

    from qlora_lightning.model.load.build import meta_base, put_adapters

    config = AutoConfig.from_pretrained(SHAPES / shape).get_text_config()
    config.num_hidden_layers = layers
    options = {"alpha": None, "dropout": 0.0, "target_modules": "all-linear", "layers": "all", "lora_options": None}
    model = put_adapters(meta_base(config, torch.bfloat16, "nf4"), None, rank=RANK, **options)

    def empty(*size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device="cuda")

    for module in list(model.modules()):
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, empty(*buffer.shape, dtype=buffer.dtype))
        for name, param in list(module.named_parameters(recurse=False)):
            data = empty(*param.shape, dtype=param.dtype)
            if isinstance(param, Params4bit):
                state, scales = param.quant_state, param.numel() * 2 // 64
                state.absmax, state.code, state.offset = empty(scales, dtype=torch.uint8), empty(16), empty()
                state.nested, state.state2 = True, QuantState(empty(scales // 256), code=empty(256), blocksize=256)
                state.state2.dtype = torch.float32
                options = {"quant_state": state, "quant_type": "nf4", "bnb_quantized": True}
                setattr(module, name, Params4bit(data, requires_grad=False, **options))
            elif param.dim() == 3:  # experts for a peer
                setattr(module, name, torch.nn.Parameter(data, requires_grad=False))
                replace_parameter_4bit(module, name, compress_statistics=True, quant_type="nf4")
            else:
                setattr(module, name, torch.nn.Parameter(data, requires_grad=param.requires_grad))
    return model.train()


def route_evenly() -> None:
    """Give each expert the same number of tokens: the stub computes no indices, but has their launches and reads."""
    from qlora_lightning.model.layers import experts

    def sort_by_expert(top_k_index: torch.Tensor, n_experts: int) -> Any:
        flat = top_k_index.reshape(-1)
        order = flat.argsort(stable=True)
        torch.searchsorted(flat[order], torch.arange(n_experts + 1, device=flat.device)).tolist()
        bounds = [len(flat) * expert // n_experts for expert in range(n_experts + 1)]
        slices = {expert: slice(*pair) for expert, pair in enumerate(itertools.pairwise(bounds)) if pair[0] < pair[1]}
        return order, order.argsort(), slices

    experts.sort_by_expert = sort_by_expert


def prepare_ours(mode: str, tokens: int, shape: str, layers: int, row: int = ROW) -> Any:
    """Return a model, and a function that computes its loss from a batch on the host, in rows of so many tokens."""
    from qlora_lightning import QLoRAModule
    from qlora_lightning.model.activation_checkpointing import enable_activation_checkpointing
    from qlora_lightning.model.layers.select import fuse_layers
    from tests.steps import make_batch

    route_evenly()
    module, card = QLoRAModule(str(SHAPES / shape)), torch.device("cuda", 0)
    module.model, module._device, module.identity["compute_dtype"] = make_model(shape, layers), card, "bfloat16"
    fuse_layers(module.model)
    module._choose_precision()
    module.token_budget.tokens = tokens
    if mode != "plain":
        enable_activation_checkpointing(module.causal_lm, mode == "offloaded")
    rows = tokens // row
    batch = make_batch([row] * rows) | {"row_ids": torch.arange(rows), "source": torch.zeros(rows)}

    def loss() -> torch.Tensor:
        return module.compute_loss(batch).loss_sum

    return module.model, loss


def prepare_rows(model: Any, tokens: int, row: int = ROW, **options: Any) -> Any:
    """Return a peer's model, and a function that computes its loss of rows of so many tokens."""
    rows = torch.zeros(tokens // row, row, dtype=torch.int64, device="cuda")

    def loss() -> Any:
        with torch.autocast("cuda", torch.bfloat16):
            return model(input_ids=rows, labels=rows, **options).loss

    return model, loss


def prepare_peft(mode: str, tokens: int, shape: str, layers: int, row: int = ROW) -> Any:
    """Prepare PEFT; its experts, in bitsandbytes' parametrization, are made dense a layer at a time."""
    from qlora_lightning.model.load import build

    build.pack_experts = lambda *_: None
    model = make_model(shape, layers)
    if mode != "plain":
        model.get_base_model().activation_checkpointing_enable({"use_reentrant": False})
    return prepare_rows(model, tokens, row, use_cache=False)


def prepare_unsloth(mode: str, tokens: int, folder: str) -> Any:
    from unsloth import FastLanguageModel

    model, _ = FastLanguageModel.from_pretrained(folder, max_seq_length=4096, load_in_4bit=True, dtype=torch.bfloat16)
    targets = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]
    options = {"r": RANK, "lora_alpha": 2 * RANK, "lora_dropout": 0, "bias": "none", "target_modules": targets}
    choices = {"plain": False, "checkpointed": True, "offloaded": "unsloth"}
    model = FastLanguageModel.get_peft_model(model, **options, use_gradient_checkpointing=choices[mode])
    FastLanguageModel.for_training(model)
    return prepare_rows(model, tokens)


def measure(side: str, mode: str, base: str, tokens: int, shape: str, layers: int, row: int = ROW) -> dict[str, Any]:
    """Take steps with AdamW: peak of memory, launches, waits, reads, and the CPU time of the host's passes."""
    if side == "unsloth":
        model, loss = prepare_unsloth(mode, tokens, base)
    else:
        model, loss = {"ours": prepare_ours, "peft": prepare_peft}[side](mode, tokens, shape, layers, row)
    optimizer = torch.optim.AdamW([param for param in model.parameters() if param.requires_grad], fused=True)
    milliseconds, figures = [], {}
    for number in range(12):
        torch.cuda.reset_peak_memory_stats()
        ctypes.CDLL(None).card_reset()
        began = time.process_time()
        value = loss()
        forward = counts()[0]
        value.backward()
        if number > 3:  # kernels are compiled, and warm
            milliseconds.append(1000 * (time.process_time() - began))
        launches, waits, reads = counts()
        figures = {"forward": forward, "backward": launches - forward, "launches": launches}
        figures |= {"waits": waits, "reads": reads, "gib": torch.cuda.max_memory_allocated() / GIB}
        del value
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        gc.collect()
    return figures | {"host": median(milliseconds)}


def fit(folder: str, name: str, **settings: Any) -> dict[str, Any]:
    """Run a fit of five steps, and plan its tokens: how many at a time, both peaks, how often they were lowered."""
    from qlora_lightning.cli import main
    from qlora_lightning.report import read_metrics

    run, lines = Path(folder, name), io.StringIO()
    usual = {"model.base": f"{folder}/base", "data.train": f"{folder}/rows.jsonl", "data.format": "tokens"}
    usual |= {"data.val_fraction": "null", "trainer.log_every_n_steps": 1, "trainer.default_root_dir": run}
    options = [f"--{key}={value}" for key, value in (usual | settings).items()]
    with contextlib.redirect_stdout(lines):
        assert main(["fit", *options, "--trainer.max_steps=5", "--evaluation=null"]) == 0
    printed = " ".join(lines.getvalue().split())
    (tokens, choice), (loaded,) = (
        re.search(pattern, printed).groups()
        for pattern in (r"At most ([\d,]+) tokens go through the model at a time, ([^.]+)", r"after loading: ([\d.]+)")
    )
    options.append(f"--model.micro_batch_tokens={tokens.replace(',', '')}")
    options += [f"--gradient_checkpointing.enabled={str('without' not in choice).lower()}", f"--json={run}.json"]
    options.append(f"--gradient_checkpointing.offload={str('host' in choice).lower()}")
    main(["plan", *options])
    plan = json.loads(Path(f"{run}.json").read_text())["memory"]
    peak = max(gib for _, gib in read_metrics(run / "metrics.csv")["memory_peak_gib"])
    planned = (plan["peak_bytes"] - plan["parts"]["context"]) / GIB  # the context is not torch's
    lowered = printed.count("Memory ran out")
    return {"tokens": tokens, "choice": choice, "loaded": loaded, "planned": planned, "gib": peak, "lowered": lowered}
