"""Greedy answers to the same prompts: by ``QLoRAModule.answer``, or by plain transformers + PEFT."""

import contextlib
import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.benchmarks.child import serve

_BATCH = 8  # rows of a batch of plain transformers, padded on the left
_MOST = 96  # new tokens of an answer

_Answer = Callable[[list[list[int]], list[int], int], list[list[int]]]


def measure(side: str, prompts_file: str, base: str, adapter: str, dtype: str) -> dict[str, Any]:
    """Answer all prompts, with the adapter and with the base alone."""
    content = json.loads(Path(prompts_file).read_text(encoding="utf-8"))
    prompts, stop_ids = content["prompts"], content["stop_ids"]
    model, answer = (_load_ours if side == "ours" else _load_plain)(base, adapter, dtype)
    figures = {}
    for name in ("adapter", "base"):
        with model.disable_adapter() if name == "base" else contextlib.nullcontext():
            answer(prompts[:8], stop_ids, 2)  # what is made at the first forward is not counted
            began = time.perf_counter()
            answers = answer(prompts, stop_ids, _MOST)
            seconds = time.perf_counter() - began
        figures[name] = {"tokens": sum(map(len, answers)), "seconds": seconds, "answers": answers}
    return figures


def _load_ours(base: str, adapter: str, dtype: Any) -> tuple[Any, _Answer]:
    from qlora_lightning import QLoRAModule

    module = QLoRAModule(base=base, adapter=adapter, compute_dtype=dtype)
    module.configure_model()
    return module.model, module.answer


def _load_plain(base: str, adapter: str, dtype: str) -> tuple[Any, _Answer]:
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
    quantized = AutoModelForCausalLM.from_pretrained(base, dtype=torch_dtype, quantization_config=quantization)
    model = PeftModel.from_pretrained(quantized, adapter).eval()

    @torch.no_grad()
    def answer(prompts: list[list[int]], stop_ids: list[int], most: int) -> list[list[int]]:
        answers, padding = list[list[int]](), stop_ids[0]
        for start in range(0, len(prompts), _BATCH):
            some = prompts[start : start + _BATCH]
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
    serve(measure)
