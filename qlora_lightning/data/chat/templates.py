"""The chat template of a tokenizer: its own, a preset or the user's file; its variables, control and stop tokens."""

import contextlib
import copy
import re
from collections.abc import Collection, Iterable, Mapping
from datetime import date
from pathlib import Path
from typing import Any

import jinja2
import jinja2.meta

from qlora_lightning.data.rows.content import REASONING_KEYS
from qlora_lightning.support.errors import UserError, bounded, nearest
from qlora_lightning.support.files import read_json_object
from qlora_lightning.support.values import check_setting

# each preset with the control tokens that it writes besides the tokenizer's own BOS and end-of-sequence tokens
PRESETS: dict[str, tuple[str, ...]] = {
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "alpaca": (),
}
_FOLDER = Path(__file__).with_name("chat_templates")
_BOS = "{{- bos_token }}\n"
# what transformers passes to every template, besides the tokenizer's special tokens
_PASSED = ("messages", "tools", "documents", "add_generation_prompt", "raise_exception", "strftime_now")
_PROBE: list[dict[str, Any]] = [
    {"role": "user", "content": "A question."},
    {"role": "assistant", "content": "An answer, to be found again."},
]
_FIXED_DATE = date(2024, 7, 26)  # which Llama 3's templates write if there is no clock


def choose_chat_template(tokenizer: Any, choice: str | None, options: Mapping[str, Any] | None = None) -> Any:
    """Return a copy of a tokenizer that renders with the chosen template and ends where its assistant turns end.

    A row renders the same on every day and in every program: the options become defaults inside the template, and a
    template that asks for today's date gets a fixed one. The token that ends an assistant turn becomes the
    end-of-sequence token; the former one stays a stop id (``find_stop_ids``). The vocabulary is never enlarged.

    Args:
        tokenizer: a tokenizer of transformers, returned itself if nothing has to change.
        choice: a name of ``PRESETS``, or a file with a jinja template. ``None`` keeps the tokenizer's own template.
        options: values of the template's variables, such as ``date_string``.

    Raises:
        UserError: there is no such template or file, it does not fit the tokenizer, or it has no such variable.
    """
    if choice is None and getattr(tokenizer, "chat_template", None) is None:
        return tokenizer  # the renderer rejects it
    chosen = tokenizer if choice is None else _put_template(tokenizer, choice)
    title = f"the chat template of {choice or name_tokenizer(tokenizer)}"
    with bounded(f"{title} cannot be rendered", "data.chat_template"):
        chosen = _set_variables(chosen, options or {}, title)
        try:
            end_id = _find_turn_end(chosen)
        except MemoryError:
            raise
        except Exception:  # a template may raise anything; the renderer reports it with the row that it cannot render
            return chosen
    if choice is not None and end_id is None:
        raise UserError(
            f"chat_template: {choice} writes no token of {name_tokenizer(tokenizer)} at which generation could stop "
            f"after an answer: let it end an assistant turn with one, such as its eos_token {tokenizer.eos_token}.",
            "data.chat_template",
        )
    if end_id is None or (choice is None and end_id in find_stop_ids(chosen)):
        return chosen
    chosen = copy.deepcopy(chosen) if choice is None else chosen
    chosen.former_stop_ids = find_stop_ids(chosen)
    token = chosen.convert_ids_to_tokens(end_id)
    _make_special(chosen, (token,))
    chosen.eos_token = token
    return chosen


def find_presets(tokenizer: Any) -> list[str]:
    """Return the names of the presets whose control tokens the tokenizer has."""
    return [name for name in PRESETS if not _lacking(tokenizer, name)]


def find_reasoning_key(template: str | Mapping[str, str] | None) -> str | None:
    """Return the key of a message from which a chat template reads reasoning; None if it reads none."""
    text = "\n".join(template.values()) if isinstance(template, Mapping) else template or ""
    return next((key for key in REASONING_KEYS if re.search(rf"\.{key}\b|(['\"]){key}\1", text)), None)


def _put_template(tokenizer: Any, choice: str) -> Any:
    """Return a copy of a tokenizer with the template of a preset or a file."""
    chosen = copy.deepcopy(tokenizer)
    if choice not in PRESETS:
        file = Path(choice).expanduser()
        if not file.is_file():
            hint = nearest(choice, PRESETS)
            message = f"chat_template: expected {', '.join(PRESETS)} or a .jinja file, found {choice!r}.{hint}"
            raise UserError(message, "data.chat_template")
        chosen.chat_template = file.read_text(encoding="utf-8")
        return chosen
    missing = _lacking(tokenizer, choice)
    if missing:
        raise UserError(
            f"chat_template: {choice} needs {', '.join(missing)}, which {name_tokenizer(tokenizer)} does not have. "
            f"Presets that fit it: {', '.join(find_presets(tokenizer)) or 'none'}; or name a .jinja file.",
            "data.chat_template",
        )
    _make_special(chosen, PRESETS[choice])
    text = (_FOLDER / f"{choice.removesuffix('-tools')}.jinja").read_text(encoding="utf-8")
    # Llama 3 always begins with a BOS; ChatML and Alpaca only if the model was pre-trained with one
    has_bos = choice == "llama3" or (tokenizer.bos_token not in PRESETS[choice] and writes_bos(tokenizer))
    chosen.chat_template = text if has_bos else text.removeprefix(_BOS)
    return chosen


def _lacking(tokenizer: Any, name: str) -> list[str]:
    vocabulary = tokenizer.get_vocab()
    missing = [token for token in PRESETS[name] if token not in vocabulary]
    return missing if PRESETS[name] or tokenizer.eos_token_id is not None else ["an end-of-sequence token"]


def _make_special(tokenizer: Any, tokens: tuple[str, ...]) -> None:
    """Let tokens of the vocabulary be encoded as one id each anywhere in a text; no id is added."""
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    tokenizer.add_tokens([token for token in tokens if token not in special], special_tokens=True)


def _set_variables(tokenizer: Any, options: Mapping[str, Any], title: str) -> Any:
    """Return a tokenizer whose template has the options and no clock; itself if that changes nothing."""
    template = tokenizer.chat_template
    texts = template if isinstance(template, dict) else {"": template}
    variables = set[str]()
    for text in texts.values() if options else ():
        text = re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", text)  # a tag of transformers, which marks answers
        tree = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(text)
        variables |= jinja2.meta.find_undeclared_variables(tree)
    variables -= {*_PASSED, *tokenizer.special_tokens_map}
    for name, value in options.items():
        if name not in variables:
            hint = nearest(name, variables)
            raise UserError(f"template_options: {title} has no variable {name!r}.{hint}", "data.template_options")
        is_plain = isinstance(value, str | int | float | list | dict | None)  # of which jinja has literals
        expected = "a text, a number, true, false or a list or mapping of these (a date in quotes)"
        check_setting("data.template_options", {name: value}, is_plain, expected)
    defaults = "".join(  # jinja's literals are Python's
        f"{{%- if {name} is not defined %}}{{%- set {name} = {value!r} %}}{{%- endif %}}\n"
        for name, value in options.items()
    )
    # jinja drops the line break after a tag; the template of an adapter folder may already have the same options
    new_texts = {key: defaults + _stop_clock(text, title).removeprefix(defaults) for key, text in texts.items()}
    if new_texts == texts:
        return tokenizer
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = new_texts if isinstance(template, dict) else new_texts[""]
    return tokenizer


def _stop_clock(template: str, title: str) -> str:
    """Replace each call of ``strftime_now``, which writes today's date, by a fixed date."""
    call = r"""strftime_now\(\s*(['"])(.*?)\1\s*\)"""
    text = re.sub(call, lambda match: repr(_FIXED_DATE.strftime(match[2])), template)
    if "strftime_now(" in text:
        raise UserError(
            f"{title} writes today's date by strftime_now of a variable: write the format itself there, in quotes, and "
            "pass the template by data.chat_template.",
            "data.chat_template",
        )
    return text


def name_tokenizer(tokenizer: Any) -> str:
    """Return the name of a tokenizer for messages."""
    return f"the tokenizer {getattr(tokenizer, 'name_or_path', '') or type(tokenizer).__name__}"


# ---- tokens ----------------------------------------------------------------------------------------------------------


class ControlTokens:
    """The control tokens of a tokenizer, which splits a text at them before anything else.

    Ids at which generation stops count as control tokens, special or not. ``ids`` has every control token with its id,
    ``pattern`` finds any of them in a text, ``stop_pattern`` those at which generation stops.
    """

    def __init__(self, tokenizer: Any, stop_ids: Collection[int]) -> None:
        stops = {tokenizer.decode([token_id]): token_id for token_id in stop_ids}
        self.ids = {str(token): token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.ids.update(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
        self.ids.update(stops)
        self.known = frozenset(self.ids.values())
        self.pattern = _any_of(self.ids)
        self.stop_pattern = _any_of(stops)


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    longest_first = sorted(texts, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def writes_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer puts a BOS before a text by itself."""
    ids = tokenizer.encode("a", add_special_tokens=True) if hasattr(tokenizer, "backend_tokenizer") else []
    return bool(ids) and ids[0] == tokenizer.bos_token_id


def find_stop_ids(tokenizer: Any) -> frozenset[int]:
    """Return every id at which generation with this tokenizer's model stops.

    They are the tokenizer's end-of-sequence id, the former one if a template was chosen, and those of the
    ``generation_config.json`` in its folder, or else of ``config.json``. They often disagree.
    """
    ids = {tokenizer.eos_token_id, *getattr(tokenizer, "former_stop_ids", ())}
    name = str(getattr(tokenizer, "name_or_path", ""))
    files = [Path(name) / file for file in ("generation_config.json", "config.json")] if name else []
    config = next((file for file in files if file.is_file()), None)
    if config is not None:
        remedy, keys = "It names the stop tokens: correct or delete it.", {"eos_token_id": int | list[int] | None}
        eos_ids = read_json_object(config, remedy, keys).get("eos_token_id")
        ids.update(eos_ids if isinstance(eos_ids, list) else [eos_ids])
    return frozenset(token_id for token_id in ids if token_id is not None)


def _find_turn_end(tokenizer: Any) -> int | None:
    """Return the id of the control token that ends an answer; None if there is none.

    It is the first one after the answer. Only if generation does not stop there, it is the first before another
    question at which it does: Cohere's templates write two tokens, and GLM's end an answer by the next turn's header.
    """
    stop_ids = find_stop_ids(tokenizer)
    controls = ControlTokens(tokenizer, stop_ids)
    found = list[list[int]]()
    for messages in (_PROBE, [*_PROBE, _PROBE[0]]):
        _, answer, tail = _apply(tokenizer, messages).rpartition(_PROBE[1]["content"])
        if not answer:
            return None
        end = tail.partition(_PROBE[0]["content"])[0]
        found.append([controls.ids[control[0]] for control in controls.pattern.finditer(end)])
    first, between = found[0][:1], [token_id for token_id in found[1] if token_id in stop_ids]
    ends = first if stop_ids.issuperset(first) else []
    return next(iter((*ends, *between, *first)), None)


def reads_parts(tokenizer: Any) -> bool:
    """Whether a template reads content only as a list of parts, as those of some models that see images do."""
    question = _PROBE[0]["content"]
    with contextlib.suppress(Exception):  # a template may raise anything; the renderer reports it with the row
        if question in _apply(tokenizer, _PROBE[:1]):
            return False
    with contextlib.suppress(Exception):
        return question in _apply(tokenizer, [{"role": "user", "content": [{"type": "text", "text": question}]}])
    return False


def find_ending(tokenizer: Any, stop_pattern: re.Pattern[str], is_call: bool) -> str:
    """Return what ends an answer, or one with a call, if a template writes that only before another turn; else "".

    The answers of GLM end with the token that begins the next turn: the user's, or that of a call's result.
    """
    text, messages, following = _PROBE[1]["content"], _PROBE, _PROBE[0]
    if is_call:
        call = {"type": "function", "function": {"name": "find", "arguments": {"text": text}}}
        messages = [_PROBE[0], {"role": "assistant", "content": "", "tool_calls": [call]}]
        following = {"role": "tool", "content": "A result."}
    try:
        last, longer = _apply(tokenizer, messages), _apply(tokenizer, [*messages, following])
    except Exception:  # a template may raise anything; the renderer reports it with the row that it cannot render
        return ""
    stop = stop_pattern.search(longer, len(last))
    if stop is None or not longer.startswith(last) or stop_pattern.search(last, last.rfind(text)):
        return ""
    ending = longer[len(last) : stop.end()]
    return "" if following["content"] in ending else ending


def _apply(tokenizer: Any, messages: list[dict[str, Any]]) -> str:
    return str(tokenizer.apply_chat_template(messages, tokenize=False))
