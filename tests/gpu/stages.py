"""The first 45 minutes on a card: ``python -m tests.gpu.stages FOLDER [STAGE …]``.

Each stage is a process of its own, takes at most eight minutes, and writes a log into the folder. A stage that fails,
or takes too long, keeps none of the others from running. With the names of stages only these run.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import quantize_4bit
from transformers import AutoConfig, AutoModelForCausalLM

from qlora_lightning.model.activation_checkpointing import Checkpointing
from qlora_lightning.model.layers import lora
from qlora_lightning.model.layers.select import fuse_layers
from qlora_lightning.model.load.build import put_adapters
from qlora_lightning.model.memory.formula import build_step_memory
from tests.benchmarks.child import ROOT
from tests.benchmarks.stub_step import GIB, SHAPES, prepare_ours, prepare_peft

MOST_SECONDS = 8 * 60
TOKENS = 4096  # of a step
LAYERS = int(os.environ.get("STAGES_LAYERS", "32"))  # of the model that takes steps
PROFILED = os.environ.get("STAGES_PROFILED", "CUDA")  # or CPU: a stub of a card has no CUPTI
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


# ---- what a stage does -----------------------------------------------------------------------------------------------


def machine() -> None:
    """Print the card, versions, and what a context takes."""
    if shutil.which("nvidia-smi"):
        subprocess.run(["nvidia-smi"], check=False)
    print(sys.version)
    for name in ("torch", "triton", "bitsandbytes", "transformers", "peft", "lightning"):
        print(name, version(name))
    torch.ones(1, device="cuda")
    free, total = torch.cuda.mem_get_info()
    held = torch.cuda.memory_reserved()
    print(torch.cuda.get_device_name(), torch.cuda.get_device_capability(), f"{total / GIB:.2f} GiB")
    print(f"context, and what others hold: {(total - free - held) / 2**20:.0f} MiB")


def check() -> None:
    """Compare the fused path with the libraries' at real widths."""
    for shape in ("llama-3.1-8b", "qwen3-4b", "llama-3.1-70b"):
        for dtype in DTYPES:
            for nested in (True, False):
                print(f"{shape}, {dtype}, {'nested' if nested else 'plain'} scales")
                check_layer(shape, dtype, nested)


def check_small() -> None:
    """Compare it once, for compute-sanitizer, under which all is far slower."""
    check_layer("llama-3.2-1b", torch.bfloat16, nested=True)


def memory() -> None:
    """Compare peaks of a step with the plan."""
    for mode in ("plain", "checkpointed", "offloaded"):
        model, loss = prepare_ours(mode, TOKENS, "llama-3.1-8b", LAYERS)
        choice = Checkpointing(mode != "plain", mode == "offloaded")
        parts = build_step_memory(model, torch.bfloat16).parts(TOKENS, choice)
        planned = sum(parts.values()) - parts["context"]
        seconds, peak = take_steps(model, loss)
        print(f"{mode}: planned {planned / GIB:.2f} GiB, peak {peak / GIB:.2f} GiB, {TOKENS / seconds:.0f} tokens/s")
        del model, loss
        torch.cuda.empty_cache()


def kernels() -> None:
    """Compare the bandwidth of each kernel with that of a copy."""
    from qlora_lightning.model.layers import kernels as triton_kernels

    large = torch.empty(GIB // 2, dtype=torch.uint8, device="cuda")
    of_copy = 2 * large.nbytes / seconds_of(lambda: torch.empty_like(large).copy_(large))
    print(f"copy: {of_copy / 1e9:.0f} GB/s")
    for function, *arguments in kernel_cases():
        run = getattr(triton_kernels, function, None) or getattr(lora, function)
        outputs = run(*arguments)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        moved = sum(each.nbytes for each in (*arguments, *outputs) if isinstance(each, torch.Tensor))
        speed = moved / seconds_of(lambda run=run, arguments=arguments: run(*arguments))
        print(f"{function}: {speed / 1e9:.0f} GB/s, {speed / of_copy:.0%} of a copy's")


def profile() -> None:
    """Print the kernels, or the host's operations, that take most of a step."""
    model, loss = prepare_ours("plain", TOKENS, "llama-3.1-8b", LAYERS)
    take_steps(model, loss, 3)
    activities = {torch.profiler.ProfilerActivity.CPU, getattr(torch.profiler.ProfilerActivity, PROFILED)}
    with torch.profiler.profile(activities=activities) as found:
        take_steps(model, loss, 1)
    by = f"self_{PROFILED.lower()}_time_total"
    print(found.key_averages().table(sort_by=by, row_limit=40, max_name_column_width=90))


def peers() -> None:
    """Take steps of ours and of PEFT in turns."""
    for mode in ("plain", "checkpointed"):
        for _ in range(3):
            for name, prepare in (("ours", prepare_ours), ("PEFT", prepare_peft)):
                model, loss = prepare(mode, TOKENS, "llama-3.1-8b", LAYERS)
                seconds, peak = take_steps(model, loss)
                print(f"{name}, {mode}: {TOKENS / seconds:.0f} tokens/s, peak {peak / GIB:.2f} GiB", flush=True)
                del model, loss
                torch.cuda.empty_cache()


# ---- their parts -----------------------------------------------------------------------------------------------------


def check_layer(shape: str, dtype: torch.dtype, nested: bool) -> None:
    """Print what a layer of a shape, with random weights in NF4, computes beside the libraries."""
    from qlora_lightning.model.self_check import compare_paths

    config = AutoConfig.from_pretrained(SHAPES / shape, num_hidden_layers=1)
    with torch.device("cuda"):
        base = AutoModelForCausalLM.from_config(config, dtype=dtype)
    base.requires_grad_(False)
    linears = {name: each for name, each in base.model.layers.named_modules() if isinstance(each, torch.nn.Linear)}
    for name, linear in linears.items():
        base.model.layers.set_submodule(name, quantized(linear, dtype, nested))
    model = put_adapters(base, rank=8)
    fuse_layers(model)
    for each in compare_paths(model.get_base_model(), dtype):
        print(f"  {'ok' if each.agrees else 'DISAGREES'} {each}")
    first = next(iter(linears))
    for rows in (3, 64, 65):  # up to 64 rows bitsandbytes may choose another kernel
        check_product(lora.base_linear(base.model.layers.get_submodule(first)), rows, dtype)


def check_product(linear: Any, rows: int, dtype: torch.dtype) -> None:
    x = torch.randn(rows, linear.in_features, device="cuda", dtype=dtype)
    found = bnb.matmul_4bit(x, linear.weight.data.t(), linear.weight.quant_state)
    exact = x.double() @ lora.dequantize(linear.weight.data, linear.weight.quant_state).double().t()
    distance = float((found.double() - exact).norm() / exact.norm())
    print(f"  product of {rows} rows: {distance:.2g}")


def quantized(linear: Any, dtype: torch.dtype, nested: bool) -> Any:
    """Quantize a linear on the card, without its bias, which these shapes have not."""
    layer = bnb.nn.Linear4bit(linear.in_features, linear.out_features, False, dtype, quant_type="nf4", device="meta")
    packed, state = quantize_4bit(linear.weight.detach(), compress_statistics=nested, quant_type="nf4")
    layer.weight = bnb.nn.Params4bit(
        packed, requires_grad=False, quant_state=state, quant_type="nf4", bnb_quantized=True, module=layer
    )
    return layer


def kernel_cases() -> Iterator[tuple[Any, ...]]:
    """Yield each kernel, and arguments of 8B's widths."""

    def draw(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, device="cuda", dtype=torch.bfloat16)

    tokens, width, inner = 8192, 4096, 14336
    x, weight = draw(tokens, width), draw(width)
    yield "rms_norm", x, weight, 1e-5
    yield "rms_norm_backward", draw(tokens, width), x, weight, draw(tokens).float().abs(), draw(tokens, width)
    yield "swiglu", draw(tokens, inner), draw(tokens, inner)
    yield "swiglu_backward", draw(tokens, inner), draw(tokens, inner), draw(tokens, inner)
    yield "rotate", draw(tokens, 32, 128), draw(tokens, 8, 128), draw(1, tokens, 128), draw(1, tokens, 128), 1
    yield "cross_entropy", draw(512, 128_256), torch.arange(512, device="cuda"), True
    for nested in (True, False):
        yield "dequantize", *quantize_4bit(draw(inner, width), compress_statistics=nested, quant_type="nf4")


def take_steps(model: Any, loss: Callable[[], torch.Tensor], number: int = 8) -> tuple[float, int]:
    """Take steps with AdamW; return the seconds of one, without the first half of them, and the peak of memory."""
    optimizer = torch.optim.AdamW([param for param in model.parameters() if param.requires_grad], fused=True)
    torch.cuda.reset_peak_memory_stats()
    began = 0.0
    for at in range(number):
        if at == number // 2:
            torch.cuda.synchronize()
            began = time.perf_counter()
        loss().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    torch.cuda.synchronize()
    return (time.perf_counter() - began) / (number - number // 2), torch.cuda.max_memory_allocated()


def seconds_of(run: Callable[[], Any], number: int = 20) -> float:
    run()
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(number):
        run()
    torch.cuda.synchronize()
    return (time.perf_counter() - began) / number


# ---- all of them -----------------------------------------------------------------------------------------------------

_STAGE = [sys.executable, "-m", "tests.gpu.stages", "--stage"]
STAGES: dict[str, list[str]] = {
    "machine": [*_STAGE, "machine"],
    "check": [*_STAGE, "check"],
    "sanitizer": ["compute-sanitizer", "--error-exitcode=9", *_STAGE, "check_small"],
    "tests": [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "tests/gpu"],
    "memory": [*_STAGE, "memory"],
    "kernels": [*_STAGE, "kernels"],
    "profile": [*_STAGE, "profile"],
    "peers": [*_STAGE, "peers"],
}


def run_stage(name: str, log: Path) -> str:
    """Run a stage, and say how it ended."""
    if shutil.which(STAGES[name][0]) is None:
        return f"there is no {STAGES[name][0]}"
    began = time.perf_counter()
    with log.open("w", encoding="utf-8") as file:
        try:
            done = subprocess.run(
                STAGES[name], cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, timeout=MOST_SECONDS, check=False
            )
            end = f"exit code {done.returncode}"
        except subprocess.TimeoutExpired:
            end = "too long"
    return f"{end} after {time.perf_counter() - began:.0f} s, {log}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.stages", description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", help="for the logs")
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"of {', '.join(STAGES)} (default: all)")
    parser.add_argument("--stage", help=argparse.SUPPRESS)  # what a process of its own runs
    arguments = parser.parse_args()
    if arguments.stage:
        globals()[arguments.stage]()
        return
    if arguments.folder is None or not {*arguments.stages} <= STAGES.keys():
        parser.error(f"name a folder for the logs, and stages of {', '.join(STAGES)}")
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(STAGES, start=1):
        if not arguments.stages or name in arguments.stages:
            print(f"{name}: {run_stage(name, arguments.folder / f'{number}-{name}.log')}", flush=True)


if __name__ == "__main__":
    main()
