"""From a row to token ids and labels, in training and in generation."""

import hashlib
import json
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple
from unicodedata import normalize

import tokenizers

from qlora_lightning.data.chat import templates
from qlora_lightning.data.chat.conversation import RenderedText, TemplateRenderer
from qlora_lightning.data.rows.content import (
    Chat,
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
from qlora_lightning.support.errors import UserError, bounded

_COST = "a conversation cannot be rendered by the chat template"


class TokenizedSample(NamedTuple):
    """Token ids and, aligned with them, labels: the id itself if it is trained, else -100, as always the first."""

    ids: list[int]
    labels: list[int]


class ChatRenderer:
    """Renders conversations, texts and tokens with one tokenizer; settings are those of the data module.

    A row is written as text, encoded as a whole, and labeled: the character offsets of its tokens locate the answers.
    Every row is checked: the ids before an answer are those that generation would begin with, and the labeled ids
    decode to the answer and its stop token. ``template`` renders conversations as text.
    """

    def __init__(self, tokenizer: Any, train_on: str = "assistant") -> None:
        self.tokenizer = tokenizer
        self.train_on = train_on
        self.stop_ids = templates.find_stop_ids(tokenizer)
        self.controls = templates.ControlTokens(tokenizer, self.stop_ids)
        with bounded(_COST, "chat_template.cost"):
            self.template = TemplateRenderer(tokenizer, self.controls)
        self._writes_bos = templates.writes_bos(tokenizer)
        self._backend: Any = tokenizer.backend_tokenizer
        plain, newline, after_newline = (encoding.ids for encoding in self._encode(["a", "\n", "\na"]))
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
        return self.template.render(messages, content.tools, self._find_trained(messages))

    def encode(self, texts: Sequence[RenderedText]) -> None:
        """Give texts their tokens, on all cores."""
        encodings = self._encode([text.text for text in texts])
        for text, encoding in zip(texts, encodings, strict=True):
            text.ids, text.spans = encoding.ids, encoding.offsets

    def label(self, content: Content, texts: Sequence[RenderedText]) -> list[TokenizedSample]:
        """Label what :meth:`write` returned for a row and :meth:`encode` gave tokens.

        Raises:
            RowFault: the row cannot be trained on exactly.
            UserError: the template does not write exactly one BOS.
        """
        if isinstance(content, Tokens):
            return [self._check_tokens(content)]
        if isinstance(content, Text):
            return [_label_all(text.ids) for text in texts]
        return [self._label_answers(text) for text in texts]

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
        with bounded(_COST, "chat_template.cost"):
            rendered = self.template.render_prompt(messages, tools, wanted)
        self.encode([rendered])
        self._find_starts(rendered)
        self._check_bos(rendered.ids)
        return rendered.ids

    def render_answers(self, messages: Conversation, tools: Tools, answers: Sequence[int]) -> TokenizedSample:
        """Render messages as one sample that trains the answers at these indices; the last message is one of them."""
        with bounded(_COST, "chat_template.cost"):
            rendered = self.template.render(messages, tools, answers)[-1]
        self.encode([rendered])
        return self._label_answers(rendered)

    def hash_prompt(self, content: Content, added_system: str | None = None) -> int:
        """Return 64 bits for what comes before the first trained answer, as in the row; 0 for a text, which has none.

        ``added_system`` is the system prompt of the settings: with and without it a question is the same.
        """
        prompt: list[Any] = []
        if isinstance(content, Tokens):
            labelled = (index for index, label in enumerate(content.labels) if label != IGNORED)
            prompt = content.ids[: next(labelled, 0)]
        elif isinstance(content, Chat):
            messages = content.messages
            answers = answer_indices(messages) if self.train_on == "all" else self._find_trained(messages)
            turns = messages[: min(answers, default=0)]
            if turns and turns[0] == {"role": "system", "content": added_system}:
                turns = turns[1:]
            stripped = [{**message, "content": message["content"].strip(), "train": None} for message in turns]
            prompt = [stripped, content.tools]
        digest = hashlib.blake2b(json.dumps(prompt, sort_keys=True).encode(), digest_size=8).digest()
        return int.from_bytes(digest, signed=True) if prompt else 0

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
        control = self.controls.pattern.search(text)
        if control:
            raise RowFault(f"{subject} the control token {control[0]!r} as text, which would end or begin a turn there")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise RowFault(f"{subject} half a character (a lone surrogate, as a cut \\ud83d leaves)") from None

    def _label_answers(self, rendered: RenderedText) -> TokenizedSample:
        """Label the answers of a conversation, each to its stop token."""
        starts = self._find_starts(rendered)
        ids = rendered.ids
        self._check_bos(ids)
        labels = [IGNORED] * len(ids)
        for start, answer in zip(starts, rendered.answers, strict=True):
            end = rendered.find_token(answer.end)
            decoded = str(self._backend.decode(ids[start:end], skip_special_tokens=False))
            expected = rendered.text[answer.start : answer.end]
            # Qwen's tokenizers compose accents (NFC), others also spell out ligatures (NFKC); sentencepiece decoders
            # drop a space at the start
            if normalize("NFKC", decoded).lstrip(" ") != normalize("NFKC", expected).lstrip(" "):
                raise RowFault(f"the labeled tokens decode to {decoded!r}, not to the answer {expected!r}")
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

    def _find_starts(self, rendered: RenderedText) -> list[int]:
        r"""Return how many ids precede each answer: exactly those that generation begins with.

        Generation encodes the header without the answer. In the whole text the newlines that end a header may merge
        with an answer that begins with one. There the text is cut, and the rest is encoded on its own. For example,
        Llama 3 and the answer ``\nHi``::

            whole text      <|end_header_id|> \n\n\n Hi <|eot_id|>
            generation      <|end_header_id|> \n\n
            cut             <|end_header_id|> \n\n | \n Hi <|eot_id|>
        """
        counts = {answer.start: self._count_before(rendered, answer.start) for answer in rendered.answers}
        cuts = [start for start, count in counts.items() if count is None]
        if cuts:
            self._encode_parts(rendered, cuts)
            counts = {start: self._count_before(rendered, start) for start in counts}
        starts = [count for count in counts.values() if count is not None]
        if len(starts) < len(counts):
            raise RowFault("the ids before an answer are not those that generation would begin with")
        return starts

    def _count_before(self, rendered: RenderedText, start: int) -> int | None:
        """Count the ids before a character; None if from the last control token on they are not those of the header."""
        n_before = rendered.find_token(start)
        begin = next((i for i in reversed(range(n_before)) if rendered.ids[i] in self.controls.known), 0)
        (header,) = self._encode([rendered.text[rendered.spans[begin][0] : start]])
        end = begin + len(header.ids)
        return end if rendered.ids[begin:end] == header.ids else None

    def _encode_parts(self, rendered: RenderedText, cuts: Sequence[int]) -> None:
        """Encode the parts of a text between cuts, each on its own."""
        text, rendered.ids, rendered.spans = rendered.text, [], []
        for start, end in pairwise([0, *cuts, len(text)]):
            lead, n_lead = (self._lead, self._lead_length) if start else ("", 0)
            (part,) = self._encode([lead + text[start:end]])
            rendered.ids += part.ids[n_lead:]
            shift = start - len(lead)
            rendered.spans += [(span[0] + shift, span[1] + shift) for span in part.offsets[n_lead:]]

    def _encode(self, texts: list[str]) -> list[tokenizers.Encoding]:
        """Encode texts as they are: the template writes the BOS itself."""
        self._backend.no_truncation()
        self._backend.no_padding()
        encodings: list[tokenizers.Encoding] = self._backend.encode_batch(texts, add_special_tokens=False)
        return encodings

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
