"""A step on a card: its loss and gradients, whatever the quantization, dtype, layout and kernel."""

import pytest
import torch

from tests.gpu.conftest import make_module
from tests.steps import LENGTHS, distance, loss_and_gradients, make_batch

pytestmark = pytest.mark.gpu

DTYPES = ("fp32", "bf16", "fp16")


def sharing_batch():
    """Samples of which three begin with the same tokens, which have no labels."""
    batch = make_batch((40, 40, 40, *LENGTHS))
    ids, labels = (batch[name][0, :120].view(3, 40) for name in ("input_ids", "labels"))
    ids[:, :25], labels[:, :25] = ids[0, :25].clone(), -100
    return batch


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quantization", ["nf4", "fp4", "int8", "none"])
def test_fused_layers_err_no_more_than_the_plain_ones(base, quantization, dtype):
    batch, options = sharing_batch(), {"quantization": quantization, "compute_dtype": dtype}
    exact_loss, exact = loss_and_gradients(make_module(base, "cpu", fast=False, quantization=quantization), batch)
    module, plain = (make_module(base, fast=fast, **options) for fast in (True, False))
    assert (module.loss_scale.value > 1) == (dtype == "fp16")
    loss, gradients = loss_and_gradients(module, batch)
    plain_loss, plain_gradients = loss_and_gradients(plain, batch)
    if dtype == "fp32":
        assert loss == pytest.approx(plain_loss, rel=1e-5)
        assert distance(gradients, plain_gradients) <= (1e-2 if quantization == "int8" else 1e-5)  # rounds inputs
    else:
        assert loss == pytest.approx(exact_loss, abs=0.05)
        assert distance(gradients, exact) <= max(1.5 * distance(plain_gradients, exact), 1e-3)  # one batch is one draw


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sample_gives_in_a_batch_what_it_gives_alone(base, dtype):
    module = make_module(base, compute_dtype=dtype)
    whole = make_batch()
    loss, together = loss_and_gradients(module, whole)
    alone, tokens, total = torch.zeros_like(together), 0, 0.0
    for start, end in zip(whole["cu_seqlens"].tolist(), whole["cu_seqlens"].tolist()[1:], strict=False):
        if end - start == 1:
            continue  # without a label
        one = make_batch((end - start,)) | {name: whole[name][:, start:end] for name in ("input_ids", "labels")}
        loss_of_one, gradients = loss_and_gradients(module, one)
        alone += gradients
        tokens += end - start - 1
        total += loss_of_one * (end - start - 1)
    assert loss == pytest.approx(total / tokens, rel=1e-5 if dtype == "fp32" else 1e-2)
    assert distance(together, alone) <= (1e-5 if dtype == "fp32" else 2e-2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_card_without_the_kernels_over_ragged_samples_gives_the_same(base, dtype, monkeypatch):
    module = make_module(base, compute_dtype=dtype)
    loss, gradients = loss_and_gradients(module)
    for name in ("has_ragged_kernel", "has_efficient_kernel"):  # FlashAttention is not there in fp32
        monkeypatch.setattr(f"qlora_lightning.model.layers.attention.{name}", lambda *_: False)
        old_loss, on_old = loss_and_gradients(module)
        assert old_loss == pytest.approx(loss, rel=1e-2)
        assert distance(on_old, gradients) <= (1e-5 if dtype == "fp32" else 2e-2)
