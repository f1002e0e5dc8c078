"""Chat templates for tokenizers without one, or instead of theirs: presets, or the user's own file."""

import copy
import difflib
from pathlib import Path
from typing import Any

from jinja2 import TemplateSyntaxError

from qlora_lightning.data.chat.control_tokens import writes_bos
from qlora_lightning.data.chat.stops import find_stop_ids, find_turn_end
from qlora_lightning.errors import UserError

# each preset with the control tokens that it writes beside the tokenizer's own BOS and end-of-sequence tokens
PRESETS: dict[str, tuple[str, ...]] = {
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "alpaca": (),
}
_FOLDER = Path(__file__).with_name("chat_templates")
_BOS = "{{- bos_token }}\n"


def choose_chat_template(tokenizer: Any, choice: str | None) -> Any:
    """Return a tokenizer that renders with the chosen template and ends where its assistant turns end.

    The token that ends an assistant turn becomes its end-of-sequence token; the former one stays a stop id
    (:func:`~qlora_lightning.data.chat.stops.find_stop_ids`). The vocabulary is never enlarged.

    Args:
        tokenizer: a tokenizer of transformers; it stays as it is, what is returned is a copy.
        choice: a name of ``PRESETS``, or a file with a jinja template. ``None`` keeps the tokenizer's own template;
            the tokenizer itself is returned where that ends its turns in a stop token already.

    Raises:
        UserError: there is no such template or file, or it does not fit the tokenizer.
    """
    if choice is None:
        return _keep_template(tokenizer)
    chosen = copy.deepcopy(tokenizer)
    if choice in PRESETS:
        _check_preset(tokenizer, choice)
        _make_special(chosen, PRESETS[choice])
        chosen.chat_template = _read_preset(tokenizer, choice)
    else:
        chosen.chat_template = _read_file(choice)
    end = _find_end(chosen, choice)
    if end is None:
        raise UserError(
            f"chat_template: {choice} writes no token of {_name(tokenizer)} after an answer at which generation could "
            f"stop. Let it end an assistant turn with one, its eos_token ({tokenizer.eos_token}) for example."
        )
    return _end_turns(chosen, end)


def find_presets(tokenizer: Any) -> list[str]:
    """Return the names of the presets whose control tokens the tokenizer has."""
    return [name for name in PRESETS if not _lacking(tokenizer, name)]


def _keep_template(tokenizer: Any) -> Any:
    if getattr(tokenizer, "chat_template", None) is None:
        return tokenizer  # the renderer refuses it
    try:
        end = find_turn_end(tokenizer)
    except TemplateSyntaxError as error:
        raise UserError(
            f"The chat template of {_name(tokenizer)} is damaged, line {error.lineno}: {error.message} Copy the folder "
            "again, or choose another template with data.chat_template."
        ) from error
    except Exception:  # a template may raise anything; the renderer says so of the row that it cannot render
        return tokenizer
    if end is None or end in find_stop_ids(tokenizer):
        return tokenizer
    return _end_turns(copy.deepcopy(tokenizer), end)


def _check_preset(tokenizer: Any, name: str) -> None:
    lacking = _lacking(tokenizer, name)
    if lacking:
        others = ", ".join(find_presets(tokenizer))
        advice = f"Presets that fit this tokenizer: {others}; or" if others else "Name"
        raise UserError(
            f"chat_template: {name} needs {', '.join(lacking)} as {'tokens' if len(lacking) > 1 else 'one token'}, "
            f"which {_name(tokenizer)} does not have, and a vocabulary is not enlarged behind your back. {advice} a "
            ".jinja file of your own."
        )


def _lacking(tokenizer: Any, name: str) -> list[str]:
    vocabulary = tokenizer.get_vocab()
    lacking = [token for token in PRESETS[name] if token not in vocabulary]
    return lacking if PRESETS[name] or tokenizer.eos_token_id is not None else ["an end-of-sequence token"]


def _make_special(tokenizer: Any, tokens: tuple[str, ...]) -> None:
    """Let tokens of the vocabulary be encoded as one id each wherever they stand; no id is added."""
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    tokenizer.add_tokens([token for token in tokens if token not in special], special_tokens=True)


def _read_preset(tokenizer: Any, name: str) -> str:
    text = (_FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    # Llama 3 always begins with a BOS; in ChatML and Alpaca a model sees one if it did in its pre-training
    return text if name == "llama3" or _writes_bos(tokenizer, name) else text.removeprefix(_BOS)


def _writes_bos(tokenizer: Any, name: str) -> bool:
    return tokenizer.bos_token not in PRESETS[name] and writes_bos(tokenizer)


def _read_file(choice: str) -> str:
    file = Path(choice).expanduser()
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"chat_template: {choice} is not a template: expected UTF-8 text ({error}).") from error
    if not file.suffix and file.parent == Path():
        near = difflib.get_close_matches(choice, PRESETS, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise UserError(f"chat_template: expected {', '.join(PRESETS)} or a .jinja file, found {choice!r}.{hint}")
    beside = [entry.name for entry in file.parent.iterdir()] if file.parent.is_dir() else []
    near = difflib.get_close_matches(file.name, beside, n=1)
    hint = f" Did you mean {file.parent / near[0]}?" if near else f" Presets are {', '.join(PRESETS)}."
    raise UserError(f"chat_template: there is no file {choice}.{hint}")


def _find_end(tokenizer: Any, choice: str) -> int | None:
    try:
        return find_turn_end(tokenizer)
    except UserError as error:
        raise UserError(f"chat_template: {choice}: {error}") from error
    except TemplateSyntaxError as error:
        raise UserError(f"chat_template: {choice}:{error.lineno} is not a template: {error.message}.") from error
    except Exception as error:  # a template may raise anything that Python does
        raise UserError(
            f"chat_template: {choice} cannot render a question and its answer: {type(error).__name__}: {error}."
        ) from error


def _end_turns(tokenizer: Any, end: int) -> Any:
    """Make a token the end-of-sequence token of a tokenizer that may be changed; its stop ids stay stop ids."""
    tokenizer.former_stop_ids = find_stop_ids(tokenizer)
    token = tokenizer.convert_ids_to_tokens(end)
    _make_special(tokenizer, (token,))
    tokenizer.eos_token = token
    return tokenizer


def _name(tokenizer: Any) -> str:
    return f"the tokenizer {getattr(tokenizer, 'name_or_path', '') or type(tokenizer).__name__}"
