"""A Modelfile, by which Ollama runs a GGUF file on the prompts of the training."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from qlora_lightning.data.chat.tokenizer import find_stop_ids

_Messages = Sequence[Mapping[str, str]]
_SYSTEM, _QUESTION, _ANSWER, _NEXT = "What rules all.", "What is asked?", "What is said\nto it.", "What else is asked?"


class _Form(NamedTuple):
    """What a chat template writes around what is said, in the order of the template in Go."""

    system: str  # before a system message
    behind_system: str
    begin: str  # before the first question, without a system message
    behind_question: str  # up to the answer's first character
    behind_earlier_question: str  # the same of a turn before: Qwen3 leaves the empty thoughts out there
    behind_answer: str  # up to the next question's first character

    def write(self, messages: _Messages) -> str:
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


def write_modelfile(file: Path, tokenizer: Any, adds_bos: bool, system: str | None) -> bool:
    """Write ``Modelfile`` beside a GGUF file; return whether it has a template, the chat template's form in Go.

    Args:
        file: what Ollama runs.
        tokenizer: that of the training, with its chat template.
        adds_bos: whether llama.cpp puts a BOS before a prompt by itself.
        system: the system prompt of the training.
    """
    lines, form = [f"FROM ./{file.name}"], _find_form(tokenizer)
    if form is not None and adds_bos:
        system_begin, begin = (each.removeprefix(tokenizer.bos_token) for each in (form.system, form.begin))
        form = form._replace(system=system_begin, begin=begin)
    if form is not None:
        template = _TEMPLATE % tuple(each.replace("{{", '{{ "{{" }}') for each in form)
        lines.append(f'TEMPLATE """{template}"""')
    if system:
        lines.append(f'SYSTEM """{system}"""')
    stops = (tokenizer.decode([number]) for number in sorted(find_stop_ids(tokenizer)))
    lines += [f'PARAMETER stop "{stop}"' for stop in stops]
    (file.parent / "Modelfile").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return form is not None


def _find_form(tokenizer: Any) -> _Form | None:
    """Take a prompt apart; None if the parts, put together again, do not give other prompts of the chat template."""

    def write(messages: _Messages) -> str:
        made = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        return str(made)

    talk = _say("user", _QUESTION, "assistant", _ANSWER, "user", _NEXT)
    try:
        system, behind_system, _ = _take_apart(write(_say("system", _SYSTEM, "user", _QUESTION)), _SYSTEM, _QUESTION)
        begin, earlier, behind_answer, behind_question = _take_apart(write(talk), _QUESTION, _ANSWER, _NEXT)
        form = _Form(system, behind_system, begin, behind_question, earlier, behind_answer)
        others = talk[:1], _say("system", _NEXT, "user", _ANSWER), [*_say("system", _SYSTEM), *talk], [*talk[:2], *talk]
        return form if all(form.write(each) == write(each) for each in others) else None
    except Exception:  # a template is a program, and may fail in any way: of a system message, for example
        return None


def _say(*turns: str) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in zip(turns[::2], turns[1::2], strict=True)]


def _take_apart(text: str, *said: str) -> list[str]:
    """Return what is before, between and behind what was said; raise ValueError if something is not in it once."""
    parts = re.split("|".join(map(re.escape, said)), text)
    if len(parts) != len(said) + 1:
        raise ValueError(text)
    return parts
