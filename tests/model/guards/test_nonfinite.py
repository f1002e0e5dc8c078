"""Where a NaN or an infinity comes from is found, by running the window again, and described."""

import math

import pytest
import torch
from torch import nn

from qlora_lightning.model.guards.nonfinite import describe_findings, find_nonfinite
from qlora_lightning.model.loss import LossSums
from qlora_lightning.model.window import Window
from tests.flat import collate


class Second(nn.Module):
    def forward(self, hidden, ids):
        torch.rand(3)  # as dropout would draw
        return {"hidden": hidden.masked_fill((ids == 1)[..., None], math.inf)}


class Model(nn.Module):
    """Adds up embedded ids; the id 1 becomes infinite in ``second``, and the id 2 has a gradient of NaN."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.scale = nn.Embedding(9, 2), Second(), nn.Parameter(torch.ones(1))

    def compute_loss(self, batch):
        ids = batch["input_ids"]
        hidden = self.second(self.first(ids), ids)["hidden"] * self.scale
        if (ids == 2).any():
            hidden.register_hook(lambda gradient: gradient * math.nan)
        return LossSums(hidden.sum(), torch.tensor(1), torch.tensor(0))


def batch_of(*rows):
    return collate(*((ids, ids, number) for number, ids in enumerate(rows)))


@pytest.mark.parametrize(
    ("rows", "scale", "expected"),
    [
        ([[6], [7, 1, 3], [8]], 1.0, (1, "second", [1])),
        ([[6], [7, 3], [2]], 1.0, (1, None, [2])),  # backward only
        ([[6], [7]], math.nan, (0, None, [0, 1])),  # a parameter itself, whatever the row
        ([[6]], 1.0, (None, None, [])),
    ],
)
def test_the_micro_batch_its_row_and_the_first_module_are_found_and_nothing_is_changed(rows, scale, expected):
    model, window = Model(), Window()
    model.scale.data.fill_(scale)
    for batch in (batch_of([3, 4], [5]), batch_of(*rows)):
        window.add(LossSums(torch.zeros(()), torch.tensor(1), torch.tensor(0)), most=2, batch=batch)
    hooks = [dict(module._forward_hooks) for module in model.modules()]
    generator = torch.get_rng_state()
    finding = find_nonfinite(model, model.compute_loss, window, None)
    assert (finding["micro_batch"], finding["module"], [row["row_id"] for row in finding["rows"]]) == expected
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert [dict(module._forward_hooks) for module in model.modules()] == hooks


def test_a_search_that_fails_is_a_finding_too():
    window = Window()
    window.add(LossSums(torch.tensor(math.nan), torch.tensor(1), torch.tensor(0)), 1, [4], batch_of([3]))
    finding = find_nonfinite(Model(), None, window, None)
    assert describe_findings([finding]).startswith("Run again, TypeError: ")


def test_of_several_ranks_those_that_found_something_speak_and_else_all_rows_are_named():
    def finding(rows, micro_batch=None, **found):
        return {"window_rows": rows, "micro_batch": micro_batch, "module": None, "rows": [], "error": None, **found}

    nothing = finding(["a.jsonl:1"])
    found = finding(["a.jsonl:2", "a.jsonl:3"], 0, module="m.q", rows=[{"place": "a.jsonl:3"}])
    assert describe_findings([nothing, found]).startswith("First module: m.q; rows: a.jsonl:3. ")
    nobody = describe_findings([nothing, finding(["a.jsonl:2"])])
    assert nobody.startswith("Run again, each micro-batch is finite; rows: a.jsonl:1, a.jsonl:2. ")
