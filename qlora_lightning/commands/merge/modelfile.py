"""A Modelfile, by which Ollama runs a GGUF file on the prompts of the training."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from qlora_lightning.data.chat.render import ChatText
from qlora_lightning.data.chat.tokenizer import ControlTokens, find_stop_ids
from qlora_lightning.data.rows.bad_rows import RowFault
from qlora_lightning.data.rows.conversation import Conversation

_Write = Callable[[Conversation], str]
_SYSTEM, _QUESTION, _ANSWER, _NEXT = "What rules all.", "What is asked?", "What is said\nto it.", "What else is asked?"


class _Form(NamedTuple):
    """What a chat template writes around what is said, in the order of the template in Go."""

    system: str  # before a system message
    behind_system: str
    begin: str  # before the first question, without a system message
    behind_question: str  # up to the answer's first character
    behind_earlier_question: str  # the same of a turn before: Qwen3 leaves the empty thoughts out there
    behind_answer: str  # up to the next question's first character

    def write(self, messages: Conversation) -> str:
        """Write a prompt as Ollama does by the template in Go."""
        behind = {"system": self.behind_system, "user": self.behind_earlier_question, "assistant": self.behind_answer}
        begin = self.system if messages[0]["role"] == "system" else self.begin
        earlier = "".join(each["content"] + behind[each["role"]] for each in messages[:-1])
        return begin + earlier + messages[-1]["content"] + self.behind_question


_TEMPLATE = (
    '{{ range $i, $_ := .Messages }}{{ if eq .Role "system" }}%s{{ .Content }}%s'
    '{{ else if eq .Role "user" }}{{ if eq $i 0 }}%s{{ end }}{{ .Content }}'
    "{{ if eq (len (slice $.Messages $i)) 1 }}%s{{ else }}%s{{ end }}"
    '{{ else if eq .Role "assistant" }}{{ .Content }}%s{{ end }}{{ end }}'
)
_ENDS_A_TEXT = '"""'  # whatever is behind it would be another instruction, as FROM or ADAPTER
_NO_SYSTEM = f"The Modelfile has no SYSTEM, because the system prompt holds {_ENDS_A_TEXT}, which would end it there."
_NO_TEMPLATE = (
    "The Modelfile has no TEMPLATE, because the form of this chat template in Ollama's language is not known: "
    "write one, or run the file by llama-cli, which reads the chat template itself."
)


def write_modelfile(file: Path, tokenizer: Any, adds_bos: bool, settings: Mapping[str, Any]) -> str:
    """Write ``Modelfile`` beside a GGUF file; return how its prompts differ from the training's, as far as is known.

    Args:
        file: what Ollama runs.
        tokenizer: that of the training, with its chat template.
        adds_bos: whether llama.cpp puts a BOS before a prompt by itself.
        settings: those of the training's data: its ``system`` prompt, and ``reasoning``.
    """
    controls = ControlTokens(tokenizer, find_stop_ids(tokenizer))
    text = ChatText(tokenizer, controls, settings.get("reasoning", "template"))

    def write(messages: Conversation) -> str:
        try:
            return text.render_prompt(messages, None).text
        except RowFault:  # the template refuses a system message, for example
            return ""

    lines, form, system = [f"FROM ./{file.name}"], _find_form(write), settings.get("system")
    if form is not None and _ENDS_A_TEXT in "".join(form):
        form = None
    note = _NO_TEMPLATE if form is None else _describe_differences(form, write)
    if system and _ENDS_A_TEXT in system:
        system, note = None, f"{note} {_NO_SYSTEM}".strip()
    if form is not None and adds_bos:
        system_begin, begin = (each.removeprefix(tokenizer.bos_token) for each in (form.system, form.begin))
        form = form._replace(system=system_begin, begin=begin)
    if form is not None:
        template = _TEMPLATE % tuple(each.replace("{{", '{{ "{{" }}') for each in form)
        lines.append(f'TEMPLATE """{template}"""')
    if system:
        lines.append(f'SYSTEM """{system}"""')
    stops = (tokenizer.decode([number]) for number in sorted(find_stop_ids(tokenizer)))
    lines += [f'PARAMETER stop "{stop}"' for stop in stops if '"' not in stop and stop.isprintable()]
    (file.parent / "Modelfile").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return note


def _find_form(write: _Write) -> _Form | None:
    """Take a prompt apart; None if the parts, put together again, do not give other prompts of the chat template."""
    talk = _say("user", _QUESTION, "assistant", _ANSWER, "user", _NEXT)
    try:
        system, behind_system, _ = _take_apart(write(_say("system", _SYSTEM, "user", _QUESTION)), _SYSTEM, _QUESTION)
        begin, earlier, behind_answer, behind_question = _take_apart(write(talk), _QUESTION, _ANSWER, _NEXT)
        form = _Form(system, behind_system, begin, behind_question, earlier, behind_answer)
        others = talk[:1], _say("system", _NEXT, "user", _ANSWER), [*_say("system", _SYSTEM), *talk], [*talk[:2], *talk]
        return form if all(form.write(each) == write(each) for each in others) else None
    except ValueError:
        return None


def _describe_differences(form: _Form, write: _Write) -> str:
    """Compare prompts that a template may change, and Ollama cannot: Go's language strips and drops nothing."""
    padded, reasoning = f" {_QUESTION}\n", f"<think>\n{_NEXT}\n</think>\n\n{_ANSWER}"
    conversations = {
        "questions with white space at an end": _say("user", padded),
        "earlier answers with white space at an end": _say("user", _NEXT, "assistant", padded, "user", _NEXT),
        "earlier answers with reasoning (<think>…</think>)": _say("user", _NEXT, "assistant", reasoning, "user", _NEXT),
    }
    found = [name for name, messages in conversations.items() if form.write(messages) != write(messages)]
    return f"In Ollama, prompts differ from those of the training if they have {' or '.join(found)}." if found else ""


def _say(*turns: str) -> Conversation:
    return [{"role": role, "content": content} for role, content in zip(turns[::2], turns[1::2], strict=True)]


def _take_apart(text: str, *said: str) -> list[str]:
    """Return what is before, between and behind what was said; raise ValueError if something is not in it once."""
    parts = re.split("|".join(map(re.escape, said)), text)
    if len(parts) != len(said) + 1:
        raise ValueError(text)
    return parts
