"""Micro-batches: the parts in which a flat batch goes through the model, and smaller ones whenever memory runs out.

Gradients are of sums, so that it does not matter how a batch is cut. How large a part may be, the module's
:class:`~qlora_lightning.model.memory.budget.TokenBudget` knows.
"""

import itertools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torch import Tensor

from qlora_lightning.model.guards.guard import check_token_ids
from qlora_lightning.model.load.machine import is_out_of_memory
from qlora_lightning.model.step.batch import check_row_length, cut_batch, filler_of, is_flat
from qlora_lightning.model.step.forward import skips_unlabelled
from qlora_lightning.model.step.layout import Layout, lay_out
from qlora_lightning.support.trainer import training_data_of

Result = TypeVar("Result")


def lay_out_part(module: Any, batch: Mapping[str, Any]) -> Layout:
    """Lay a flat batch out as a module computes it; see :meth:`QLoRAModule.layout_of`."""
    causal_lm = module.causal_lm
    check_token_ids(batch, len(causal_lm.get_input_embeddings().weight), training_data_of(module))
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


def compute_within_memory(
    module: Any, batches: list[Any], compute: Callable[[], Result], replay: Callable[[], Result]
) -> Result:
    """Return what takes memory to compute: as often as memory runs out, with less in the model at a time.

    Args:
        module: The module whose pass this is.
        batches: What is computed, or again by ``replay``; a message names their rows.
        compute: Computes it.
        replay: Computes it again.

    Raises:
        UserError: Nothing is left that would help.
    """
    while True:
        try:
            return compute()
        except Exception as error:
            # any other batch cannot be cut, and of a sharded base the other processes wait in their passes
            if not is_out_of_memory(error) or not is_flat(batches[-1]) or module.sharded_base is not None:
                raise
            words = str(error).partition("\n")[0].rstrip(".")
        # not in the handler: the error's traceback holds the activations
        parts = [part for batch in batches for part in cut_into_micro_batches(module, batch)]
        module.token_budget.lower(module, parts, words)
        compute = replay
