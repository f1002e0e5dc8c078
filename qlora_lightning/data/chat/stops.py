"""The tokens at which generation stops, and the one that ends an assistant turn."""

import re
from pathlib import Path
from typing import Any

from qlora_lightning.base.folder import read_generation_config
from qlora_lightning.data.chat.control_tokens import ControlTokens
from qlora_lightning.support.errors import UserError

_ANSWER = "An answer, to be found again."
_PROBE = [{"role": "user", "content": "A question."}, {"role": "assistant", "content": _ANSWER}]
_SHAPED_LIKE_A_CONTROL_TOKEN = re.compile(r"\s*(<[^<>\s]+>|\[[^\[\]\s]+\])")


def find_stop_ids(tokenizer: Any) -> frozenset[int]:
    """Return every id at which generation with this tokenizer's model stops.

    They are the tokenizer's end-of-sequence id, the former one where a template was chosen, and those of the
    ``generation_config.json`` in its folder (without one, of ``config.json``, which transformers then asks). They often
    disagree (Llama 3.1 ends a turn with another token than a text), and generation stops at either.

    Raises:
        UserError: if that file is damaged.
    """
    ids = {tokenizer.eos_token_id, *getattr(tokenizer, "former_stop_ids", ())}
    name = str(getattr(tokenizer, "name_or_path", ""))
    files = [Path(name) / file for file in ("generation_config.json", "config.json")] if name else []
    config = next((file for file in files if file.is_file()), None)
    if config is not None:
        found = read_generation_config(config).get("eos_token_id")
        ids.update(found if isinstance(found, list) else [found])
    return frozenset(number for number in ids if number is not None)


def find_turn_end(tokenizer: Any) -> int | None:
    """Return the id of the first control token after an answer, as the chat template writes it; ``None`` without one.

    It is found by rendering. A token that is in the vocabulary without being special counts if it looks like a control
    token (``<|end|>``, ``[END]``) and nothing but white space lies before it.

    Raises:
        UserError: if the template leaves the answer out or changes it.
        Exception: whatever the template raises; jinja's are ``jinja2.TemplateError``.
    """
    text = tokenizer.apply_chat_template(list(_PROBE), tokenize=False, add_generation_prompt=False)
    _, found, after = str(text).rpartition(_ANSWER)
    if not found:
        raise UserError(f"the chat template does not write what an assistant message says: it makes {text!r} of one.")
    first = next(iter(ControlTokens(tokenizer, ()).in_text(after)), None)
    shaped = _SHAPED_LIKE_A_CONTROL_TOKEN.match(after)
    if shaped and (first is None or shaped.start(1) < first.start):
        vocabulary: dict[str, int] = tokenizer.get_vocab()
        if shaped[1] in vocabulary:
            return vocabulary[shaped[1]]
    return first.id if first else None
