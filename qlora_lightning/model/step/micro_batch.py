"""Micro-batches: the parts in which a flat batch goes through the model, smaller ones after memory has run out.

Gradients are of sums, so it does not matter how a batch is cut. The module's
:class:`~qlora_lightning.model.memory.budget.TokenBudget` limits the size of a part.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from torch import Tensor

from qlora_lightning.model.anatomy import runs_flat
from qlora_lightning.model.guards import check_token_ids
from qlora_lightning.model.step.batch import check_row_length, cut_batch, filler_of, is_flat
from qlora_lightning.model.step.layout import Layout, lay_out
from qlora_lightning.support.errors import UserError, is_out_of_memory, reason_of
from qlora_lightning.support.trainer import split_of_pass

Result = TypeVar("Result")


def lay_out_part(module: Any, batch: Mapping[str, Any]) -> Layout:
    """Lay a flat batch out for a module; see :meth:`QLoRAModule.layout_of`."""
    causal_lm = module.causal_lm
    if missing := [name for name in ("input_ids", "position_ids", "labels", "cu_seqlens") if name not in batch]:
        raise UserError(
            f"A batch has {', '.join(map(str, batch)) or 'nothing'}, and no {missing[0]}: expected one flat stream of "
            "samples without padding, as InstructionDataModule makes it, or an own compute_loss."
        )
    check_token_ids(batch, len(causal_lm.get_input_embeddings().weight), *split_of_pass(module))
    # not if each token draws its own random numbers, for NEFTune's noise or for dropout
    draws = module.noise_alpha is not None or (causal_lm.training and module.has_dropout)
    layout = lay_out(batch, skips_unlabelled=module.fast and runs_flat(causal_lm.config) and not draws)
    check_row_length(causal_lm.config, layout.samples.longest)
    return layout


def lay_out_batch(module: Any, batch: Mapping[str, Any]) -> dict[str, Any]:
    """Add the layouts of its parts to a flat batch before it moves to a GPU: the host would wait to read it."""
    parts = cut_batch(batch, batch["cu_seqlens"].tolist(), module.token_budget.tokens)
    layouts = [lay_out_part(module, part) for part in parts]
    if module.device.type == "cuda":  # only from pinned memory does a GPU copy in the background
        batch = {name: value.pin_memory() if isinstance(value, Tensor) else value for name, value in batch.items()}
    return {**batch, "layouts": layouts}


def cut_into_micro_batches(module: Any, batch: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Cut a flat batch; see :meth:`QLoRAModule.micro_batches`."""
    layouts: list[Layout] = batch.get("layouts", [])
    layouts = layouts if all(layout.matches(batch) for layout in layouts) else []
    lengths = itertools.chain.from_iterable(layout.lengths for layout in layouts)
    cu_seqlens = list(itertools.accumulate(lengths, initial=0)) if layouts else batch["cu_seqlens"].tolist()
    parts = cut_batch(batch, cu_seqlens, module.token_budget.tokens)
    if [len(layout.lengths) for layout in layouts] != [len(part["cu_seqlens"]) - 1 for part in parts]:
        layouts = [lay_out_part(module, part).to(module.device) for part in parts]
    if module.sharded_base is not None and (n_fillers := module.sharded_base.largest(len(parts)) - len(parts)):
        filler = filler_of(batch, cu_seqlens)
        parts += [filler] * n_fillers
        layouts = [*layouts, *[lay_out_part(module, filler).to(module.device)] * n_fillers]
    return [{**part, "layout": layout.bind(part)} for part, layout in zip(parts, layouts, strict=True)]


def run_micro_batches(module: Any, batch: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the micro-batches of a batch, each while it goes through the model."""
    for micro_batch in module.micro_batches(batch):
        module.token_budget.running = micro_batch
        yield micro_batch


def compute_within_memory(
    module: Any, batch: Any, compute: Callable[[], Result], replay: Callable[[], Result]
) -> Result:
    """Return the result of a pass, which is repeated with fewer tokens at a time as often as memory runs out.

    Args:
        module: The module whose pass this is.
        batch: The batch that goes through the model.
        compute: Computes the result, by :func:`run_micro_batches`.
        replay: Computes it again, with everything else that was lost.

    Raises:
        RowDoesNotFit: A single row does not fit.
        UserError: The base is sharded.
    """
    while True:
        module.token_budget.running = None
        try:
            return compute()
        except Exception as error:
            # no other batch can be cut
            if not is_out_of_memory(error) or not is_flat(batch) or module.token_budget.running is None:
                raise
            if module.sharded_base is not None:
                raise UserError(
                    f"Out of memory on {module.device} under a sharded base, whose other processes wait in their "
                    "passes: set model.micro_batch_tokens to a smaller number, or a smaller data.max_length."
                ) from error
            reason = reason_of(error)
        module.token_budget.lower(module, reason)  # not in the handler: the error's traceback holds the activations
        compute = replay
