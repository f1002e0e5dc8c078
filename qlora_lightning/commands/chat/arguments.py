"""What is typed after ``qlora-lightning chat``."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from qlora_lightning.base.adapter_folder import find_adapter_folder, read_identity
from qlora_lightning.commands.chat.sampling import Sampling
from qlora_lightning.commands.options import OptionParser
from qlora_lightning.commands.output import add_json_option, check_output
from qlora_lightning.support.errors import UserError

BASE = "base"  # the speaker without an adapter
_DESCRIPTION = """Talk with an adapter on its base; prompts are rendered by the code that rendered them in training.

Answers stream as they are made, and end at the stop token. Greedy unless a temperature is given."""
_EPILOG = """examples:
  qlora-lightning chat --adapter runs/quickstart/adapter --prompt "Lunch with Zoe on Friday at 12:30 at Blue Room."
  qlora-lightning chat --adapter runs/quickstart/adapter --compare --prompt "Book a call with Ana, Monday 9:00."
  qlora-lightning chat --adapter runs/quickstart/adapter
  qlora-lightning chat --adapter calm=runs/a/adapter --adapter bold=runs/b/adapter --temperature 0.7 --seed 1

While talking: /adapter NAME, /compare, /system TEXT, /set NAME VALUE, /reset, /help, /quit. Ctrl-C stops an answer.
Lines that come through a pipe are turns of one conversation."""


@dataclass(frozen=True)
class Options:
    """Who talks, and how; see ``--help``.

    Attributes:
        adapters: Adapter folders by the names under which they are switched.
    """

    adapters: dict[str, str]
    base: str | None
    prompt: str | None
    compare: bool
    system: str | None
    sampling: Sampling
    json: Path | None


def parse(argv: Sequence[str]) -> Options:
    """Parse the command line.

    Raises:
        UserError: An option is unknown or has a value that cannot be.
    """
    own = make_parser().parse_args(argv)
    settings = vars(own)
    sampling = {field.name: settings.pop(field.name) for field in fields(Sampling)}
    sampling["stop"] = tuple(sampling["stop"])
    if own.prompt is not None and not own.prompt.strip():
        raise UserError("--prompt is empty: expected a message.")
    for option, text in (("--prompt", own.prompt), ("--system", own.system)):
        if text is not None and not is_text(text):
            raise UserError(f"{option} holds bytes that are no UTF-8.")
    settings["json"] = check_output("--json", own.json, settings.pop("force"))
    adapters = _name_adapters(settings.pop("adapter"))
    options = Options(adapters=adapters, sampling=Sampling(**sampling), **settings)
    for folder in adapters.values():
        read_identity(find_adapter_folder(folder))  # a misspelt folder is told before anything is imported
    return options


def is_text(text: str) -> bool:
    """Whether what was typed is text: Python keeps bytes that are no UTF-8 as lone surrogates."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _name_adapters(given: Sequence[str]) -> dict[str, str]:
    """Read ``NAME=DIR``; a folder without a name is called after its run folder."""
    named: dict[str, str] = {}
    for each in given:
        name, equals, folder = each.partition("=")
        if not equals or "/" in name or Path(each).exists():
            place = Path(each).expanduser().absolute()
            name, folder = (place.parent.name if place.name == "adapter" else place.name), each
        if not name or not folder:
            raise UserError(f"--adapter {each}: expected DIR, or NAME=DIR.")
        if name == BASE:
            raise UserError(f"--adapter {each}: {BASE!r} is the base without an adapter; give it another name.")
        if name in named:
            raise UserError(f"--adapter {each}: two adapters are called {name!r}; name them, NAME=DIR.")
        named[name] = folder
    return named


def make_parser() -> OptionParser:
    """Make the parser of the command line."""
    parser = OptionParser("chat", _DESCRIPTION, _EPILOG)
    add = parser.add_argument
    add("--adapter", required=True, action="append", metavar="[NAME=]DIR", help="an adapter folder; may be repeated")
    add("--base", metavar="NAME", help="the base, where it is no longer found under the name it was trained under")
    add("--prompt", metavar="TEXT", help="answer this one message, and end")
    add("--compare", action="store_true", help="let the base answer beside the adapters")
    add("--system", metavar="TEXT", help="system prompt (default: the one that data.system gave in training)")
    add("--temperature", type=float, default=0.0, metavar="T", help="of sampling (default: 0, greedy)")
    add("--top-k", type=int, default=0, metavar="K", help="sample from the K likeliest tokens (default: 0, from all)")
    add("--top-p", type=float, default=1.0, metavar="P", help="sample from the likeliest tokens that make up P")
    add("--min-p", type=float, default=0.0, metavar="P", help="sample from tokens P times as likely as the likeliest")
    add(
        "--repetition-penalty",
        type=float,
        default=1.0,
        metavar="X",
        help="divide by X what speaks for a token that was there already (default: 1, none)",
    )
    add("--stop", action="append", default=[], metavar="TEXT", help="end an answer at TEXT, too; may be repeated")
    add("--max-new-tokens", type=int, default=512, metavar="N", help="where an answer is cut (default: 512)")
    add("--seed", type=int, help="of sampling")
    add_json_option(parser)
    return parser
