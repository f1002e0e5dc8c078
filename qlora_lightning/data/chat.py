"""A conversation as token ids and labels, by the tokenizer's own chat template, in training and in generation."""

import re
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from jinja2 import TemplateError

from qlora_lightning.data.bad_rows import RowFault
from qlora_lightning.data.formats import Conversation, Message
from qlora_lightning.data.stops import find_stop_ids
from qlora_lightning.errors import UserError

IGNORED = -100  # torch's cross entropy skips this label
TRAIN_ON = ("assistant", "last", "all")


class Rendered(NamedTuple):
    """Token ids and, aligned with them, labels: the id itself where it is trained, else -100."""

    ids: list[int]
    labels: list[int]


class _Answer(NamedTuple):
    """An assistant turn in the rendered text: its message, its first character after the header, and its end."""

    message: int
    start: int
    end: int


class ChatRenderer:
    """Renders conversations with one tokenizer.

    transformers can mark assistant tokens only in templates with ``{% generation %}``, which hardly any model ships.
    Here they are found by rendering what generation would see before each answer, and every row is checked.

    Args:
        tokenizer: a tokenizer of transformers with a chat template.
        stop_ids: token ids at which generation stops, beside those that come with the tokenizer.
        train_on: ``assistant``: every answer and its stop token; ``last``: only the last one; ``all``: every token.

    Raises:
        UserError: if the tokenizer has no chat template.
    """

    def __init__(self, tokenizer: Any, stop_ids: Collection[int] = (), train_on: str = "assistant") -> None:
        if getattr(tokenizer, "chat_template", None) is None:
            name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
            raise UserError(
                f"the tokenizer {name} has no chat template, so rows cannot be rendered: name in `tokenizer:` one that "
                "has (the model's -Instruct or -Chat variant)."
            )
        if train_on not in TRAIN_ON:
            raise UserError(f"train_on: expected {', '.join(TRAIN_ON)}, found {train_on!r}.")
        self.tokenizer = tokenizer
        self.train_on = train_on
        self.stop_ids = frozenset(stop_ids) | find_stop_ids(tokenizer)
        self._controls = _control_tokens(tokenizer, self.stop_ids)
        longest_first = sorted(self._controls, key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    def render(self, conversation: Conversation) -> Rendered:
        """Render a conversation; turns after the last answer are left out, since nothing would be learnt from them.

        Raises:
            RowFault: if this conversation cannot be trained on exactly.
            UserError: if the template cannot be used at all: it writes no stop token after an answer.
        """
        last = max(number for number, message in enumerate(conversation) if message["role"] == "assistant")
        messages = conversation[: last + 1]
        self._refuse_controls(messages)
        text = self._apply(messages)
        answers = self._find_answers(messages, text)
        ids, borders = self._encode(text, [answer.start for answer in answers])
        self._check_start(ids)
        labels = [IGNORED] * len(ids)
        for answer, first in zip(answers, borders, strict=False):
            if self.train_on != "last" or answer.message == last:
                after = self._find_end(text, answer, messages, ids, first)
                labels[first:after] = ids[first:after]
        if self.train_on == "all":
            labels = [IGNORED, *ids[1:]]
        return Rendered(ids, labels)

    def render_prompt(self, messages: Sequence[Message]) -> list[int]:
        """Return the ids that generation starts from: the conversation so far and the header of the answer to come.

        Raises:
            RowFault: if the messages cannot be rendered, or hold control tokens as text.
        """
        self._refuse_controls(messages)
        text = self._apply(messages, generation=True)
        answers = self._find_answers(messages, text, trained=False)
        ids, _ = self._encode(text, [answer.start for answer in answers])
        self._check_start(ids)
        return ids

    def _apply(self, messages: Sequence[Message], generation: bool = False) -> str:
        try:
            text = self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=generation)
        except TemplateError as error:
            raise RowFault(f"the chat template refuses the conversation: {error}") from error
        return str(text)

    def _refuse_controls(self, messages: Sequence[Message]) -> None:
        """Text such as ``<|im_end|>`` inside a message would be encoded as the control token itself."""
        for number, message in enumerate(messages, start=1):
            found = self._control.search(message["content"])
            if found:
                raise RowFault(
                    f"message {number} ({message['role']}) contains the control token {found[0]!r} as text, which "
                    "would end or begin a turn there"
                )

    def _find_answers(self, messages: Sequence[Message], text: str, trained: bool = True) -> list[_Answer]:
        """Find the answers in the text; turns that the template renders otherwise once more turns follow are left out.

        Raises:
            RowFault: if such a turn would be trained on, or if the template leaves out what a message says.
        """
        answers = []
        for number, message in enumerate(messages):
            is_last = number == len(messages) - 1
            if message["role"] != "assistant":
                if message["content"].strip() not in text:
                    raise RowFault(f"the chat template leaves out or changes message {number + 1} ({message['role']})")
                continue
            prompt = self._apply(messages[:number], generation=True)
            turns = text if is_last and trained else self._apply(messages[: number + 1])
            if turns.startswith(prompt) and text.startswith(turns):
                answers.append(_Answer(number, len(prompt), len(turns)))
            elif trained and (is_last or self.train_on == "assistant"):
                advice = "" if is_last else "; `train_on: last` trains on the last answer only"
                raise RowFault(
                    f"the chat template is not prefix-preserving: it renders message {number + 1} (assistant) "
                    f"otherwise than generation would see and continue it{advice}"
                )
        return answers

    def _encode(self, text: str, borders: Sequence[int]) -> tuple[list[int], list[int]]:
        """Encode so that the ids before each border are those of the text before it alone.

        Generation begins at a border without knowing what follows. Encoded as a whole, the newline that ends a header
        may melt with an answer that begins with one: there the text is cut, and encoded from the border on.

        Args:
            text: the rendered conversation.
            borders: characters at which an answer begins, ascending.

        Returns:
            The ids, and for each border (and the end of the text) how many ids lie before it.
        """
        ids: list[int] = []
        counts: list[int] = []
        cut, kept, previous = 0, 0, 0  # the stretch being encoded: its first character, its first id; the last border
        for border in (*borders, len(text)):
            stretch = self._encode_text(text[cut:border])
            if stretch[: len(ids) - kept] != ids[kept:]:
                cut, kept = previous, len(ids)
                stretch = self._encode_text(text[cut:border])
            ids[kept:] = stretch
            counts.append(len(ids))
            previous = border
        return ids, counts

    def _encode_text(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False))  # the template writes the BOS itself

    def _check_start(self, ids: Sequence[int]) -> None:
        bos = self.tokenizer.bos_token_id
        if bos is not None and list(ids[:2]) == [bos, bos]:
            raise UserError("the chat template and the tokenizer both write a BOS token: expected one, found two.")

    def _find_end(self, text: str, answer: _Answer, messages: Sequence[Message], ids: Sequence[int], first: int) -> int:
        """Check what the tokens of an answer say, and return how many ids lie before its end, stop token included."""
        rendered = text[answer.start : answer.end]
        stop = self._control.search(rendered)
        if stop is None or self._controls[stop[0]] not in self.stop_ids:
            found = f"is {stop[0]!r}, at which generation does not stop" if stop else "there is none"
            stops = ", ".join(repr(token) for token, number in self._controls.items() if number in self.stop_ids)
            raise UserError(
                f"the model would never learn to stop: after an answer the chat template should write a stop token "
                f"({stops or 'the tokenizer names none'}), but the first control token there {found}. Use the "
                f"tokenizer and template that belong together. The turn as rendered: {rendered!r}"
            )
        wanted = rendered[: stop.end()]
        if messages[answer.message]["content"].strip() not in wanted:
            raise RowFault(f"the chat template changes the answer (message {answer.message + 1}) to {wanted!r}")
        stop_id = self._controls[stop[0]]
        after = next((at + 1 for at in range(first, len(ids)) if ids[at] == stop_id), len(ids))
        said = self.tokenizer.decode(ids[first:after], clean_up_tokenization_spaces=False)
        if said != wanted and f" {said}" != wanted:  # sentencepiece decoders drop a space at the start
            raise RowFault(f"the labelled tokens say {said!r}, not the answer {wanted!r}")
        return after


def _control_tokens(tokenizer: Any, stop_ids: Collection[int]) -> dict[str, int]:
    """Return text and id of every token that begins, ends or structures text, rather than being text."""
    controls = {str(token): number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    controls.update(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    controls.update({tokenizer.decode([number]): number for number in stop_ids})
    return controls


def render(
    tokenizer: Any, conversation: Conversation, stop_ids: Collection[int] = (), train_on: str = "assistant"
) -> Rendered:
    """Render one conversation; see :class:`ChatRenderer`, which is quicker for many."""
    return ChatRenderer(tokenizer, stop_ids, train_on).render(conversation)


def render_prompt(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    """Return the ids of a prompt for generation: the one way to make them; see :meth:`ChatRenderer.render_prompt`."""
    return ChatRenderer(tokenizer).render_prompt(messages)
