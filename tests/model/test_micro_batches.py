"""A step fits by itself: whatever goes through the model at a time, the adapter is the same.

Windows are of 6, 6 and a short one of 4 rows, however they are cut into batches and micro-batches.
"""

import re
import sys
from pathlib import Path

import lightning
import pytest
import torch
from transformers import AutoConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from qlora_lightning import GradientCheckpointing, QLoRAModule
from qlora_lightning.model.activation_checkpointing import Checkpointing
from qlora_lightning.model.layers.select import fuse_layers
from qlora_lightning.model.load.build import meta_base, put_adapters
from qlora_lightning.model.memory import budget
from qlora_lightning.model.memory import fit as memory_fit
from qlora_lightning.model.memory.fit import Fit, find_fits
from qlora_lightning.model.memory.formula import build_step_memory
from tests.errors import rejects
from tests.processes import run_python
from tests.random_base import save_family
from tests.rows import write_rows
from tests.steps import fit

ROOT = Path(__file__).parents[2]
ERRORS = (  # in turn
    "CUDA out of memory. Tried to allocate 2 GiB",
    "backend='inductor' raised:\nOutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB",
    "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
    "Triton Error [CUDA]: out of memory",
)


class Hungry(QLoRAModule):
    """Runs out of memory at the given passes, in forward or in the middle of backward, once each."""

    fails, where, passes, failures = frozenset(), "backward", 0, 0

    def compute_loss(self, batch):
        if self.trainer.training and not self.training:
            return super().compute_loss(batch)  # of the check that its sums add up
        self.passes += 1
        fails = self.passes in self.fails
        if fails and self.where == "forward":
            self.run_out()
        if fails and torch.is_grad_enabled():
            trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
            self.hook = trained[len(trained) // 2].register_hook(lambda grad: self.hook.remove() or self.run_out())
        return super().compute_loss(batch)

    def run_out(self):
        self.failures += 1
        raise RuntimeError(ERRORS[(self.failures - 1) % len(ERRORS)])


def train(
    base, file, tmp_path, *callbacks, kind=Hungry, fails=(), where="backward", batch_size=6, accumulate=1, **options
):
    lightning.seed_everything(7, verbose=False)
    settings = {"rank": 4, "compute_dtype": "fp32", "learning_rate": 1e-2, "warmup": 0.0} | options
    module = kind(str(base), **settings)
    module.fails, module.where = frozenset(fails), where
    options = {"accumulate_grad_batches": accumulate, "gradient_clip_val": 1.0, "max_epochs": 1}
    trainer = fit(module, tmp_path, file, val=True, batch_size=batch_size, callbacks=[*callbacks], **options)
    adapter = torch.cat([each.detach().flatten() for each in module.parameters() if each.requires_grad])
    return module, adapter, trainer.callback_metrics


@pytest.fixture(scope="module")
def whole(tiny_base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    rows = [{"instruction": f"Say {n}.", "output": f"{'word ' * (1 + n % 5)}{n}"} for n in range(16)]
    file = write_rows(folder / "rows.jsonl", rows)
    return file, *train(tiny_base, file, folder)[1:]


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"micro_batch_tokens": 60}, marks=pytest.mark.slow),
        {"micro_batch_tokens": 1},
        pytest.param({"fails": [2]}, marks=pytest.mark.slow),  # in the second step
        {"fails": [2, 3, 4, 5], "where": "forward"},  # and again
        pytest.param({"batch_size": 1, "accumulate": 6}, marks=pytest.mark.slow),
        {"batch_size": 3, "accumulate": 2, "fails": [4]},  # in the second batch of a window
        {"fails": [5], "where": "forward"},  # in a validation
    ],
    ids=str,
)
def test_parts_and_memory_that_runs_out_change_no_result(tiny_base, tmp_path, whole, options):
    file, adapter, metrics = whole
    module, same_adapter, same_metrics = train(tiny_base, file, tmp_path, **options)
    assert float((same_adapter - adapter).norm() / adapter.norm()) < 1e-5
    assert float(metrics["val_loss"]) == pytest.approx(float(same_metrics["val_loss"]), rel=1e-5)
    assert float(metrics["train_loss"]) == pytest.approx(float(same_metrics["train_loss"]), rel=1e-5)
    assert module.passes > 6  # of the whole run


def test_a_row_that_does_not_fit_alone_is_checkpointed_and_then_named(tiny_base, tmp_path, whole, capsys):
    file, adapter, _ = whole
    options = {"micro_batch_tokens": 1, "where": "forward"}
    _, same_adapter, _ = train(tiny_base, file, tmp_path, fails=[3], **options)
    assert float((same_adapter - adapter).norm() / adapter.norm()) < 1e-5
    out = capsys.readouterr().out
    assert re.search(
        r"Memory ran out in a row of \d+ tokens: training continues with gradient checkpointing, by about", out
    )
    with rejects("memory.row", f"{file}:", "CUDA out of memory."):
        train(tiny_base, file, tmp_path, GradientCheckpointing(False), fails=[3], **options)


class OneRowFits(Hungry):
    def compute_loss(self, batch):
        if self.training and len(batch.counts) > 1:
            self.run_out()
        return super().compute_loss(batch)


def test_a_long_row_that_fits_is_not_blamed_for_several_that_do_not(tiny_base, tmp_path, capsys):
    """And no smaller part for the one that has run out."""
    rows = [{"instruction": f"Say {n}.", "output": "word " * (200 if n == 3 else 1)} for n in range(16)]
    file = write_rows(tmp_path / "long.jsonl", rows)
    train(tiny_base, file, tmp_path, kind=OneRowFits, micro_batch_tokens=100)
    out = capsys.readouterr().out
    assert int(re.search(r"Memory ran out in a micro-batch of (\d+) tokens", out)[1]) <= 100  # not the long row
    assert "training continues" not in out


def test_a_short_last_part_that_runs_out_costs_a_fifth_of_what_has_fitted(tiny_base, tmp_path, whole, capsys):
    train(tiny_base, whole[0], tmp_path, fails=[2], where="forward", micro_batch_tokens=200)
    found = re.search(r"in a micro-batch of (\d+) tokens: from now on at most (\d+) tokens", capsys.readouterr().out)
    assert int(found[1]) < int(found[2]) < 200


class CountsCheckpointed(lightning.Callback):
    """Counts the layers that are checkpointed in the first step of each fit."""

    def __init__(self):
        self.found = []

    def count(self, module):
        layers = [each for each in module.modules() if isinstance(each, GradientCheckpointingLayer)]
        return sum(layer.gradient_checkpointing for layer in layers)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 0 and trainer.current_epoch == 0:
            self.found.append(self.count(pl_module))


class Fails(lightning.Callback):
    def on_before_optimizer_step(self, *arguments):
        raise ValueError("of a user")


def test_a_model_is_planned_for_again_and_checkpointing_switched_back_at_the_end_and_after_an_error(
    tiny_base, tmp_path, whole, monkeypatch
):
    planned, plan = [], memory_fit.plan_fits
    monkeypatch.setattr(budget, "plan_fits", lambda *arguments: planned.append(plan(*arguments)) or planned[-1])
    counts = CountsCheckpointed()
    module, *_ = train(tiny_base, whole[0], tmp_path, GradientCheckpointing(True), counts)
    fit(module, tmp_path, whole[0], max_steps=1, callbacks=[GradientCheckpointing(False), counts])
    with pytest.raises(ValueError, match="of a user"):
        fit(module, tmp_path, whole[0], max_steps=1, callbacks=[GradientCheckpointing(True), counts, Fails()])
    assert counts.found == [2, 0, 2]
    assert counts.count(module) == 0
    assert [fits[0].tokens for fits in planned] == [8192, 8192, 8192]


# ---- what is planned -------------------------------------------------------------------------------------------------

CHOICES = GradientCheckpointing().choices(on_cuda=True)


def test_the_first_way_in_which_the_longest_row_fits_is_taken_and_no_token_more_than_fit(tiny_base):
    base = meta_base(AutoConfig.from_pretrained(tiny_base), torch.bfloat16, "nf4")
    model = put_adapters(base, rank=2).to("meta")
    fuse_layers(model)
    step = build_step_memory(model, torch.bfloat16)
    least, most = (sum(step.parts(1000, each).values()) for each in CHOICES[::-2])
    assert [Checkpointing(), Checkpointing(True, False), Checkpointing(True, True)] == CHOICES

    def needed(best, tokens):
        return sum(step.parts(tokens, best.choice).values())

    found = []
    for memory in range(least - 100_000, most + 100_000, 10_000):
        best, *others = find_fits(step, memory, 1000, CHOICES)
        assert [best.tokens, *(each.tokens for each in others)] == sorted(each.tokens for each in (best, *others))
        assert best.tokens == 0 or needed(best, best.tokens) <= memory < needed(best, best.tokens + 1)
        assert best.tokens == 0 or best.tokens >= 1000
        found.append((best.tokens > 0, -best.choice.checkpointed, -best.choice.offload))
    assert found == sorted(found)  # with more memory never less fits, nor by dearer means
    assert set(found) == {(False, -1, -1), (True, -1, -1), (True, -1, 0), (True, 0, 0)}


@pytest.mark.parametrize("setting", ["auto", 8192])
def test_a_resumed_run_goes_on_with_what_was_found(tiny_base, tmp_path, whole, setting):
    file, _, _ = whole
    module, _, _ = train(tiny_base, file, tmp_path, fails=[2], micro_batch_tokens=setting)
    state = module.token_budget.capture()
    assert 0 < state["tokens"] < 8192
    resumed = QLoRAModule(str(tiny_base), micro_batch_tokens=setting).token_budget
    resumed.fits = [Fit(8192, choice) for choice in CHOICES]
    resumed.restore(state | {"checkpointing": [True, False]})
    assert (resumed.tokens, [fit.choice for fit in resumed.fits]) == (state["tokens"], CHOICES[1:])
    changed = QLoRAModule(str(tiny_base), micro_batch_tokens=100).token_budget
    changed.restore(state)
    assert changed.tokens == 100


def test_checkpointing_that_transformers_lacks_is_rejected(tiny_base, tmp_path, whole):
    base = save_family(tmp_path / "base", "ctrl", tiny_base, n_positions=2048)
    with rejects("gradient_checkpointing.enabled", "ctrl"):
        train(base, whole[0], tmp_path, GradientCheckpointing(True))


LIMITED = """
import resource, sys
import lightning, torch
from qlora_lightning import QLoRAModule
from tests.steps import fit

class Limit(lightning.Callback):
    def on_train_start(self, trainer, pl_module):
        with open("/proc/self/status") as status:
            taken = next(int(line.split()[1]) for line in status if line.startswith("VmSize")) * 1024
        resource.setrlimit(resource.RLIMIT_AS, (taken + int(sys.argv[3]), resource.RLIM_INFINITY))

lightning.seed_everything(7, verbose=False)
module = QLoRAModule(sys.argv[1], micro_batch_tokens=1 << 20, compute_dtype="fp32", learning_rate=1e-2)
fit(module, ".", sys.argv[2], batch_size=32, max_steps=2, callbacks=[Limit()])
torch.save(module.state_dict(), sys.argv[4])
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory are Linux's")
def test_a_cpus_memory_that_really_runs_out_changes_no_result(tiny_base, tmp_path):
    rows = [{"instruction": f"{n} " + "some words of a long text " * 150, "output": "No."} for n in range(32)]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    adapters = []
    for room in (1 << 40, 130_000_000, 112_000_000):  # the last one runs out in a thread of the C++ too
        done = run_python("-c", LIMITED, tiny_base, file, room, tmp_path / "adapter.pt", cwd=ROOT, timeout=300)
        assert ("Memory ran out in a micro-batch of" in done.stdout) == (room < 1 << 40), done.stdout
        tensors = torch.load(tmp_path / "adapter.pt", weights_only=True)
        adapters.append(torch.cat([each.flatten() for each in tensors.values()]))
        assert float((adapters[-1] - adapters[0]).norm() / adapters[0].norm()) < 1e-5
