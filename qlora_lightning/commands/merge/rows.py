"""The validation rows on which a merged model is judged."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning
import numpy as np

from qlora_lightning.base.adapter_folder import find_run_config
from qlora_lightning.commands.inspection.arguments import make_data_module, parse
from qlora_lightning.commands.options import quiet_lightning
from qlora_lightning.data.batches.collate import collate_rows
from qlora_lightning.data.samples import SampleSet
from qlora_lightning.support.errors import UserError

_TOKENS = 1_024  # of a batch; one layer's activations of a batch exist at a time
_LOGIT_BYTES = 500_000_000  # the reference's logits are kept


def find_config(adapter: Path, chosen: str | None) -> Path | None:
    """Find the config that names validation rows: the one that was named, else that of the adapter's run folder."""
    return find_run_config(adapter) if chosen is None else Path(chosen)


def load_rows(config: Path | None, overrides: Sequence[str], count: int, vocabulary: int) -> list[Mapping[str, Any]]:
    """Prepare validation rows as the run did, and lay some of them, evenly spaced, into flat batches.

    Args:
        config: A config as ``fit`` takes it.
        overrides: Options of ``fit`` that go before it.
        count: Rows wanted; fewer are taken where their logits would need much memory.
        vocabulary: Size of the model's vocabulary.

    Raises:
        UserError: There is no config, or it names no validation rows.
    """
    if config is None and not any(each.startswith("--data.val") for each in overrides):
        raise UserError(
            "The merged model is checked on validation rows, and there is no config.yaml beside the adapter folder "
            "that names them. Name a config with --config, or leave the check out with --rows 0."
        )
    named = [] if config is None else ["--config", str(config)]
    _, settings = parse([*named, *overrides])
    if settings.seed is not False:  # the split by val_fraction depends on it
        lightning.seed_everything(None if settings.seed is True else settings.seed, verbose=False)
    data = make_data_module(settings)
    if data.files["val"] is None and data.val_fraction is None:
        raise UserError(
            f"{config or 'The command line'} names no validation rows, on which the merged model is checked. Name a "
            "file with --data.val, or leave the check out with --rows 0."
        )
    with quiet_lightning():
        data.setup("validate")
    return _lay_out(data.samples["val"], count, _LOGIT_BYTES // (4 * vocabulary))


def _lay_out(samples: SampleSet, count: int, budget: int) -> list[Mapping[str, Any]]:
    """Lay rows into batches, with at most ``budget`` labelled tokens in all; the first row is always taken."""
    lengths, labelled = samples.lengths, samples.labelled_counts
    batches: list[list[int]] = [[]]
    tokens = judged = 0
    for row in np.unique(np.linspace(0, len(samples) - 1, min(count, len(samples)), dtype=int)).tolist():
        if judged and judged + labelled[row] > budget:
            break
        if batches[-1] and tokens + lengths[row] > _TOKENS:
            batches.append([])
            tokens = 0
        batches[-1].append(row)
        tokens, judged = tokens + int(lengths[row]), judged + int(labelled[row])
    if not judged:
        raise UserError("The validation rows have no labelled token, so nothing can be judged on them.")
    return [collate_rows(samples, rows) for rows in batches]
