"""Where a NaN or an infinity comes from is found, by running the window again, and described."""

import math

import bitsandbytes as bnb
import pytest
import torch
from torch import nn

from qlora_lightning.data.batches.collate import collate
from qlora_lightning.data.samples import make_sample
from qlora_lightning.model.guards.nonfinite import Finding, describe_findings, find_nonfinite
from qlora_lightning.model.loss import LossSums
from qlora_lightning.model.window import Window


class Second(nn.Module):
    def forward(self, hidden, ids):
        torch.rand(3)  # as dropout would draw
        return {"hidden": hidden.masked_fill((ids == 1)[..., None], math.inf)}


class Model(nn.Module):
    """Adds up embedded ids; the id 1 becomes infinite in ``second``."""

    def __init__(self):
        super().__init__()
        self.first = nn.Embedding(9, 2)
        self.second = Second()
        self.scale = nn.Parameter(torch.ones(1))
        self.head = nn.Parameter(torch.ones(1), requires_grad=False)  # called by no module

    def compute_loss(self, batch):
        ids = batch["input_ids"]
        hidden = self.second(self.first(ids), ids)["hidden"] * self.scale
        return LossSums(hidden.sum() * self.head.sum(), torch.tensor(1), torch.tensor(0))


def batch_of(*rows):
    return collate([make_sample(ids, ids, number) for number, ids in enumerate(rows)])


def find(*batches, model=None, compute_loss=None):
    model, window = model or Model(), Window()
    compute_loss = compute_loss or model.compute_loss
    for batch in batches:
        with torch.no_grad():
            window.add(compute_loss(batch), len(batches), batch["row_ids"].tolist(), batch)
    hooks = [dict(module._forward_hooks) for module in model.modules()]
    gradients, generator = [p.grad for p in model.parameters()], torch.get_rng_state()
    finding = find_nonfinite(model, compute_loss, window, None)
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(p.grad is gradient for p, gradient in zip(model.parameters(), gradients, strict=True))
    assert [dict(module._forward_hooks) for module in model.modules()] == hooks
    return finding


def row_ids(finding):
    return [row["row_id"] for row in finding.rows]


def test_the_micro_batch_its_row_and_the_first_module_are_found():
    finding = find(batch_of([3, 4], [5]), batch_of([6], [7, 1, 3], [8]))
    assert (finding.micro_batch, finding.module, row_ids(finding)) == (1, "second", [1])
    assert finding.base_weight is None


def test_a_window_that_is_finite_when_run_again_names_what_was_accumulated_and_spoilt_adapters():
    model = Model()
    model.scale.grad = torch.tensor([math.nan])
    finding = find(batch_of([3]), model=model)
    assert (finding.micro_batch, finding.gradients, finding.rows) == (None, ["scale"], [])
    with torch.no_grad():
        model.scale.fill_(math.nan)
    finding = find(batch_of([3]), model=model)
    assert (finding.micro_batch, finding.module, finding.adapter_tensors) == (0, None, ["scale"])


def spoil(weight, place):
    with torch.no_grad():
        weight[place] = math.nan
    return weight.requires_grad_(False)


@pytest.mark.parametrize("name", ["first.weight", "head"])
def test_a_frozen_weight_that_is_not_finite_is_named(name):
    model = Model()
    spoil(model.get_parameter(name), (3, 0) if name == "first.weight" else 0)
    finding = find(batch_of([3]), model=model)
    assert (finding.module, finding.base_weight) == ("first" if name == "first.weight" else None, name)


@pytest.mark.parametrize("kind", ["nf4", "nf4 double", "int8"])
def test_so_is_one_that_is_quantized(kind):
    weight = spoil(torch.randn(64, 64, generator=torch.Generator().manual_seed(0)), (2, 3))
    if kind == "int8":
        layer = bnb.nn.Linear8bitLt(64, 64, bias=False, has_fp16_weights=False)
        layer.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    else:
        layer = bnb.nn.Linear4bit(64, 64, bias=False, quant_type="nf4", compute_dtype=torch.float32)
        double = kind == "nf4 double"
        layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=double)
    layer.to("cpu")
    model = nn.ModuleDict({"q": layer})
    model.scale = nn.Parameter(torch.ones(1))

    def compute_loss(batch):
        return LossSums((model["q"](torch.ones(1, 64)) * model.scale).sum(), torch.tensor(1), torch.tensor(0))

    finding = find(batch_of([3]), model=model, compute_loss=compute_loss)
    assert finding.module == "q"
    assert finding.base_weight.startswith("q.weight")


def test_a_search_that_fails_is_a_finding_too():
    assert find_nonfinite(Model(), None, Window(), None).error is None
    window = Window()
    window.add(LossSums(torch.tensor(math.nan), torch.tensor(1), torch.tensor(0)), 1, [4], batch_of([3]))
    assert find_nonfinite(Model(), None, window, None).error.startswith("TypeError: ")


def test_of_several_ranks_those_that_found_something_speak_and_else_all_rows_are_named():
    nothing = Finding(0, ["a.jsonl:1"])
    found = Finding(1, ["a.jsonl:2", "a.jsonl:3"], 0, module="m.q", rows=[{"place": "a.jsonl:3"}])
    assert describe_findings([nothing, found]).startswith("Run again; first module: m.q; rows: a.jsonl:3. ")
    nobody = describe_findings([nothing, Finding(1, ["a.jsonl:2"])])
    assert nobody.startswith("Run again, each micro-batch is finite; ")
    assert "rows: a.jsonl:1, a.jsonl:2. " in nobody
