"""Who can answer: one base in memory, alone or with one of several adapters."""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import peft

from qlora_lightning.commands.chat.arguments import BASE
from qlora_lightning.data.chat.labels import ChatRenderer
from qlora_lightning.data.chat.templates import choose_chat_template
from qlora_lightning.data.chat.tokenizer import load_tokenizer
from qlora_lightning.model.adapters.folder import add_named_adapter
from qlora_lightning.model.adapters.lora import ADAPTER, without_adapters
from qlora_lightning.model.generate import dense_weights
from qlora_lightning.model.opened_adapter import AdapterSource, find_adapter, open_adapter
from qlora_lightning.support.errors import UserError


@dataclass(frozen=True)
class Speaker:
    """One who answers.

    Attributes:
        name: As the user calls it.
        inner: PEFT's name of the adapter; ``None`` for the base alone.
        renderer: Renders its prompts.
        system: The system prompt that its rows had in training.
    """

    name: str
    inner: str | None
    renderer: ChatRenderer
    system: str | None


class Speakers:
    """The model and those who answer with it.

    Args:
        adapters: Adapter folders by name.
        base: Another name of the base.

    Raises:
        UserError: A folder cannot be used, or the adapters were trained on different bases.
    """

    def __init__(self, adapters: Mapping[str, str], base: str | None = None) -> None:
        sources = {name: find_adapter(folder, base) for name, folder in adapters.items()}
        first = next(iter(sources.values()))
        for name, source in sources.items():
            _check_same_base(first, source, name)
        self.by_name: dict[str, Speaker] = {}
        self.folders = {name: str(source.folder) for name, source in sources.items()}
        renderers = {name: _make_renderer(source) for name, source in sources.items()}
        opened = open_adapter(first)
        self.model: peft.PeftModel = opened.model
        for number, (name, source) in enumerate(sources.items()):
            inner = ADAPTER if number == 0 else f"adapter_{number}"
            if number:
                add_named_adapter(self.model, inner, source.folder, opened.identity)
            settings = (source.identity.get("data") or {}).get("settings") or {}
            self.by_name[name] = Speaker(name, inner, renderers[name], settings.get("system"))
        leader = next(iter(self.by_name.values()))
        self.by_name[BASE] = Speaker(BASE, None, leader.renderer, leader.system)
        self.model.eval()

    def ready(self) -> contextlib.AbstractContextManager[Any]:
        """Hold the base dense on a CPU, if there is room: it would be dequantized anew for every token.

        A GPU has kernels that multiply one token by 4-bit weights, which are less to read.
        """
        on_cpu = next(self.model.parameters()).device.type == "cpu"
        return dense_weights(self.model) if on_cpu else contextlib.nullcontext()

    @contextlib.contextmanager
    def speaking(self, speaker: Speaker) -> Iterator[Any]:
        """Give the model as it answers for one of them."""
        if speaker.inner is None:
            with without_adapters(self.model):
                yield self.model
            return
        self.model.set_adapter(speaker.inner, inference_mode=True)
        yield self.model

    @property
    def longest(self) -> int:
        """Tokens that the base can look back on."""
        return int(self.model.get_base_model().config.max_position_embeddings)


def _make_renderer(source: AdapterSource) -> ChatRenderer:
    has_own = any((source.folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))
    folder = source.folder if has_own else source.base.folder
    return ChatRenderer(choose_chat_template(load_tokenizer(str(folder)), None))


def _check_same_base(first: AdapterSource, other: AdapterSource, name: str) -> None:
    same = ("quantization", "double_quant")
    differs = [each for each in same if getattr(first, each) != getattr(other, each)]
    if first.base.folder != other.base.folder or differs:
        raise UserError(
            f"--adapter {name}: trained on {_words(other)}, the first one on {_words(first)}. Adapters of one chat "
            "share one base: talk with them in turn."
        )


def _words(source: AdapterSource) -> str:
    return f"{source.base.name} ({source.quantization}{', double_quant' if source.double_quant else ''})"
