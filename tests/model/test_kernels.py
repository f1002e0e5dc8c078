"""The kernels of a GPU compute what torch's operations do: Triton's interpreter runs them on a CPU, in a process."""

import os
from pathlib import Path

import pytest
import torch

from tests.processes import run_python


def test_kernels_compute_what_torch_does():
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1"}  # read when kernels are imported
    run_python("-m", "tests.model.test_kernels", env=environment, cwd=Path(__file__).parents[2], timeout=300)


def compare():
    from bitsandbytes.functional import quantize_4bit

    from qlora_lightning.model.layers import elementwise, kernels, lora
    from qlora_lightning.model.step import loss

    def close(name, *arguments, of=elementwise):
        """In float32; each takes its own copies, since some are overwritten."""
        kernel, torchs = ([each.clone() if torch.is_tensor(each) else each for each in arguments] for _ in range(2))
        pairs = zip(getattr(kernels, name)(*kernel), getattr(of, name)(*torchs), strict=True)
        for found, expected in [*pairs, *([(kernel[0], torchs[0])] if of is loss else [])]:
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)

    torch.manual_seed(0)
    for rows, width in ((5, 70), (3, 64), (1, 1), (24, 128), (96, 200), (4, 300)):
        x, grad, residual, weight = *torch.randn(3, rows, width), torch.rand(width)
        close("rms_norm", x, weight, 1e-5)
        inverse_rms = elementwise.rms_norm(x, weight, 1e-5)[1]
        for last in ([], [residual]):
            (found,), (expected,) = (
                [module.rms_norm_backward(grad, x, weight, inverse_rms, *last)] for module in (kernels, elementwise)
            )
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    gate, up, grad = torch.randn(3, 7, 333)
    torch.testing.assert_close(kernels.swiglu(gate, up), elementwise.swiglu(gate, up))
    close("swiglu_backward", gate, up, grad)
    for heads, head_dim in (((6, 2), 16), ((5, 1), 24)):
        angles = torch.rand(2, 1, 4, head_dim // 2).repeat(1, 1, 1, 2)
        close("rotate", *(torch.randn(4, each, head_dim) for each in heads), *angles, -1)
    for vocabulary in (50, 4096, 9000):
        logits, targets = 4 * torch.randn(6, vocabulary), torch.arange(6)
        logits[0, 0] = logits[1, 7] = logits[1, 9] = 30.0  # one target is the most likely token; a tie is none
        if vocabulary > 4096:
            logits[5, :4096], targets[5] = -torch.inf, 5000
        for with_gradient in (False, True):
            close("cross_entropy", logits, targets, with_gradient, of=loss)
    for dtype in (torch.float16, torch.float32):
        for quant_type, nested, storage in (("nf4", True, "uint8"), ("nf4", False, "bfloat16"), ("fp4", True, "uint8")):
            options = {"compress_statistics": nested, "quant_storage": getattr(torch, storage)}
            packed = quantize_4bit(torch.randn(33, 192).to(dtype), quant_type=quant_type, **options)
            assert torch.equal(kernels.dequantize(*packed), lora.dequantize(*packed))


if __name__ == "__main__":
    compare()
