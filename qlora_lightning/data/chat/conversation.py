"""A conversation as text by the chat template, and where its answers are: what generation must produce."""

import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cached_property
from typing import Any, NamedTuple

from qlora_lightning.data.chat import templates
from qlora_lightning.data.rows.content import MAX_TEXT, Conversation, Message, RowFault, Tools, answer_indices
from qlora_lightning.support.errors import UserError

_OURS = ("train", "reasoning_content")
_TAG = r"\w*(?:think|reason)\w*"  # <think>, [THINK], <seed:think>, …
_INLINE = re.compile(rf"\s*<({_TAG})>(.*?)</\1>\s*", re.DOTALL)  # reasoning within the content
# at the end of a generation prompt: a block of reasoning that it opens, or that it writes empty; Gemma 4 has channels
_PROMPT_BLOCK = re.compile(
    rf"(?P<opening>[<\[]{_TAG}[>\]]|<\|channel>thought)\s*(?P<closing>[<\[]/{_TAG}[>\]]|<channel\|>)?\s*$",
    re.IGNORECASE,
)
# a block without content, and the line breaks that templates write after it
_NO_REASONING = re.compile(rf"\s*(?:[<\[]{_TAG}[>\]]\s*)?[<\[]/{_TAG}[>\]]\n{{0,2}}", re.IGNORECASE)
_ADVICE = "Choose a template that knows tools: data.chat_template: chatml (if the base has ChatML's tokens)"


class AnswerSpan(NamedTuple):
    """Span of an assistant turn in a rendered text: what generation must produce."""

    message: int  # its index in the conversation
    start: int
    end: int  # of its stop token, exclusive


class RenderedText(NamedTuple):
    """A text and the answers in it that are to be trained."""

    text: str
    answers: list[AnswerSpan]


_Located = tuple[str, AnswerSpan] | None  # a text with an answer as generated; None if generation could not begin it so


class TemplateRenderer:
    r"""Renders conversations as text with the chat template of one tokenizer.

    An answer is what the template writes after the prompt that generation would see. Its reasoning is passed to the
    template under the key that it reads; if it reads none, as ``<think>…</think>`` before the content. An empty block
    that the template itself writes (Qwen3's ``<think>\n\n</think>\n\n``) belongs to the prompt.
    """

    def __init__(self, tokenizer: Any, controls: templates.ControlTokens, reasoning: str = "template") -> None:
        self.tokenizer, self.controls, self.reasoning = tokenizer, controls, reasoning
        template = getattr(tokenizer, "chat_template", None)
        self._reasoning_key = templates.find_reasoning_key(template)
        self._searched_words = templates.find_searched_words(template)
        self._endings = dict[bool, str]()
        self._reads_parts = templates.reads_parts(tokenizer)

    def render(self, messages: Conversation, tools: Tools, wanted: Sequence[int]) -> list[RenderedText]:
        """Render a conversation to train on.

        Usually that is one text. If the template renders an answer differently once more turns follow (some strip its
        reasoning), that answer gets its own text: the conversation up to it, as generation would see it.

        ``wanted`` are the indices of the answers that are trained; the last message is an answer.

        Raises:
            RowFault: the template rejects the conversation, changes or leaves out a message, or begins an answer
                differently than generation would.
            UserError: it writes no stop token after an answer.
        """
        messages = self.arrange_reasoning(messages)
        text = self._apply_ended(messages, tools)
        _check_messages(messages, text)
        if tools and self._apply_ended(messages, None) == text:
            raise RowFault(f"the chat template leaves out the tools. {_ADVICE}")
        prefixes, answers = list[RenderedText](), list[AnswerSpan]()
        for index, located in self._find_spans(messages, tools, wanted, text).items():
            if located is None:
                advice = ". Its reasoning may need data.template_options, such as enable_thinking: true"
                raise RowFault(
                    f"the chat template is not prefix-preserving: it renders message {index + 1} (assistant) otherwise "
                    "than generation would see and continue it"
                    f"{advice if _split_reasoning(messages[index])[0] is not None else ''}"
                )
            answer_text, span = located
            answer = self._check_answer(messages[index], answer_text, span)
            if answer_text == text:
                answers.append(answer)
            else:
                prefixes.append(RenderedText(answer_text, [answer]))
        return [*prefixes, RenderedText(text, answers)] if answers or not prefixes else prefixes

    def render_prompt(self, messages: Sequence[Message], tools: Tools, wanted: Sequence[int]) -> RenderedText:
        """Render what generation begins with; its answers are the wanted ones that training finds in the same text."""
        messages = self.arrange_reasoning(messages, generation=True)
        text = self._apply(messages, tools, generation=True)
        _check_messages(messages, text)
        located = self._find_spans(messages, tools, wanted, text).values()
        return RenderedText(text, [pair[1] for pair in located if pair and pair[0] == text])

    def arrange_reasoning(self, messages: Sequence[Message], generation: bool = False) -> Conversation:
        """Return messages, without the reasoning of earlier answers if it is dropped; in generation all are earlier.

        If the template has a key for reasoning, a ``<think>`` block at the start of an answer moves there: some
        templates would write it beside a block of their own, or where the user sees it.
        """
        if self._reasoning_key:
            messages = [_read_block(message) for message in messages]
        if self.reasoning != "drop":
            return list(messages)
        answers = answer_indices(messages)
        earlier = set(answers if generation else answers[:-1])
        return [_without_reasoning(message) if i in earlier else message for i, message in enumerate(messages)]

    @cached_property
    def opens_reasoning(self) -> bool:
        """Whether generation begins within a block of reasoning."""
        with suppress(RowFault):
            block = _PROMPT_BLOCK.search(self._apply([{"role": "user", "content": "?"}], None, generation=True))
            return block is not None and not block["closing"]
        return False

    def as_sent(self, prompt: Sequence[Message]) -> Sequence[dict[str, Any] | Message]:
        """Return the messages of a prompt for a server, with their reasoning as text if the template reads none."""
        messages = self.arrange_reasoning(prompt, generation=True)
        return messages if self._reasoning_key else [self._as_read(message) for message in messages]

    def _apply(self, messages: Sequence[Message], tools: Tools, generation: bool = False) -> str:
        template_messages = [self._as_read(message) for message in messages]
        try:
            options = {"tools": tools, "tokenize": False, "add_generation_prompt": generation}
            text = str(self.tokenizer.apply_chat_template(template_messages, **options))
        except Exception as error:  # a template is a program, and may fail in any way on what it does not expect
            advice = f". {_ADVICE}" if tools or any("tool_calls" in message for message in messages) else ""
            reason = f"{type(error).__name__}: {error}{advice}"
            raise RowFault(f"the chat template cannot render the conversation: {reason}") from error
        if len(text) > MAX_TEXT:
            raise UserError(
                f"the chat template makes {len(text):,} characters of a conversation, expected at most {MAX_TEXT:,}: "
                "choose another one by data.chat_template.",
                "chat_template.size",
            )
        return text

    def _apply_ended(self, messages: Sequence[Message], tools: Tools) -> str:
        """Render a conversation up to an answer, with its end even if only the header of the next turn writes it."""
        is_call = "tool_calls" in messages[-1]
        if is_call not in self._endings:
            self._endings[is_call] = templates.find_ending(self.tokenizer, self.controls.stop_pattern, is_call)
        return self._apply(messages, tools) + self._endings[is_call]

    def _as_read(self, message: Message) -> dict[str, Any]:
        """Return a message as the template reads it: without ``train``, its reasoning under the template's key."""
        fields: dict[str, Any] = {key: value for key, value in message.items() if key not in _OURS}
        reasoning = message.get("reasoning_content")
        if reasoning and self._reasoning_key:
            fields[self._reasoning_key] = reasoning
        elif reasoning:
            fields["content"] = "<think>\n" + reasoning.strip("\n") + "\n</think>\n\n" + message["content"]
        if self._reads_parts:
            fields["content"] = [{"type": "text", "text": fields["content"]}]
        return fields

    def _find_spans(
        self, messages: Conversation, tools: Tools, wanted: Sequence[int], text: str
    ) -> dict[int, _Located]:
        """Return where each wanted answer is.

        To render the conversation up to each would take a time quadratic in the turns. So only the first and the last
        answer of each kind are rendered: of what a template may look at to write it otherwise than at the end.
        """
        roles = [message["role"] for message in messages]
        last_question = max((index for index, role in enumerate(roles) if role == "user"), default=0)
        kinds = dict[Any, list[int]]()
        for index in wanted:
            reasoning, content = _split_reasoning(messages[index])
            shape = (reasoning is None, bool(_NO_REASONING.match(content)), not content.strip())
            spaces = (content[:1].isspace(), content[-1:].isspace())
            turns = ("tool_calls" in messages[index], index < last_question, *roles[index - 1 : index + 2])
            question = messages[index - 1]["content"] if index else ""
            words = (word in part for word in self._searched_words for part in (question, messages[index]["content"]))
            kinds.setdefault((*shape, *spaces, *turns, *words), []).append(index)
        rendered = {index for members in kinds.values() for index in (members[0], members[-1])}
        found = {index: self._find_span(messages, tools, index, text) for index in rendered}
        spans = [located[1] for located in found.values() if located and located[0] == text]
        if 0 < len(spans) == len(found) < len(wanted):
            found |= self._find_alike(messages, wanted, text, spans)
        return {i: found[i] if i in found else self._find_span(messages, tools, i, text) for i in wanted}

    def _find_alike(
        self, messages: Conversation, wanted: Sequence[int], text: str, rendered: Sequence[AnswerSpan]
    ) -> dict[int, _Located]:
        """Find all wanted answers by their header; none unless those that were rendered are where it says.

        The header begins with a control token or behind the question, no message contains it, and the text has one for
        each answer.
        """
        answers = answer_indices(messages)
        n_headers = len(answers) + (messages[-1]["role"] != "assistant")  # a prompt ends with that of the next answer
        first = rendered[0]
        controls = list(self.controls.pattern.finditer(text, 0, first.start))
        begins = [control.start() for control in controls[:-3:-1]]  # Llama 3 has two, the second before questions too
        question = messages[first.message - 1]["content"].strip() if first.message else ""
        begins.append(text.rfind(question, 0, first.start) + len(question))  # Llama 2 has none behind the question
        for begin in begins:
            header = text[begin : first.start]
            if any(header.strip() in message["content"] for message in messages):
                continue
            starts = [match.end() for match in re.finditer(re.escape(header), text)]
            limits = [*(start - len(header) for start in starts[1:]), len(text)]
            if len(starts) == n_headers:
                turns = [AnswerSpan(*turn) for turn in zip(answers, starts, limits, strict=False) if turn[0] in wanted]
                with suppress(UserError):  # each is rendered by itself then
                    spans = [self._check_answer(messages[turn.message], text, turn) for turn in turns]
                    if {self._check_answer(messages[turn.message], text, turn) for turn in rendered} <= set(spans):
                        return {span.message: (text, span) for span in spans}
        return {}

    def _find_span(self, messages: Conversation, tools: Tools, index: int, text: str) -> _Located:
        """Return the whole text with an answer as generated, else the text up to the answer, and the answer's span."""
        prompt = self._apply(messages[:index], tools, generation=True)
        rendered = text if index + 1 == len(messages) else self._apply_ended(messages[: index + 1], tools)
        reasoning, _ = _split_reasoning(messages[index])
        if rendered.startswith(prompt):
            generated: str | None = rendered[len(prompt) :]
        else:
            block = _PROMPT_BLOCK.search(prompt)
            head = prompt[: block.start()] if block else prompt
            written = self._find_written(messages[: index + 1], tools, head, rendered)
            generated = _continue_block(block, reasoning, written) if block and written is not None else written
        if generated is None:
            return None
        empty = _NO_REASONING.match(generated) if reasoning is None else None
        begin = empty.end() if empty else 0
        stop = self.controls.stop_pattern.search(generated, begin)
        prefix, end = prompt + generated, len(prompt) + (stop.end() if stop else len(generated))
        # what a template writes behind the last stop token, as Phi-3 does, makes no other answer of it
        return text if text.startswith(prefix[:end]) else prefix, AnswerSpan(index, len(prompt) + begin, end)

    def _find_written(self, messages: Conversation, tools: Tools, head: str, rendered: str) -> str | None:
        """Return what a template writes for the last message behind its header; None if that cannot be found.

        ``head`` is the generation prompt up to the end of the header. Usually the rendered text begins with it. Some
        templates write earlier turns otherwise once an answer follows: gpt-oss leaves out the reasoning of calls, which
        generation sees. There the header is the last one before the first difference from another answer.
        """
        if rendered.startswith(head):
            return rendered[len(head) :]
        header = head.removeprefix(self._apply(messages[:-1], tools))
        other: Message = {**messages[-1], "content": "\uffff"}
        if "reasoning_content" in other:
            other["reasoning_content"] = "\uffff"
        texts = [rendered, self._apply([*messages[:-1], other], tools)]
        shared = os.path.commonprefix(texts)  # noqa: RUF071 texts, not paths
        before, found, _ = shared.rpartition(header) if header else ("", "", "")
        # an earlier header has what a tool returned behind it, if the template writes none before the answer
        return rendered[len(before + header) :] if found and _has_content(before, messages[-2]) else None

    def _check_answer(self, message: Message, text: str, span: AnswerSpan) -> AnswerSpan:
        """Check that a turn has its answer, and return its span up to the end of the stop token."""
        index, start, limit = span
        stop = self.controls.stop_pattern.search(text, start, limit)
        if stop is None:
            raise UserError(
                "the model would never learn to stop: the chat template writes no token after an answer at which "
                "generation stops. Use the tokenizer and template that belong together. The turn as rendered: "
                f"{text[start:limit]!r}",
                "chat_template.stop_token",
            )
        turn = text[start : stop.end()]
        reasoning, content = _split_reasoning(message)
        thoughts = (reasoning or "").strip()
        rest = turn[turn.find(thoughts) + len(thoughts) :]  # the content and the calls follow the reasoning
        if thoughts not in turn or not all(part in rest for part in (content.strip(), *_leaves(_calls_of(message)))):
            raise RowFault(f"the chat template changes the answer (message {index + 1}) to {turn!r}")
        return AnswerSpan(index, start, stop.end())


def _continue_block(block: re.Match[str], reasoning: str | None, written: str) -> str | None:
    """Return what generation must produce behind a block of reasoning in its prompt; None if that is impossible.

    ``written`` is what the template writes for the answer in place of the block and behind it.
    """
    if block["closing"]:  # as Gemma 4 31B: an empty block, which is in the prompt alone
        empty = _NO_REASONING.match(written)
        return written[empty.end() if empty else 0 :] if reasoning is None else None
    opening = block["opening"]
    closing = f"{opening[0]}/{opening[1:]}"
    if written.startswith((opening, closing)):  # as Nemotron and GLM 4.7: not with the line breaks of the prompt
        return written.removeprefix(opening).lstrip("\n")
    # as DeepSeek-R1: the prompt opens the reasoning, which the template never writes itself
    return (reasoning or "").strip("\n") + f"\n{closing}\n\n" + written.lstrip("\n")


def _check_messages(messages: Sequence[Message], text: str) -> None:
    """Reject a template that leaves out or changes messages other than the answers."""
    for number, message in enumerate(messages, start=1):
        if message["role"] != "assistant" and not _has_content(text, message):
            raise RowFault(f"the chat template leaves out or changes message {number} ({message['role']})")
        if not all(part in text for part in _leaves(_calls_of(message))):
            raise RowFault(f"the chat template leaves out or changes the tool calls of message {number}. {_ADVICE}")


def _has_content(text: str, message: Message) -> bool:
    content = message["content"].strip()
    return content in text or _as_json(content) in text


def _calls_of(message: Message) -> list[list[Any]]:
    """Return the name and the arguments of each call of a message."""
    return [[call["function"]["name"], call["function"]["arguments"]] for call in message.get("tool_calls", [])]


def _split_reasoning(message: Message) -> tuple[str | None, str]:
    """Return the reasoning of an answer, None if it has none, and the rest of its content."""
    reasoning, content = message.get("reasoning_content"), message["content"]
    if reasoning:
        return reasoning, content
    inline = _INLINE.match(content)
    return (inline[2], content[inline.end() :]) if inline else (None, content)


def has_reasoning(message: Message) -> bool:
    """Whether a message has reasoning, as only answers have, or is none of them."""
    return message["role"] != "assistant" or _split_reasoning(message)[0] is not None


def _read_block(message: Message) -> Message:
    """Return an answer that begins with a ``<think>`` block with its reasoning under the key; others as they are."""
    opened, _, rest = message["content"].partition("<think>")
    reasoning, closing, content = rest.partition("</think>")
    if opened.strip() or not closing or not reasoning.strip() or message["role"] != "assistant":
        return message
    return {**message, "reasoning_content": reasoning.strip("\n"), "content": content.lstrip("\n")}


def _without_reasoning(message: Message) -> Message:
    reasoning, content = _split_reasoning(message)
    if reasoning is None:
        return message
    if not content.strip() and "tool_calls" not in message:
        raise RowFault("an earlier answer is reasoning alone: with reasoning: drop nothing of it is left")
    answer: Message = {**message, "content": content}
    answer.pop("reasoning_content", None)
    return answer


def _leaves(value: Any) -> Iterator[str]:
    """Yield the texts and numbers in a value, as they are in JSON without quotes."""
    if isinstance(value, dict):
        value = [*value.keys(), *value.values()]
    if isinstance(value, list):
        for item in value:
            yield from _leaves(item)
    elif isinstance(value, str | int | float) and not isinstance(value, bool):
        yield _as_json(value)


def _as_json(value: str | float) -> str:
    """Return a text or number as JSON without quotes, as some templates write what a tool returned."""
    text = json.dumps(value, ensure_ascii=False)
    return text[1:-1] if isinstance(value, str) else text
