"""From what a row says to token ids and labels, in training and in generation."""

import json
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple
from unicodedata import normalize

from qlora_lightning.data.chat.control_tokens import ControlTokens, find_stop_ids, writes_bos
from qlora_lightning.data.chat.render import REASONING, Answer, ChatText, RenderedText
from qlora_lightning.data.chat.templates import find_presets
from qlora_lightning.data.rows.bad_rows import RowFault
from qlora_lightning.data.rows.conversation import Chat, Content, Conversation, Message, Text, Tokens, Tools
from qlora_lightning.support.errors import UserError

IGNORED = -100  # torch's cross entropy skips this label
TRAIN_ON = ("assistant", "last", "all")


class Rendered(NamedTuple):
    """Token ids and, aligned with them, labels: the id itself where it is trained, else -100."""

    ids: list[int]
    labels: list[int]


class ChatRenderer:
    """Renders conversations, texts and tokens with one tokenizer.

    A text is encoded as a whole, and the characters that each token stands for say which tokens are an answer. Every
    row is checked: the ids before an answer are those that generation would begin with, and the labelled ids decode to
    the answer and its stop token. A token with any character of an untrained stretch of an answer is not labelled.

    Args:
        tokenizer: a tokenizer of transformers; for conversations with a chat template.
        stop_ids: token ids at which generation stops, beside those that come with the tokenizer.
        train_on: ``assistant``: every answer and its stop token; ``last``: only the last one; ``all``: every token.
            An answer with ``train: false`` is never trained.
        reasoning: of the answers before the last: ``template``: each answer is trained as the template renders it at
            inference, whether it keeps earlier reasoning or not; ``keep``: earlier answers keep their reasoning, as a
            client sees them that sends everything back; ``drop``: it is left out.
    """

    def __init__(
        self, tokenizer: Any, stop_ids: Collection[int] = (), train_on: str = "assistant", reasoning: str = "template"
    ) -> None:
        for name, value, known in (("train_on", train_on, TRAIN_ON), ("reasoning", reasoning, REASONING)):
            if value not in known:
                raise UserError(f"{name}: expected {', '.join(known)}, found {value!r}.")
        self.tokenizer = tokenizer
        self.train_on = train_on
        self.stop_ids = frozenset(stop_ids) | find_stop_ids(tokenizer)
        self._controls = ControlTokens(tokenizer, self.stop_ids)
        self._text = ChatText(tokenizer, self._controls, reasoning)
        self._writes_bos = writes_bos(tokenizer)
        self._headers: dict[str, _Encoded] = {}

    def render(self, conversation: Conversation, tools: Tools = None) -> list[Rendered]:
        """Render one conversation; see :meth:`render_all`, which is quicker for many.

        Raises:
            RowFault: if this conversation cannot be trained on exactly.
            UserError: if the template cannot be used at all: there is none, it writes no stop token after an answer,
                or not one BOS.
        """
        (rendered,) = self.render_all([Chat(conversation, tools)])
        if isinstance(rendered, UserError):
            raise rendered
        return rendered

    def render_all(self, contents: Iterable[Content]) -> list[list[Rendered] | UserError]:
        """Render rows.

        Of a conversation the turns after the last answer are left out, since nothing would be learnt from them. It
        usually gives one sample; where the template renders an earlier answer otherwise once more turns follow, that
        answer gets a sample of its own, which ends with it. A text or tokens give one sample.

        Returns:
            For each row its samples, or what :meth:`render` would raise.
        """
        contents = list(contents)
        written: list[list[RenderedText] | UserError] = []
        for content in contents:
            try:
                written.append(self._write(content))
            except UserError as error:
                written.append(error)
        texts = [text.text for found in written if not isinstance(found, UserError) for text in found]
        encoded = iter(self._encode(texts))
        return [self._label_all(*row, encoded) for row in zip(contents, written, strict=True)]

    def render_prompt(self, messages: Sequence[Message], tools: Tools = None) -> list[int]:
        """Return the ids that generation starts from: the conversation so far and the header of the answer to come.

        Raises:
            RowFault: if the messages cannot be rendered, or hold control tokens as text.
            UserError: if there is no chat template.
        """
        self._check_template()
        self._refuse_controls(messages, tools)
        text, answers = self._text.render_prompt(messages, tools)
        (encoded,) = self._encode([text])
        for answer in answers:
            self._find_start(text, encoded, answer.start)
        self._check_bos(encoded.ids)
        return encoded.ids

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
        text, found = self._text.render(messages, tools, answers)[-1]
        return self._label(text, found, self._encode([text])[0])

    def drop_earlier_reasoning(self, conversation: Conversation) -> Conversation:
        """Return a conversation without what ``reasoning: drop`` leaves out of it."""
        return self._text.drop_earlier_reasoning(conversation[: _count_used(conversation)])

    def count_tokens(self, messages: Conversation, tools: Tools = None, generation: bool = False) -> int:
        """Count the tokens of messages to the stop token that ends them, or of a prompt for generation."""
        ids = self._encode([self._text.write(messages, tools, generation)])[0].ids
        stops = () if generation else (at for at, number in enumerate(ids, start=1) if number in self.stop_ids)
        return max(stops, default=len(ids))

    def find_control(self, text: str) -> str | None:
        """Return the first control token that a text would be encoded to."""
        found = self._controls.pattern.search(text)
        return found[0] if found else None

    def _check_template(self) -> None:
        if getattr(self.tokenizer, "chat_template", None) is not None:
            return
        name = getattr(self.tokenizer, "name_or_path", "") or type(self.tokenizer).__name__
        fitting = ", ".join(find_presets(self.tokenizer)) or "none does"
        raise UserError(
            f"the tokenizer {name} has no chat template, so rows cannot be rendered: set data.chat_template to a "
            f"preset that fits it ({fitting}) or to a .jinja file of your own, or name in data.tokenizer one that "
            "has a template (the model's -Instruct or -Chat variant)."
        )

    def _check_offsets(self, what: str) -> None:
        if getattr(self.tokenizer, "backend_tokenizer", None) is None:
            raise RowFault(f"{what} need a tokenizer that knows the characters of its tokens, a fast one")

    def _write(self, content: Content) -> list[RenderedText]:
        """Return the texts that a row becomes; tokens become none."""
        if isinstance(content, Tokens):
            return []
        if isinstance(content, Text):
            return [self._write_text(content)]
        self._check_template()
        if any("untrained" in message for message in content.messages):
            self._check_offsets("parts that are not trained")
        messages = content.messages[: _count_used(content.messages)]
        self._refuse_controls(messages, content.tools)
        marked = [message for message in messages if not message.get("train", True) or message.get("untrained")]
        if self.train_on == "all" and marked:
            raise RowFault("`train: false` in a message contradicts `train_on: all`")
        return self._text.render(messages, content.tools, self._find_trained(messages))

    def _write_text(self, content: Text) -> RenderedText:
        """Return the text of a document, with BOS and end, or of segments, the trained ones as its answers."""
        if content.whole:
            text = "".join(segment for segment, _ in content.segments)
            self._refuse_control(text, "the text contains")
            begin = self.tokenizer.bos_token if self._writes_bos else ""
            return RenderedText(f"{begin}{text}{self.tokenizer.eos_token or ''}", [])
        text, answers = "", list[Answer]()
        for segment, trained in content.segments:
            if trained and answers and answers[-1].end == len(text):
                answers[-1] = answers[-1]._replace(end=len(text) + len(segment))
            elif trained and segment:
                answers.append(Answer(0, len(text), len(text) + len(segment)))
            text += segment
        return RenderedText(text, answers)

    def _find_trained(self, conversation: Conversation) -> list[int]:
        places = [number for number, message in enumerate(conversation) if message["role"] == "assistant"]
        wanted = places if self.train_on == "assistant" else places[-1:]
        return [number for number in wanted if conversation[number].get("train", True)]

    def _refuse_controls(self, messages: Sequence[Message], tools: Tools) -> None:
        """Text such as ``<|im_end|>`` inside a row would be encoded as the control token itself."""
        for number, message in enumerate(messages, start=1):
            place = f"message {number} ({message['role']}) contains"
            self._refuse_control(message["content"], place)
            for key in ("reasoning_content", "tool_calls", "name", "tool_call_id"):
                if key in message:
                    self._refuse_control(json.dumps(message[key], ensure_ascii=False), place)
        if tools:
            self._refuse_control(json.dumps(tools, ensure_ascii=False), "'tools' contain")

    def _refuse_control(self, text: str, place: str) -> None:
        found = self._controls.pattern.search(text)
        if found:
            raise RowFault(f"{place} the control token {found[0]!r} as text, which would end or begin a turn there")

    def _encode(self, texts: Sequence[str]) -> list["_Encoded"]:
        """Encode texts as they are: the template writes the BOS itself."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:
            encode = self.tokenizer.encode
            return [_Encoded(_Plain(encode(text, add_special_tokens=False), text, self._controls)) for text in texts]
        backend.no_truncation()
        backend.no_padding()
        return [_Encoded(found) for found in backend.encode_batch(list(texts), add_special_tokens=False)]

    def _decode(self, ids: list[int]) -> str:
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:
            return str(self.tokenizer.decode(ids))
        return str(backend.decode(ids, skip_special_tokens=False))

    def _label_all(
        self, content: Content, texts: list[RenderedText] | UserError, encoded: Iterator["_Encoded"]
    ) -> list[Rendered] | UserError:
        if isinstance(texts, UserError):
            return texts
        pairs = [(text, next(encoded)) for text in texts]
        try:
            if isinstance(content, Tokens):
                return [self._check_tokens(content)]
            if isinstance(content, Text):
                return [self._label_text(content, text, found) for text, found in pairs]
            return [self._label(*text, found) for text, found in pairs]
        except UserError as error:
            return error

    def _label(self, text: str, answers: Sequence[Answer], encoded: "_Encoded") -> Rendered:
        """Label the answers of a conversation, each to its stop token."""
        places = []
        for answer in answers:
            first = self._find_start(text, encoded, answer.start)
            after = encoded.find_end(answer.end)
            wanted = text[answer.start : answer.end]
            said = self._decode(encoded.ids[first:after])
            if said != wanted and not _is_same_text(said, wanted):
                raise RowFault(f"the labelled tokens say {said!r}, not the answer {wanted!r}")
            places.append((answer, first, after))
        ids = encoded.ids
        self._check_bos(ids)
        if self.train_on == "all":
            return Rendered(ids, [IGNORED, *ids[1:]])
        labels = [IGNORED] * len(ids)
        for answer, first, after in places:
            labels[first:after] = ids[first:after]
            for token in range(first, after) if answer.untrained else ():
                begin, end = encoded.find_characters(token)
                if any(begin < behind and start < end for start, behind in answer.untrained):
                    labels[token] = IGNORED
        return Rendered(ids, labels)

    def _label_text(self, content: Text, rendered: RenderedText, encoded: "_Encoded") -> Rendered:
        """Label a document, or the trained segments of a text: those tokens that lie in them with every character."""
        if content.whole:
            return Rendered(encoded.ids, [IGNORED, *encoded.ids[1:]])
        self._check_offsets("segments")
        text, segments = rendered
        starts, before = list[int](), (0, 0)
        for segment in segments:
            starts.append(self._find_start(text, encoded, segment.start, before))
            before = starts[-1], segment.start
        labels = [IGNORED] * len(encoded.ids)
        for first, segment in zip(starts, segments, strict=True):
            for token in range(max(first, 1), len(labels)):  # nothing predicts the first one
                begin, end = encoded.find_characters(token)
                if begin >= segment.end:
                    break
                if begin >= segment.start and end <= segment.end:
                    labels[token] = encoded.ids[token]
        return Rendered(encoded.ids, labels)

    def _check_tokens(self, content: Tokens) -> Rendered:
        ids, labels = list(content.ids), list(content.labels)
        size = len(self.tokenizer)
        if not ids or len(ids) != len(labels):
            raise RowFault(f"expected token ids and as many labels, found {len(ids)} and {len(labels)}")
        if not 0 <= min(ids) <= max(ids) < size:
            wrong = next(number for number in ids if not 0 <= number < size)
            raise RowFault(f"the token id {wrong} is not in the vocabulary of {size:,} tokens: of another tokenizer?")
        for at, (number, label) in enumerate(zip(ids, labels, strict=True)):
            if label not in (IGNORED, number):
                raise RowFault(f"label {at} is {label}: expected {IGNORED} (not trained) or the token id {number}")
        return Rendered(ids, [IGNORED, *labels[1:]])  # nothing predicts the first one

    def _find_start(self, text: str, encoded: "_Encoded", start: int, before: tuple[int, int] = (0, 0)) -> int:
        """Return how many ids lie before an answer, exactly those that generation begins with.

        Generation begins at the answer without knowing what follows. Encoded as a whole, the newline that ends a header
        may melt with an answer that begins with one: there the text is cut, and encoded again from the answer on.

        Args:
            text: the whole.
            encoded: its tokens, which a cut changes.
            start: the first character of the answer.
            before: a token and its first character, where the text was cut before; else its beginning.
        """
        controls = self._controls.known
        begin = encoded.find_token(start - 1)
        while begin > before[0] and encoded.ids[begin] not in controls:
            begin -= 1
        at = encoded.find_characters(begin)[0] if encoded.ids[begin] in controls else before[1]
        header = self._encode_header(text[at:start])
        first = begin + len(header.ids)
        if encoded.ids[begin:first] == header.ids:
            return first
        behind = next((token for token in range(begin + 1, len(encoded.ids)) if encoded.ids[token] in controls), None)
        end = len(text) if behind is None else encoded.find_characters(behind)[0]
        encoded.replace((begin, at), behind, header, start, self._encode([text[start:end]])[0])
        return first

    def _encode_header(self, header: str) -> "_Encoded":
        if header not in self._headers:
            if len(self._headers) > _REMEMBERED:
                self._headers.clear()
            self._headers[header] = self._encode([header])[0]
        return self._headers[header]

    def _check_bos(self, ids: Sequence[int]) -> None:
        """Refuse a template that writes two BOS, or none where the tokenizer itself would write one.

        Raises:
            UserError: with the beginning of the row as the model would see it.
        """
        bos = self.tokenizer.bos_token_id
        if bos is None:
            return
        if list(ids[:2]) == [bos, bos]:
            raise UserError(
                "expected one BOS token, found two: the chat template writes it twice. The row begins: "
                f"{self.tokenizer.decode(ids[:20])!r}"
            )
        if self._writes_bos and ids[0] != bos:
            raise UserError(
                f"expected the BOS token {self.tokenizer.bos_token!r} first, which this tokenizer puts before every "
                "text, but the chat template writes none: begin it with {{ bos_token }}. The row begins: "
                f"{self.tokenizer.decode(ids[:20])!r}"
            )


_REMEMBERED = 1_000  # headers; some templates make one of the whole prompt


def _count_used(conversation: Conversation) -> int:
    """Count the messages up to the last answer; what follows it teaches nothing."""
    return max(number for number, message in enumerate(conversation, start=1) if message["role"] == "assistant")


def _is_same_text(said: str, wanted: str) -> bool:
    """Whether a tokenizer changed no more than how characters are composed, or a space before them.

    Qwen's tokenizers compose accents (NFC), others spell out ligatures too (NFKC); decoders of sentencepiece drop a
    space at the start.
    """
    forms = (wanted, *(normalize(form, wanted) for form in _FORMS))
    return any(text in forms for text in (said, f" {said}"))


_FORMS: tuple[Literal["NFC", "NFKC"], ...] = ("NFC", "NFKC")


class _Stretch(NamedTuple):
    """Tokens of one encoding: the first token and character, and how many lie before those of the encoding itself."""

    token: int
    character: int
    encoding: Any
    tokens_before: int
    characters_before: int


class _Encoded:
    """The ids of a text and the characters of each; what is cut holds stretches that were encoded by themselves.

    Args:
        encoding: an ``Encoding`` of tokenizers, or a :class:`_Plain`.
    """

    def __init__(self, encoding: Any) -> None:
        self.ids: list[int] = encoding.ids
        self._stretches: list[_Stretch] = [_Stretch(0, 0, encoding, 0, 0)]

    def find_token(self, character: int) -> int:
        """Return the first token that holds a character, or the nearest one before it that a token holds; else 0."""
        stretch: _Stretch = next(one for one in reversed(self._stretches) if one.character <= max(character, 0))
        for at in range(character - stretch.characters_before, -1, -1):
            token: int | None = stretch.encoding.char_to_token(at)
            if token is not None:
                return token + stretch.tokens_before
        return stretch.token

    def find_characters(self, token: int) -> tuple[int, int]:
        """Return the first character of a token and the one behind it."""
        stretch = next(one for one in reversed(self._stretches) if one.token <= token)
        begin, end = stretch.encoding.token_to_chars(token - stretch.tokens_before) or (0, 0)
        return int(begin) + stretch.characters_before, int(end) + stretch.characters_before

    def find_end(self, character: int) -> int:
        """Return the token behind the one, a control token, that ends before a character."""
        return self.find_token(character - 1) + 1

    def replace(
        self, begin: tuple[int, int], behind: int | None, header: "_Encoded", start: int, answer: "_Encoded"
    ) -> None:
        """Put a header and an answer, each encoded by itself, in the place of tokens.

        Args:
            begin: the first token that goes, and its first character.
            behind: the first one that stays behind these; None if none does.
            header: the new tokens to the start of the answer.
            start: the first character of the answer.
            answer: the new tokens from there on.
        """
        token, character = begin
        first = token + len(header.ids)
        stretches = [one for one in self._stretches if one.token < token]
        stretches.append(_Stretch(token, character, header._stretches[0].encoding, token, character))
        stretches.append(_Stretch(first, start, answer._stretches[0].encoding, first, start))
        if behind is not None:
            last = next(one for one in reversed(self._stretches) if one.token <= behind)
            after = first + len(answer.ids)
            at, shift = self.find_characters(behind)[0], last.tokens_before + after - behind
            stretches.append(_Stretch(after, at, last.encoding, shift, last.characters_before))
        rest = [] if behind is None else self.ids[behind:]
        self.ids = [*self.ids[:token], *header.ids, *answer.ids, *rest]
        self._stretches = stretches


class _Plain:
    """What stands for an encoding of a tokenizer without offsets: it knows the characters of control tokens alone.

    Raises:
        RowFault: if the tokenizer does not encode the control tokens of the text as themselves.
    """

    def __init__(self, ids: Sequence[int], text: str, controls: ControlTokens) -> None:
        self.ids = list(ids)
        tokens = [at for at, number in enumerate(self.ids) if number in controls.known]
        found = list(controls.pattern.finditer(text))
        if [self.ids[at] for at in tokens] != [controls.ids[one[0]] for one in found]:
            raise RowFault("the tokenizer does not encode the control tokens of the rendered text as themselves")
        self._spans = {token: one.span() for token, one in zip(tokens, found, strict=True)}

    def char_to_token(self, character: int) -> int | None:
        """Return the last control token that begins at or before a character."""
        return next((token for token, (begin, _) in reversed(self._spans.items()) if begin <= character), None)

    def token_to_chars(self, token: int) -> tuple[int, int] | None:
        """Return the first character of a control token and the one behind it."""
        return self._spans.get(token)
