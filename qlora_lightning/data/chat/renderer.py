"""From a row to token ids and labels, in training and in generation."""

import hashlib
import json
from bisect import bisect_left
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple
from unicodedata import normalize

from qlora_lightning.data.chat import templates
from qlora_lightning.data.chat.conversation import RenderedText, TemplateRenderer
from qlora_lightning.data.rows.content import (
    Content,
    Conversation,
    Message,
    RowFault,
    Text,
    Tokens,
    Tools,
    answer_indices,
)
from qlora_lightning.sources.tensors import IGNORED
from qlora_lightning.support.errors import UserError


class TokenizedSample(NamedTuple):
    """Token ids and, aligned with them, labels: the id itself if it is trained, else -100, as always the first."""

    ids: list[int]
    labels: list[int]


class ChatRenderer:
    """Renders conversations, texts and tokens with one tokenizer; settings are those of the data module.

    A text is encoded as a whole; the character offsets of its tokens locate the answers. Every row is checked: the ids
    before an answer are those that generation would begin with, and the labelled ids decode to the answer and its stop
    token.
    """

    def __init__(self, tokenizer: Any, train_on: str = "assistant", reasoning: str = "template") -> None:
        self.tokenizer = tokenizer
        self.train_on = train_on
        self.stop_ids = templates.find_stop_ids(tokenizer)
        self._controls = templates.ControlTokens(tokenizer, self.stop_ids)
        self.control_ids = self._controls.known
        self._text = TemplateRenderer(tokenizer, self._controls, reasoning)
        self._writes_bos = templates.writes_bos(tokenizer)
        self._backend: Any = getattr(tokenizer, "backend_tokenizer", None)
        if self._backend is None:
            raise UserError(
                f"{templates.name_tokenizer(tokenizer)} does not know which characters its tokens stand for: expected "
                "a fast one, of the library tokenizers.",
                "tokenizer.slow",
            )
        plain, newline, after_newline = (encoded.ids for encoded in self.encode(["a", "\n", "\na"]))
        # Sentencepiece puts a space before a text: there a part is encoded after a newline, whose ids are dropped.
        self._lead = "" if after_newline[len(newline) :] == plain else "\n"
        self._lead_length = len(newline) if self._lead else 0

    def write(self, content: Content) -> list[RenderedText]:
        """Return the texts of a row, without the turns after its last answer; a row of tokens has none.

        Raises:
            RowFault: the row cannot be trained on exactly.
            UserError: there is no chat template, or it writes no stop token after an answer.
        """
        if isinstance(content, Tokens):
            return []
        if isinstance(content, Text):
            self._check_text(content.text, "the text contains")
            bos = self.tokenizer.bos_token if self._writes_bos else ""
            return [RenderedText(f"{bos}{content.text}{self.tokenizer.eos_token or ''}", [])]
        # messages after the last answer are not trained
        messages = content.messages[: answer_indices(content.messages)[-1] + 1]
        self._check_messages(messages, content.tools)
        if self.train_on == "all" and not all(message.get("train", True) for message in messages):
            raise RowFault("`train: false` in a message contradicts `train_on: all`")
        return self._text.render(messages, content.tools, self._find_trained(messages))

    def encode(self, texts: list[str]) -> list["Encoded"]:
        """Encode texts as they are, on all cores: the template writes the BOS itself."""
        self._backend.no_truncation()
        self._backend.no_padding()
        encodings = self._backend.encode_batch(texts, add_special_tokens=False)
        return [Encoded(encoding.ids, encoding.offsets) for encoding in encodings]

    def label(
        self, content: Content, texts: Sequence[RenderedText], encoded: Sequence["Encoded"]
    ) -> list[TokenizedSample]:
        """Label what :meth:`write` and :meth:`encode` returned for a row.

        Raises:
            RowFault: the row cannot be trained on exactly.
            UserError: the template does not write exactly one BOS.
        """
        if isinstance(content, Tokens):
            return [self._check_tokens(content)]
        if isinstance(content, Text):
            return [_label_all(encoding.ids) for encoding in encoded]
        return [self._label(*pair) for pair in zip(texts, encoded, strict=True)]

    def render_prompt(self, messages: Sequence[Message], tools: Tools = None) -> list[int]:
        """Return the ids that generation starts from: the conversation so far and the header of the next answer.

        Raises:
            RowFault: if the messages cannot be rendered, or hold control tokens as text.
            UserError: if there is no chat template.
        """
        self._check_messages(messages, tools)
        # earlier answers that are trained may have been cut from their headers
        trained = self.train_on == "assistant"
        wanted = [i for i in answer_indices(messages) if trained and messages[i].get("train", True)]
        rendered = self._text.render_prompt(messages, tools, wanted)
        encoded, _ = self._find_starts(rendered, *self.encode([rendered.text]))
        self._check_bos(encoded.ids)
        return encoded.ids

    def render_answers(self, messages: Conversation, tools: Tools, answers: Sequence[int]) -> TokenizedSample:
        """Render messages as one sample that trains the answers at these indices; the last message is one of them."""
        rendered = self._text.render(messages, tools, answers)[-1]
        return self._label(rendered, *self.encode([rendered.text]))

    @property
    def opens_reasoning(self) -> bool:
        """Whether generation begins within a block of reasoning, as with DeepSeek-R1."""
        return self._text.opens_reasoning

    def as_sent(self, prompt: Sequence[Message]) -> Sequence[dict[str, Any] | Message]:
        """Return the messages of a prompt for a server, which renders them with the same template."""
        return self._text.as_sent(prompt)

    def arrange_reasoning(self, conversation: Conversation) -> Conversation:
        """Return a conversation up to its last answer, without the reasoning that ``reasoning: drop`` leaves out."""
        return self._text.arrange_reasoning(conversation[: answer_indices(conversation)[-1] + 1])

    def hash_prompt(self, content: Content, added_system: str | None = None) -> int:
        """Hash what comes before the first trained answer, as in the row; 0 for a text, which has no prompt.

        ``added_system`` is the system prompt of the settings: with and without it a question is the same.
        """
        if isinstance(content, Tokens):
            labelled = (index for index, label in enumerate(content.labels) if label != IGNORED)
            return _hash(content.ids[: next(labelled, 0)])
        if isinstance(content, Text):
            return 0
        messages = content.messages
        answers = answer_indices(messages) if self.train_on == "all" else self._find_trained(messages)
        prompt = messages[: min(answers, default=0)]
        if prompt and prompt[0] == {"role": "system", "content": added_system}:
            prompt = prompt[1:]
        turns = [{**message, "content": message["content"].strip(), "train": None} for message in prompt]
        return _hash([turns, content.tools])

    def _find_trained(self, conversation: Conversation) -> list[int]:
        answers = answer_indices(conversation)
        trained = answers if self.train_on == "assistant" else answers[-1:]
        return [index for index in trained if conversation[index].get("train", True)]

    def _check_messages(self, messages: Sequence[Message], tools: Tools) -> None:
        """Reject control tokens as text: ``<|im_end|>`` inside a row would be encoded as the control token itself."""
        if getattr(self.tokenizer, "chat_template", None) is None:
            raise UserError(
                f"{templates.name_tokenizer(self.tokenizer)} has no chat template, so rows cannot be rendered: set "
                f"data.chat_template to {', '.join(templates.find_presets(self.tokenizer))} or a .jinja file.",
                "data.chat_template",
            )
        for number, message in enumerate(messages, start=1):
            text = message["content"]
            for key in ("reasoning_content", "tool_calls", "name", "tool_call_id"):
                if key in message:
                    text += "\n" + json.dumps(message[key], ensure_ascii=False)
            self._check_text(text, f"message {number} ({message['role']}) contains")
        if tools:
            self._check_text(json.dumps(tools, ensure_ascii=False), "'tools' contain")

    def _check_text(self, text: str, subject: str) -> None:
        control = self._controls.pattern.search(text)
        if control:
            raise RowFault(f"{subject} the control token {control[0]!r} as text, which would end or begin a turn there")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise RowFault(f"{subject} half a character (a lone surrogate, as a cut \\ud83d leaves)") from None

    def _label(self, rendered: RenderedText, encoded: "Encoded") -> TokenizedSample:
        """Label the answers of a conversation, each to its stop token."""
        text, answers = rendered
        encoded, starts = self._find_starts(rendered, encoded)
        ids = encoded.ids
        self._check_bos(ids)
        labels = [IGNORED] * len(ids)
        for start, answer in zip(starts, answers, strict=True):
            end = encoded.find(answer.end)
            decoded = str(self._backend.decode(ids[start:end], skip_special_tokens=False))
            expected = text[answer.start : answer.end]
            if not _is_same_text(decoded, expected):
                raise RowFault(f"the labelled tokens decode to {decoded!r}, not to the answer {expected!r}")
            labels[start:end] = ids[start:end]
        return _label_all(ids) if self.train_on == "all" else TokenizedSample(ids, [IGNORED, *labels[1:]])

    def _check_tokens(self, content: Tokens) -> TokenizedSample:
        ids, labels = list(content.ids), list(content.labels)
        size = len(self.tokenizer)
        if not ids or len(ids) != len(labels):
            raise RowFault(f"expected token ids and as many labels, found {len(ids)} and {len(labels)}")
        if not 0 <= min(ids) <= max(ids) < size:
            raise RowFault(
                f"token ids from {min(ids)} to {max(ids)}, in a vocabulary of {size:,}: another tokenizer's?"
            )
        if any(label not in (IGNORED, token_id) for token_id, label in zip(ids, labels, strict=True)):
            raise RowFault(f"a label must be {IGNORED} or the token id itself, not shifted")
        return TokenizedSample(ids, [IGNORED, *labels[1:]])

    def _find_starts(self, rendered: RenderedText, encoded: "Encoded") -> tuple["Encoded", list[int]]:
        r"""Return the ids of a text, and how many precede each answer: exactly those that generation begins with.

        Generation encodes the header without the answer. In the whole text the newlines that end a header may merge
        with an answer that begins with one. There the text is cut, and the rest is encoded on its own. For example,
        Llama 3 and the answer ``\nHi``::

            whole text      <|end_header_id|> \n\n\n Hi <|eot_id|>
            generation      <|end_header_id|> \n\n
            cut             <|end_header_id|> \n\n | \n Hi <|eot_id|>
        """
        text, answers = rendered
        counts = [self._count_before(text, encoded, answer.start) for answer in answers]
        if None in counts:
            cuts = [answer.start for answer, count in zip(answers, counts, strict=True) if count is None]
            encoded = self._encode_parts(text, cuts)
            counts = [self._count_before(text, encoded, answer.start) for answer in answers]
        starts = [count for count in counts if count is not None]
        if len(starts) < len(answers):
            raise RowFault("the ids before an answer are not those that generation would begin with")
        return encoded, starts

    def _count_before(self, text: str, encoded: "Encoded", start: int) -> int | None:
        """Count the ids before a character; None if from the last control token on they are not those of the header."""
        n_before = encoded.find(start)
        begin = next((i for i in reversed(range(n_before)) if encoded.ids[i] in self._controls.known), 0)
        (header,) = self.encode([text[encoded.spans[begin][0] : start]])
        end = begin + len(header.ids)
        return end if encoded.ids[begin:end] == header.ids else None

    def _encode_parts(self, text: str, cuts: Sequence[int]) -> "Encoded":
        """Encode the parts of a text between cuts, each on its own."""
        encoded = Encoded([], [])
        for start, end in pairwise([0, *cuts, len(text)]):
            lead, n_lead = (self._lead, self._lead_length) if start else ("", 0)
            (part,) = self.encode([lead + text[start:end]])
            encoded.ids.extend(part.ids[n_lead:])
            shift = start - len(lead)
            encoded.spans.extend((span[0] + shift, span[1] + shift) for span in part.spans[n_lead:])
        return encoded

    def _check_bos(self, ids: list[int]) -> None:
        """Reject a template that writes two BOS, or none although the tokenizer itself would write one."""
        bos = self.tokenizer.bos_token_id
        if bos is None or (ids[0] == bos and ids[1:2] != [bos]) or (ids[0] != bos and not self._writes_bos):
            return
        raise UserError(
            f"expected one BOS token ({self.tokenizer.bos_token}) at the beginning, found "
            f"{'two' if ids[0] == bos else 'none'}: write {{{{ bos_token }}}} once in the chat template.",
            "chat_template.bos",
        )


def _label_all(ids: list[int]) -> TokenizedSample:
    return TokenizedSample(ids, [IGNORED, *ids[1:]])  # nothing predicts the first token


def _is_same_text(decoded: str, expected: str) -> bool:
    """Whether two texts are equal but for how characters are composed, and for spaces at the start.

    Qwen's tokenizers compose accents (NFC), others also spell out ligatures (NFKC); sentencepiece decoders drop a space
    at the start.
    """
    return decoded == expected or normalize("NFKC", decoded).lstrip(" ") == normalize("NFKC", expected).lstrip(" ")


class Encoded(NamedTuple):
    """The ids of a text, and the span of characters of each, ``(start, end)``."""

    ids: list[int]
    spans: list[tuple[int, int]]

    def find(self, character: int) -> int:
        """Return the index of the first token that begins at a character or after it."""
        return bisect_left(self.spans, character, key=lambda span: span[0])


def _hash(prompt: list[Any]) -> int:
    """Return a number of 64 bits for a prompt; 0 if it is empty."""
    digest = hashlib.blake2b(json.dumps(prompt, sort_keys=True).encode(), digest_size=8).digest()
    return int.from_bytes(digest, signed=True) if prompt else 0
