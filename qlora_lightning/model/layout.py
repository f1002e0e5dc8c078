"""What of a flat batch is computed: what a label needs, shared beginnings once, whole blocks of rows."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import nn

from qlora_lightning.model.layers.attention import attends_flatly, check_bounds
from qlora_lightning.model.loss import IGNORED

_LEAST_SHARED = 32  # one token in so many: fewer are not worth that attention looks them up

_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
_Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Needed:
    """What of the samples of a batch is computed.

    Attributes:
        seen: How many tokens of each sample, from its first, something is predicted from; at least 1.
        shared: How many of these another sample begins with too, which computes them.
        order: The samples, each behind the one that computes what it shares.
    """

    seen: list[int]
    shared: list[int]
    order: list[int]

    def kept(self, starts: Sequence[int]) -> _Numbers:
        """Give which tokens of the batch are computed, ``(K,)``; ``starts`` is where its samples begin."""
        spans = zip(starts, self.shared, self.seen, strict=True)
        return np.concatenate([np.arange(start + shared, start + seen) for start, shared, seen in spans])

    def places(self) -> _Numbers:
        """Give where among the computed tokens each one that a sample sees is, sample after sample."""
        ends = np.cumsum(np.subtract(self.seen, self.shared)).tolist()
        places = [np.arange(end - seen, end) for end, seen in zip(ends, self.seen, strict=True)]
        for before, sample in itertools.pairwise(self.order):
            places[sample][: self.shared[sample]] = places[before][: self.shared[sample]]
        return np.concatenate(places)


def find_needed(tokens: Sequence[npt.NDArray[np.integer]], predicts: Sequence[npt.NDArray[np.bool_]]) -> Needed:
    """Find what of the samples of a batch must be computed.

    Args:
        tokens: Of each sample, a number for each token; where they are the same, so are the states.
        predicts: From which of them something is predicted.
    """
    found = [np.flatnonzero(each).tolist() for each in predicts]
    seen = [places[-1] + 1 if places else 1 for places in found]
    shareable = [places[0] if places else 0 for places in found]
    # Whatever order sorts by the first token that differs: neighbours have most in common.
    order = sorted(range(len(tokens)), key=lambda sample: tokens[sample].tobytes())
    shared = [0] * len(tokens)
    for before, sample in itertools.pairwise(order):
        most = min(shareable[sample], seen[before])
        differ = np.flatnonzero(tokens[before][:most] != tokens[sample][:most])
        shared[sample] = int(differ[0]) if len(differ) else most
    if _LEAST_SHARED * sum(shared) < sum(seen):
        shared = [0] * len(tokens)
    return Needed(seen, shared, order)


def leave_out_unneeded(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Give a batch with a shorter stream, whose loss and gradients are the same.

    Args:
        batch: ``input_ids``, ``position_ids``, ``targets`` ``(1, tokens)`` and ``cu_seqlens`` ``(samples + 1,)``. The
            target of a token is the label of the one behind it.

    Returns:
        The batch with fewer tokens; where samples share some, with ``stream_places`` too: where in the stream the
        tokens of the samples are. These begin and end there where the new ``cu_seqlens`` says.
    """
    bounds, device = batch["cu_seqlens"], batch["input_ids"].device
    *starts, end = bounds.tolist()
    check_bounds((*starts, end), batch["input_ids"].shape[1])
    ids, positions, targets = (batch[name][0].cpu().numpy() for name in ("input_ids", "position_ids", "targets"))
    tokens = ids + (positions.astype(np.int64) << 32)  # at another position a token has another state
    needed = find_needed(np.split(tokens, starts[1:]), np.split(targets != IGNORED, starts[1:]))
    kept = torch.from_numpy(needed.kept(starts)).to(device)
    places = {"stream_places": torch.from_numpy(needed.places()).to(device)} if any(needed.shared) else {}
    return {
        **batch,
        **{name: batch[name][:, kept] for name in ("input_ids", "position_ids", "targets")},
        "cu_seqlens": F.pad(bounds.new_tensor(needed.seen).cumsum(0, dtype=bounds.dtype), (1, 0)),
        "longest": max(needed.seen),
        **places,
    }


def can_leave_out(causal_lm: Any, training: bool) -> bool:
    """Whether a model's states at a token are the same without the tokens behind it and in whichever sample it is.

    Not with attention that cannot look shared tokens up, nor where every sample is to drop inputs of its own.
    """
    return attends_flatly(causal_lm) and not (training and _has_dropout(causal_lm))


def _has_dropout(causal_lm: Any) -> bool:
    dropouts = (each.p for each in causal_lm.modules() if isinstance(each, _DROPOUTS))
    return any(dropouts) or bool(getattr(causal_lm.config, "attention_dropout", 0))


_ROWS = 16  # with 1,711 rows some products of oneDNN take a third longer than with 1,712 (measured)


def fill_up(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Give the batch with up to 15 more tokens, a sample of their own without labels.

    No result changes, but that dropout and NEFTune draw numbers for these tokens too.

    Args:
        batch: ``input_ids``, ``position_ids``, ``targets`` ``(1, tokens)``, ``cu_seqlens`` ``(samples + 1,)`` and
            ``longest``; where samples share beginnings also ``stream_places``.
    """
    ids = batch["input_ids"]
    more = filled(ids.shape[1]) - ids.shape[1]
    if not more:
        return dict(batch)
    bounds, positions, stream_places = batch["cu_seqlens"], batch["position_ids"], batch.get("stream_places")
    filler = torch.arange(ids.shape[1], ids.shape[1] + more, device=ids.device)
    return {
        **batch,
        "input_ids": torch.cat([ids, ids[:, -1:].expand(-1, more)], 1),  # token 0 may be bad where it is never read
        "position_ids": torch.cat([positions, torch.arange(more, device=positions.device)[None]], 1),
        "targets": F.pad(batch["targets"], (0, more), value=IGNORED),
        "cu_seqlens": torch.cat([bounds, bounds[-1:] + more]),
        "longest": max(batch["longest"], more),
        **({} if stream_places is None else {"stream_places": torch.cat([stream_places, filler])}),
    }


def filled(tokens: int) -> int:
    """Give the tokens of a batch that is filled up."""
    return -(-tokens // _ROWS) * _ROWS
