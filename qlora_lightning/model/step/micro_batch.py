"""Micro-batches: the parts in which a flat batch goes through the model, and smaller ones whenever memory runs out.

Gradients are of sums, so that it does not matter how a batch is cut. How large a part may be, the module's
:class:`~qlora_lightning.model.memory.budget.TokenBudget` knows.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from torch import Tensor

from qlora_lightning.model.guards.guard import check_token_ids
from qlora_lightning.model.load.machine import is_out_of_memory
from qlora_lightning.model.step.batch import check_row_length, cut_batch, filler_of, is_flat
from qlora_lightning.model.step.forward import skips_unlabelled
from qlora_lightning.model.step.layout import Layout, lay_out
from qlora_lightning.support.errors import UserError
from qlora_lightning.support.trainer import split_of_pass

Result = TypeVar("Result")


def lay_out_part(module: Any, batch: Mapping[str, Any]) -> Layout:
    """Lay a flat batch out as a module computes it; see :meth:`QLoRAModule.layout_of`."""
    causal_lm = module.causal_lm
    check_token_ids(batch, len(causal_lm.get_input_embeddings().weight), *split_of_pass(module))
    layout = lay_out(batch, skips_unlabelled=skips_unlabelled(causal_lm, module.noise_alpha, fast=module.fast))
    check_row_length(causal_lm.config, layout.samples.longest)
    return layout


def lay_out_batch(module: Any, batch: Mapping[str, Any]) -> dict[str, Any]:
    """Give a flat batch the layouts of its parts: before it moves to a GPU, whose numbers would be waited for."""
    parts = cut_batch(batch, batch["cu_seqlens"].tolist(), module.token_budget.tokens)
    layouts = [lay_out_part(module, part) for part in parts]
    if module.device.type == "cuda":  # from pinned memory alone it is copied in the background
        batch = {name: each.pin_memory() if isinstance(each, Tensor) else each for name, each in batch.items()}
    return {**batch, "layouts": layouts}


def cut_into_micro_batches(module: Any, batch: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Cut a flat batch; see :meth:`QLoRAModule.micro_batches`."""
    layouts: list[Layout] = batch.get("layouts", [])
    layouts = layouts if all(each.matches(batch) for each in layouts) else []
    lengths = itertools.chain.from_iterable(each.lengths for each in layouts)
    cu_seqlens = list(itertools.accumulate(lengths, initial=0)) if layouts else batch["cu_seqlens"].tolist()
    parts = cut_batch(batch, cu_seqlens, module.token_budget.tokens)
    if [len(each.lengths) for each in layouts] != [len(part["cu_seqlens"]) - 1 for part in parts]:
        layouts = [lay_out_part(module, part).to(module.device) for part in parts]
    if module.sharded_base is not None and (missing := module.sharded_base.largest(len(parts)) - len(parts)):
        filler = filler_of(batch, cu_seqlens)
        parts += [filler] * missing
        layouts = [*layouts, *[lay_out_part(module, filler).to(module.device)] * missing]
    return [{**part, "layout": layout.bind(part)} for part, layout in zip(parts, layouts, strict=True)]


def run_micro_batches(module: Any, batch: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the micro-batches of a batch, each while it goes through the model."""
    for part in module.micro_batches(batch):
        module.token_budget.running = part
        yield part


def compute_within_memory(
    module: Any, batch: Any, compute: Callable[[], Result], replay: Callable[[], Result]
) -> Result:
    """Return what takes memory to compute: as often as memory runs out, with less in the model at a time.

    Args:
        module: The module whose pass this is.
        batch: What goes through the model.
        compute: Computes it, by :func:`run_micro_batches`.
        replay: Computes it again, with all that memory which ran out has undone.

    Raises:
        RowDoesNotFit: Nothing is left that would help.
        UserError: The base is sharded.
    """
    while True:
        module.token_budget.running = None
        try:
            return compute()
        except Exception as error:
            # any other batch cannot be cut
            if not is_out_of_memory(error) or not is_flat(batch) or module.token_budget.running is None:
                raise
            if module.sharded_base is not None:
                raise UserError(
                    f"Out of memory on {module.device} under a sharded base, whose other processes wait in their "
                    "passes: set model.micro_batch_tokens to a smaller number, or a smaller data.max_length."
                ) from error
            words = str(error).partition("\n")[0].rstrip(".")
        module.token_budget.lower(module, words)  # not in the handler: the error's traceback holds the activations
        compute = replay
