"""Samples longer than ``max_length``: shortened, dropped, or split into pieces."""

from bisect import bisect_left
from collections.abc import Collection, Sequence
from itertools import groupby

from qlora_lightning.data.chat.renderer import ChatRenderer, TokenizedSample
from qlora_lightning.data.rows.content import Conversation, Tools, answer_indices
from qlora_lightning.sources.tensors import IGNORED


def shorten(
    renderer: ChatRenderer, conversation: Conversation, tools: Tools, answers: Sequence[int], max_length: int
) -> TokenizedSample | None:
    """Render a conversation in at most ``max_length`` tokens, never joining parts of different turns.

    Whole turns are removed first, from the oldest; the system message and the tools stay, and the rest begins with a
    user turn. If the last exchange alone is too long, the longest run of it without labels and control tokens loses
    its middle, down to a quarter of ``max_length``, then the next run. If it is still too long, its end is cut off,
    with the stop token: none is trained where the text does not end.

    ``answers`` are the indices of the trained answers of the sample; messages after the last of them are left out. If
    no labeled token fits, there is no sample.

    Raises:
        RowFault: the template rejects the remaining messages.
    """
    if not answers:
        return None
    conversation, last = conversation[: answer_indices(conversation)[-1] + 1], answers[-1]
    conversation = renderer.template.arrange_reasoning(conversation)
    system = conversation[:1] if conversation[0]["role"] == "system" else []

    def render(start: int) -> TokenizedSample:
        messages = [*system, *conversation[start : last + 1]]
        trained = [index - start + len(system) for index in answers if index > start]
        return renderer.render_answers(messages, tools, trained)

    def count(sample: TokenizedSample) -> int:
        # text that a template writes after the last stop token is cut before any turn
        stops = (end for end, label in enumerate(sample.labels, start=1) if label in renderer.stop_ids)
        return max(stops, default=len(sample.ids))

    user_turns = [index for index, message in enumerate(conversation[:last]) if message["role"] == "user"]
    n_removed = bisect_left(user_turns[:-1], True, key=lambda start: count(render(start)) <= max_length)
    sample = render(user_turns[n_removed])
    while (excess := count(sample) - max_length) > 0:
        start, length = _find_longest_run(sample, renderer.controls.known)
        n_cut = min(excess, length - _quarter(max_length))
        if n_cut <= 0:
            break
        middle = start + (length - n_cut + 1) // 2
        sample = TokenizedSample(*(tokens[:middle] + tokens[middle + n_cut :] for tokens in sample))
    ids, labels = sample.ids[:max_length], sample.labels[:max_length]
    return TokenizedSample(ids, labels) if any(label != IGNORED for label in labels) else None


def _find_longest_run(sample: TokenizedSample, controls: Collection[int]) -> tuple[int, int]:
    """Return start and length of the longest run without labels and control tokens; zeros if there is none."""
    removable = [label == IGNORED and token_id not in controls for token_id, label in zip(*sample, strict=True)]
    runs = groupby(range(len(removable)), lambda i: removable[i])
    longest = max((list(run) for is_removable, run in runs if is_removable), key=len, default=list[int]())
    return (longest[0], len(longest)) if longest else (0, 0)


def split_up(sample: TokenizedSample, max_length: int, context: int | None = None) -> list[TokenizedSample]:
    """Cut a sample into pieces of at most ``max_length`` tokens that train each labeled token exactly once.

    Each later piece begins with the last ``context`` tokens of the one before, without labels: at least 1, to predict
    the next from; by default a quarter of ``max_length``. Pieces without a labeled token are left out, so there may
    be none.
    """
    ids, labels = sample
    context = context or _quarter(max_length)
    pieces = []
    for start in range(0, max(len(ids) - context, 1), max_length - context):
        end = start + max_length
        n_context = context if start else 1  # nothing predicts the very first token
        piece_labels = [IGNORED] * n_context + labels[start + n_context : end]
        if any(label != IGNORED for label in piece_labels):
            pieces.append(TokenizedSample(ids[start:end], piece_labels))
    return pieces


def _quarter(max_length: int) -> int:
    return -(-max_length // 4)
