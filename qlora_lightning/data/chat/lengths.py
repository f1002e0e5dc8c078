"""Samples longer than ``max_length``: shortened, dropped, or split into pieces."""

from qlora_lightning.data.chat.renderer import IGNORED
from qlora_lightning.errors import UserError

TOO_LONG = ("truncate", "drop", "split")

Tokens = tuple[list[int], list[int]]  # ids and, aligned with them, labels


def check_length_settings(max_length: int, too_long: str = "truncate") -> None:
    """Refuse settings that no sample could be fitted to.

    Raises:
        UserError: if ``max_length`` is less than 2 or ``too_long`` is none of the three words.
    """
    if max_length < 2:
        raise UserError(f"max_length: expected at least 2 (a token and the one that it predicts), found {max_length}.")
    if too_long not in TOO_LONG:
        raise UserError(f"too_long: expected {', '.join(TOO_LONG)}, found {too_long!r}.")


def fit_length(ids: list[int], labels: list[int], max_length: int, too_long: str = "truncate") -> list[Tokens]:
    """Return the samples that a rendered conversation becomes, none longer than ``max_length``.

    What fits is returned as it is. Of what does not, ``truncate`` makes one sample (see ``shorten``), ``drop`` none,
    and ``split`` several (see ``split_up``). No end of a text is ever trained where the text does not end.

    Args:
        ids: token ids.
        labels: aligned with ``ids``, -100 where nothing is trained.
        max_length: tokens, at least 2.
        too_long: ``truncate``, ``drop`` or ``split``.

    Raises:
        UserError: if ``max_length`` is less than 2 or ``too_long`` is another word.
    """
    check_length_settings(max_length, too_long)
    if len(ids) <= max_length:
        return [(ids, labels)]
    if too_long == "drop":
        return []
    if too_long == "split":
        return split_up(ids, labels, max_length)
    return [shorten(ids, labels, max_length)]


def shorten(ids: list[int], labels: list[int], max_length: int) -> Tokens:
    """Cut a sample to ``max_length`` tokens, out of the middle of its prompt first, then off the end of its answers.

    The prompt is what stands before the first labelled token. It keeps its start (system prompt, header) and its end
    (the header of the answer). If the answers do not fit beside a quarter of ``max_length`` (or the whole prompt, if
    that is shorter), they lose their end, and with it the stop token: none is trained where the text does not end.
    A sample that fits is returned as it is.

    Args:
        ids: token ids.
        labels: aligned with ``ids``, -100 where nothing is trained.
        max_length: tokens, at least 2.

    Raises:
        UserError: if ``max_length`` is less than 2.
    """
    check_length_settings(max_length)
    if len(ids) <= max_length:
        return ids, labels
    labelled = [at for at, label in enumerate(labels) if at > 0 and label != IGNORED]
    if not labelled:
        return ids[:max_length], labels[:max_length]
    first, end = labelled[0], labelled[-1] + 1
    prompt = min(first, max(_quarter(max_length), max_length - (end - first)))
    end = min(end, first + max_length - prompt)
    end = next(at for at in reversed(labelled) if at < end) + 1  # of a turn that was cut away, keep no header
    head, tail = prompt // 2, prompt - prompt // 2
    keep = [*range(head), *range(first - tail, end)]
    return [ids[at] for at in keep], [labels[at] for at in keep]


def split_up(ids: list[int], labels: list[int], max_length: int) -> list[Tokens]:
    """Cut a sample into pieces of at most ``max_length`` tokens that train each labelled token exactly once.

    Each later piece begins with the tokens that ended the one before, a quarter of ``max_length``, as context without
    labels. A piece without a labelled token is left out, so that there may be none.

    Args:
        ids: token ids.
        labels: aligned with ``ids``, -100 where nothing is trained.
        max_length: tokens, at least 2.
    """
    context = _quarter(max_length)
    pieces = []
    for start in range(0, max(len(ids) - context, 1), max_length - context):
        end = start + max_length
        seen = context if start else 1  # nothing predicts the very first token
        own = [IGNORED] * seen + labels[start + seen : end]
        if any(label != IGNORED for label in own):
            pieces.append((ids[start:end], own))
    return pieces


def _quarter(max_length: int) -> int:
    return -(-max_length // 4)
