"""Samples longer than ``max_length``: shortened, dropped, or split into pieces."""

from bisect import bisect_left
from collections.abc import Collection, Sequence
from itertools import groupby

from qlora_lightning.base.tensors import IGNORED
from qlora_lightning.data.chat.labels import ChatRenderer, Rendered
from qlora_lightning.data.rows.conversation import Conversation, Tools


def shorten(
    renderer: ChatRenderer, conversation: Conversation, tools: Tools, answers: Sequence[int], max_length: int
) -> Rendered | None:
    """Render a conversation in at most ``max_length`` tokens, and never so that turns are welded together.

    Whole turns go first, the oldest before the others; the system message and the tools stay, and what remains begins
    with a user turn. If the last exchange alone is too long, the longest stretch of it without labels and control
    tokens loses its middle, down to a quarter of ``max_length``, then the next. If it is still too long, it loses its
    end, and with it the stop token: none is trained where the text does not end.

    ``answers`` are the indices of the trained ones that the sample keeps; messages after the last of them are left
    out. If what must stay leaves no room for a labelled token, there is no sample.

    Raises:
        RowFault: the template refuses what remains.
    """
    if not answers:
        return None
    conversation, last = renderer.drop_earlier_reasoning(conversation), answers[-1]
    system = conversation[:1] if conversation[0]["role"] == "system" else []

    def render(start: int) -> Rendered:
        messages = [*system, *conversation[start : last + 1]]
        trained = [number - start + len(system) for number in answers if number > start]
        return renderer.render_answers(messages, tools, trained)

    def count(sample: Rendered) -> int:
        # what a template writes behind the last stop token goes before any turn
        stops = (at for at, label in enumerate(sample.labels, start=1) if label in renderer.stop_ids)
        return max(stops, default=len(sample.ids))

    users = [number for number, message in enumerate(conversation[:last]) if message["role"] == "user"]
    first = bisect_left(users[:-1], True, key=lambda start: count(render(start)) <= max_length)
    sample = render(users[first])
    while (excess := count(sample) - max_length) > 0:
        start, length = _find_longest_run(sample, renderer.control_ids)
        gone = min(excess, length - _quarter(max_length))
        if gone <= 0:
            break
        middle = start + (length - gone + 1) // 2
        sample = Rendered(*(tokens[:middle] + tokens[middle + gone :] for tokens in sample))
    ids, labels = sample.ids[:max_length], sample.labels[:max_length]
    return Rendered(ids, labels) if any(label != IGNORED for label in labels) else None


def _find_longest_run(sample: Rendered, controls: Collection[int]) -> tuple[int, int]:
    """Return where the longest stretch without labels and control tokens begins, and its length; 0 if there is none."""
    tokens = enumerate(zip(*sample, strict=True))
    runs = groupby(tokens, lambda token: token[1][1] == IGNORED and token[1][0] not in controls)
    free = [[at for at, _ in run] for is_free, run in runs if is_free]
    longest = max(free, key=len, default=list[int]())
    return (longest[0], len(longest)) if longest else (0, 0)


def split_up(sample: Rendered, max_length: int, context: int | None = None) -> list[Rendered]:
    """Cut a sample into pieces of at most ``max_length`` tokens that train each labelled token exactly once.

    Each later piece begins with the tokens that ended the one before as context without labels. A piece without a
    labelled token is left out, so that there may be none. ``context`` tokens are repeated, at least 1, without which
    the first one could not be predicted: 1 for documents, else a quarter of ``max_length``.
    """
    ids, labels = sample
    context = context or _quarter(max_length)
    pieces = []
    for start in range(0, max(len(ids) - context, 1), max_length - context):
        end = start + max_length
        n_context = context if start else 1  # nothing predicts the very first token
        own = [IGNORED] * n_context + labels[start + n_context : end]
        if any(label != IGNORED for label in own):
            pieces.append(Rendered(ids[start:end], own))
    return pieces


def _quarter(max_length: int) -> int:
    return -(-max_length // 4)
