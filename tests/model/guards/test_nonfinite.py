import copy
import json
import math

import bitsandbytes as bnb
import pytest
import torch
from torch import nn

from qlora_lightning.data.batches.collate import collate
from qlora_lightning.data.samples.sample import make_sample
from qlora_lightning.model.guards.nonfinite import (
    Finding,
    describe_finding,
    find_nonfinite,
    report_file,
    word_findings,
    word_remedy,
    write_report,
)
from qlora_lightning.model.loss import LossSums


class Bad(torch.autograd.Function):
    """Gives back its input; in backward a NaN."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * math.nan


class Model(nn.Module):
    """Adds up embedded ids; the id 1 becomes infinite in ``second``, the id 2 has no gradient that is a number."""

    def __init__(self):
        super().__init__()
        self.first = nn.Embedding(9, 2)
        self.second = Second()
        self.scale = nn.Parameter(torch.ones(1))

    def compute_loss(self, batch):
        ids = batch["input_ids"]
        hidden = self.second(self.first(ids), ids) * self.scale
        loss = Bad.apply(hidden).sum() if (ids == 2).any() else hidden.sum()
        return LossSums(loss, torch.tensor(1), torch.tensor(0))


class Second(nn.Module):
    def forward(self, hidden, ids):
        torch.rand(3)  # as dropout would draw
        return {"hidden": hidden.masked_fill((ids == 1)[..., None], math.inf)}["hidden"]


def batch_of(*rows):
    return collate([make_sample(ids, ids, number) for number, ids in enumerate(rows)])


def find(*batches):
    torch.manual_seed(0)
    model = Model()
    losses = [model.compute_loss(batch).nll_sum.detach() for batch in batches]
    generator = torch.get_rng_state()
    finding = find_nonfinite(model, model.compute_loss, batches, losses)
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(parameter.grad is None for parameter in model.parameters())
    return finding


def test_the_micro_batch_its_row_and_the_first_module_are_found():
    finding = find(batch_of([3, 4], [5]), batch_of([6], [7, 1, 3], [8]))
    assert (finding.batch, finding.module, finding.alone) == (1, "second", True)
    assert [row["row_ids"].tolist() for row in finding.rows] == [[1]]
    assert not math.isfinite(finding.loss)


def test_where_every_forward_is_finite_the_tensors_without_finite_gradient_are_named():
    finding = find(batch_of([3]), batch_of([2], [4]))
    assert (finding.batch, finding.module, finding.gradients) == (1, None, ["scale", "first.weight"])
    assert [row["row_ids"].tolist() for row in finding.rows] == [[0]]


def test_a_window_that_is_finite_when_run_again_names_what_was_accumulated():
    model, batch = Model(), batch_of([3])
    model.scale.grad = torch.tensor([math.nan])
    finding = find_nonfinite(model, model.compute_loss, [batch], [torch.tensor(1.0)])
    assert (finding.batch, finding.gradients, finding.rows) == (None, ["scale"], [])


def test_adapters_that_are_spoilt_already_are_named():
    model, batch = Model(), batch_of([3])
    with torch.no_grad():
        model.scale.fill_(math.nan)
    finding = find_nonfinite(model, model.compute_loss, [batch], [torch.tensor(math.nan)])
    assert finding.adapters == ["scale"]
    assert (finding.batch, finding.module) == (0, None)


def spoil(weight, place):
    with torch.no_grad():
        weight[place] = math.nan
    return weight.requires_grad_(False)


def test_a_frozen_weight_that_is_not_finite_is_named():
    model, batch = Model(), batch_of([3])
    spoil(model.first.weight, (3, 0))
    finding = find_nonfinite(model, model.compute_loss, [batch], [torch.tensor(math.nan)])
    assert (finding.module, finding.base_weight) == ("first", "first.weight")


def test_so_is_one_that_no_module_has_shown():
    model, batch = Model(), batch_of([3])
    model.head = nn.Parameter(torch.ones(1))
    spoil(model.head, 0)

    def compute_loss(batch):
        sums = model.compute_loss(batch)
        return LossSums(sums.nll_sum * model.head.sum(), *sums[1:])

    finding = find_nonfinite(model, compute_loss, [batch], [torch.tensor(math.nan)])
    assert (finding.module, finding.base_weight) == (None, "head")


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_so_is_one_that_is_quantized(kind):
    weight = spoil(torch.randn(64, 64, generator=torch.Generator().manual_seed(0)), (2, 3))
    if kind == "nf4":
        layer = bnb.nn.Linear4bit(64, 64, bias=False, quant_type="nf4", compute_dtype=torch.float32)
        layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
    else:
        layer = bnb.nn.Linear8bitLt(64, 64, bias=False, has_fp16_weights=False)
        layer.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    layer.to("cpu")
    model = nn.ModuleDict({"q": layer})
    model.scale = nn.Parameter(torch.ones(1))

    def compute_loss(batch):
        return LossSums((model["q"](torch.ones(1, 64)) * model.scale).sum(), torch.tensor(1), torch.tensor(0))

    finding = find_nonfinite(model, compute_loss, [batch_of([3])], [torch.tensor(math.nan)])
    assert (finding.module, finding.base_weight) == ("q", "q.weight")


def test_sound_weights_are_not_named():
    model, batch = Model(), batch_of([1])
    model.first.weight.requires_grad_(False)
    finding = find_nonfinite(model, model.compute_loss, [batch], [torch.tensor(math.inf)])
    assert (finding.module, finding.base_weight) == ("second", None)


@pytest.mark.parametrize(("weight", "words"), [("q.weight", "the file of model.base"), (None, "look at these rows")])
def test_the_remedy_follows_from_the_cause(weight, words):
    described = describe_finding(Finding(batch=0, module="q", base_weight=weight), None, [])
    assert words in word_remedy([describe_finding(Finding(), None, []), described])


def test_hooks_are_gone_afterwards():
    model, batch = Model(), batch_of([1])
    before = copy.deepcopy([module._forward_hooks for module in model.modules()])
    find_nonfinite(model, model.compute_loss, [batch], [torch.tensor(math.inf)])
    assert [module._forward_hooks for module in model.modules()] == before


def test_the_report_is_plain_json_and_beside_nothing_unfinished(tmp_path):
    described = describe_finding(find(batch_of([1])), None, [0, -1])
    file = report_file(tmp_path / "run", 4)
    write_report(file, 4, "loss", [described])
    assert [path.name for path in file.parent.iterdir()] == ["nonfinite-step-4.json"]
    content = json.loads(file.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert (content["step"], content["what"]) == (4, "loss")
    rank = content["ranks"][0]
    assert (rank["loss"], rank["first_module"], rank["rows_of_the_window"]) == ("inf", "second", ["row 0"])
    assert [row["place"] for row in rank["rows"]] == ["row 0"]


@pytest.mark.parametrize(
    ("finding", "sentence"),
    [
        (Finding(batch=0, loss=math.inf, module="m.q"), "It comes first from m.q; rows: unknown."),
        (
            Finding(batch=0, loss=math.nan, module="m.q", base_weight="m.q.weight"),
            "It comes from the base's frozen weight m.q.weight, which is not finite itself.",
        ),
        (
            Finding(batch=0, loss=1.0, gradients=["a", "b"]),
            "It comes in the gradient of 2 tensors, as b, all modules' outputs being finite; rows: unknown.",
        ),
        (
            Finding(batch=0, loss=math.nan, adapters=["a"]),
            "It comes in compute_loss, all modules' outputs being finite; rows: unknown. Adapter tensors are not "
            "finite themselves, as a.",
        ),
        (Finding(), "Run again, each micro-batch is finite. The step's rows: row 3."),
        (
            Finding(gradients=["a", "b"]),
            "Run again, each micro-batch is finite; the gradient of 2 tensors is not, as a. The step's rows: row 3.",
        ),
    ],
)
def test_a_finding_is_worded(finding, sentence):
    assert word_findings([describe_finding(finding, None, [3])]) == sentence


def test_of_several_ranks_those_that_found_something_speak():
    ranks = [
        describe_finding(Finding(), None, [1], 0),
        describe_finding(find(batch_of([1])), None, [0], 1),
    ]
    assert word_findings(ranks) == "It comes first from second; rows: row 0."
