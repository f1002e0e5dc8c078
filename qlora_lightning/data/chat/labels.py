"""From a conversation to token ids and labels, by the tokenizer's own chat template, in training and in generation."""

import json
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from qlora_lightning.data.chat.control_tokens import Control, ControlTokens, find_stop_ids, writes_bos
from qlora_lightning.data.chat.render import Answer, ChatText, RenderedText
from qlora_lightning.data.chat.templates import find_presets
from qlora_lightning.data.rows.bad_rows import RowFault
from qlora_lightning.data.rows.conversation import Chat, Conversation, Message, Tools
from qlora_lightning.support.errors import UserError

IGNORED = -100  # torch's cross entropy skips this label
TRAIN_ON = ("assistant", "last", "all")


class Rendered(NamedTuple):
    """Token ids and, aligned with them, labels: the id itself where it is trained, else -100."""

    ids: list[int]
    labels: list[int]


class ChatRenderer:
    """Renders conversations with one tokenizer.

    A text is encoded as a whole, and its control tokens, at which every tokenizer splits, say which ids belong to which
    characters. Every row is checked: the ids before an answer are those that generation would begin with, and the
    labelled ids decode to the answer and its stop token.

    Args:
        tokenizer: a tokenizer of transformers with a chat template.
        stop_ids: token ids at which generation stops, beside those that come with the tokenizer.
        train_on: ``assistant``: every answer and its stop token; ``last``: only the last one; ``all``: every token.
            An answer with ``train: false`` is never trained.

    Raises:
        UserError: if the tokenizer has no chat template.
    """

    def __init__(self, tokenizer: Any, stop_ids: Collection[int] = (), train_on: str = "assistant") -> None:
        if getattr(tokenizer, "chat_template", None) is None:
            name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
            fitting = ", ".join(find_presets(tokenizer)) or "none does"
            raise UserError(
                f"the tokenizer {name} has no chat template, so rows cannot be rendered: set data.chat_template to a "
                f"preset that fits it ({fitting}) or to a .jinja file of your own, or name in data.tokenizer one that "
                "has a template (the model's -Instruct or -Chat variant)."
            )
        if train_on not in TRAIN_ON:
            raise UserError(f"train_on: expected {', '.join(TRAIN_ON)}, found {train_on!r}.")
        self.tokenizer = tokenizer
        self.train_on = train_on
        self.stop_ids = frozenset(stop_ids) | find_stop_ids(tokenizer)
        self._text = ChatText(tokenizer)
        self._controls = ControlTokens(tokenizer, self.stop_ids)
        self._writes_bos = writes_bos(tokenizer)
        self._headers: dict[str, list[int]] = {}

    def render(self, conversation: Conversation, tools: Tools = None) -> list[Rendered]:
        """Render one conversation; see :meth:`render_all`, which is quicker for many.

        Raises:
            RowFault: if this conversation cannot be trained on exactly.
            UserError: if the template cannot be used at all: it writes no stop token after an answer, or not one BOS.
        """
        (rendered,) = self.render_all([Chat(conversation, tools)])
        if isinstance(rendered, UserError):
            raise rendered
        return rendered

    def render_all(self, chats: Iterable[Chat]) -> list[list[Rendered] | UserError]:
        """Render chats.

        Turns after the last answer are left out, since nothing would be learnt from them. A conversation usually gives
        one sample; where the template renders an earlier answer otherwise once more turns follow, that answer gets a
        sample of its own, which ends with it.

        Returns:
            For each conversation its samples, or what :meth:`render` would raise.
        """
        texts = [self._render_text(*chat[:2]) for chat in chats]
        flat = [text for found in texts if not isinstance(found, UserError) for text in found]
        encoded = iter(self._encode_all(flat))
        return [found if isinstance(found, UserError) else self._label_all(found, encoded) for found in texts]

    def render_prompt(self, messages: Sequence[Message], tools: Tools = None) -> list[int]:
        """Return the ids that generation starts from: the conversation so far and the header of the answer to come.

        Raises:
            RowFault: if the messages cannot be rendered, or hold control tokens as text.
        """
        self._refuse_controls(messages, tools)
        rendered = self._text.render_prompt(messages, tools)
        ids = self._encode_texts([rendered.text])[0]
        controls = self._controls.in_text(rendered.text)
        for answer in rendered.answers:
            ids, _ = self._find_start(rendered.text, ids, controls, answer.start)
        self._check_bos(ids)
        return ids

    def find_answers(self, conversation: Conversation, tools: Tools, samples: int) -> list[list[int]]:
        """Return the places of the trained answers in each of the samples that :meth:`render` made of a conversation.

        Args:
            conversation: one that is rendered without a fault.
            tools: what may be called.
            samples: how many it made; one holds them all.
        """
        trained = self._find_trained(conversation)
        if samples == 1:
            return [trained]
        texts = self._text.render(conversation[: _count_used(conversation)], tools, trained)
        return [[answer.message for answer in text.answers] for text in texts]

    def render_answers(self, messages: Conversation, tools: Tools, answers: Sequence[int]) -> Rendered:
        """Render messages as one sample that trains the answers at these places, the last message among them."""
        text = self._text.render(messages, tools, answers)[-1]
        return self._label(text.text, text.answers, self._encode_all([text])[0])

    def count_tokens(self, messages: Sequence[Message], tools: Tools = None, generation: bool = False) -> int:
        """Count the tokens of messages to the stop token that ends them, or of a prompt for generation."""
        ids = self._encode_texts([self._text.apply(messages, tools, generation)])[0]
        stops = () if generation else (at for at, number in enumerate(ids, start=1) if number in self.stop_ids)
        return max(stops, default=len(ids))

    def find_control(self, text: str) -> str | None:
        """Return the first control token that a text would be encoded to."""
        return self._controls.search(text)

    def _render_text(self, conversation: Conversation, tools: Tools) -> list[RenderedText] | UserError:
        messages = conversation[: _count_used(conversation)]
        try:
            self._refuse_controls(messages, tools)
            if self.train_on == "all" and not all(message.get("train", True) for message in messages):
                raise RowFault("`train: false` in a message contradicts `train_on: all`")
            return self._text.render(messages, tools, self._find_trained(messages))
        except RowFault as fault:
            return fault

    def _find_trained(self, conversation: Conversation) -> list[int]:
        places = [number for number, message in enumerate(conversation) if message["role"] == "assistant"]
        wanted = places if self.train_on == "assistant" else places[-1:]
        return [number for number in wanted if conversation[number].get("train", True)]

    def _refuse_controls(self, messages: Sequence[Message], tools: Tools) -> None:
        """Text such as ``<|im_end|>`` inside a row would be encoded as the control token itself."""
        for number, message in enumerate(messages, start=1):
            place = f"message {number} ({message['role']}) contains"
            self._refuse_control(message["content"], place)
            for key in ("tool_calls", "name", "tool_call_id"):
                if key in message:
                    self._refuse_control(json.dumps(message[key], ensure_ascii=False), place)
        if tools:
            self._refuse_control(json.dumps(tools, ensure_ascii=False), "'tools' contain")

    def _refuse_control(self, text: str, place: str) -> None:
        found = self._controls.search(text)
        if found:
            raise RowFault(f"{place} the control token {found!r} as text, which would end or begin a turn there")

    def _encode_all(self, texts: Sequence[RenderedText]) -> list[list[int]]:
        """Encode texts, and beforehand in one go the headers before their answers."""
        headers = set[str]()
        for text in texts:
            controls = self._controls.in_text(text.text) if text.answers else []
            headers.update(_header(text.text, controls, answer.start) for answer in text.answers)
        new = sorted(headers - self._headers.keys())
        encoded = self._encode_texts([*new, *(text.text for text in texts)])
        if len(self._headers) > _REMEMBERED:
            self._headers.clear()
        self._headers.update(zip(new, encoded, strict=False))
        return encoded[len(new) :]

    def _encode_texts(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode texts as they are: the template writes the BOS itself."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:
            return [list(self.tokenizer.encode(text, add_special_tokens=False)) for text in texts]
        backend.no_truncation()
        backend.no_padding()
        return [found.ids for found in backend.encode_batch_fast(texts, add_special_tokens=False)]

    def _label_all(self, texts: Sequence[RenderedText], encoded: Iterator[list[int]]) -> list[Rendered] | UserError:
        pairs = [(text, next(encoded)) for text in texts]
        try:
            return [self._label(text.text, text.answers, ids) for text, ids in pairs]
        except UserError as error:
            return error

    def _label(self, text: str, answers: Sequence[Answer], ids: list[int]) -> Rendered:
        controls = self._controls.in_text(text)
        spans = []
        for answer in answers:
            ids, first = self._find_start(text, ids, controls, answer.start)
            spans.append((first, self._find_end(text, ids, controls, answer, first)))
        self._check_bos(ids)
        if self.train_on == "all":
            return Rendered(ids, [IGNORED, *ids[1:]])
        labels = [IGNORED] * len(ids)
        for first, after in spans:
            labels[first:after] = ids[first:after]
        return Rendered(ids, labels)

    def _find_start(self, text: str, ids: list[int], controls: Sequence[Control], start: int) -> tuple[list[int], int]:
        """Return the ids, and how many of them lie before an answer: exactly those that generation begins with.

        Generation begins at the answer without knowing what follows. Encoded as a whole, the newline that ends a header
        may melt with an answer that begins with one: there the text is cut, and encoded anew from the answer on.
        """
        places = self._controls.in_ids(ids)
        if [ids[at] for at in places] != [control.id for control in controls]:
            raise RowFault("the tokenizer does not encode the control tokens of the rendered text as themselves")
        before = sum(control.end <= start for control in controls)
        header = _header(text, controls, start)
        begin = places[before - 1] if before else 0
        known = self._headers.get(header) or self._encode_texts([header])[0]
        first = begin + len(known)
        if ids[begin:first] == known:
            return ids, first
        stretch_end = controls[before].start if before < len(controls) else len(text)
        behind = places[before] if before < len(places) else len(ids)
        return [*ids[:begin], *known, *self._encode_texts([text[start:stretch_end]])[0], *ids[behind:]], first

    def _find_end(self, text: str, ids: Sequence[int], controls: Sequence[Control], answer: Answer, first: int) -> int:
        """Check what the tokens of an answer say, and return how many ids lie before its end, stop token included."""
        inside = [control for control in controls if answer.start <= control.start < answer.end]
        if answer.calls:  # some templates begin a call with a control token
            inside = [control for control in inside if control.id in self.stop_ids]
        stop = inside[0] if inside else None
        if stop is None or stop.id not in self.stop_ids:
            found = f"is {text[stop.start : stop.end]!r}, at which generation does not stop" if stop else "is missing"
            raise UserError(self._describe_endless(text[answer.start : answer.end], found, answer.marked))
        wanted = text[answer.start : stop.end]
        if not all(part in wanted for part in answer.parts):
            raise RowFault(f"the chat template changes the answer (message {answer.message + 1}) to {wanted!r}")
        after = ids.index(stop.id, first) + 1
        said = self.tokenizer.decode(ids[first:after], clean_up_tokenization_spaces=False)
        if said != wanted and f" {said}" != wanted:  # sentencepiece decoders drop a space at the start
            raise RowFault(f"the labelled tokens say {said!r}, not the answer {wanted!r}")
        return after

    def _describe_endless(self, turn: str, found: str, marked: bool) -> str:
        stops = ", ".join(repr(token) for token, number in self._controls.ids.items() if number in self.stop_ids)
        where = "within its {% generation %} markers" if marked else "after an answer"
        return (
            f"the model would never learn to stop: {where} the chat template should write a stop token "
            f"({stops or 'the tokenizer names none'}), but the first control token there {found}. Use the "
            f"tokenizer and template that belong together. The turn as rendered: {turn!r}"
        )

    def _check_bos(self, ids: Sequence[int]) -> None:
        """Refuse a template that writes two BOS, or none where the tokenizer itself would write one.

        Raises:
            UserError: with the beginning of the row as the model would see it.
        """
        bos = self.tokenizer.bos_token_id
        if bos is None:
            return
        begins = f"The row begins: {self.tokenizer.decode(ids[:20])!r}"
        if list(ids[:2]) == [bos, bos]:
            raise UserError(f"expected one BOS token, found two: the chat template writes it twice. {begins}")
        if self._writes_bos and ids[0] != bos:
            raise UserError(
                f"expected the BOS token {self.tokenizer.bos_token!r} first, which this tokenizer puts before every "
                f"text, but the chat template writes none: begin it with {{{{ bos_token }}}}. {begins}"
            )


def _count_used(conversation: Conversation) -> int:
    """Count the messages up to the last answer; what follows it teaches nothing."""
    return max(number for number, message in enumerate(conversation, start=1) if message["role"] == "assistant")


_REMEMBERED = 1_000  # headers; some templates make one of the whole prompt


def _header(text: str, controls: Sequence[Control], start: int) -> str:
    """The text between the last control token before an answer, included, and the answer."""
    begin = next((control.start for control in reversed(controls) if control.end <= start), 0)
    return text[begin:start]
