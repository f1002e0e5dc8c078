"""``qlora-lightning chat``: talk with an adapter, or ask it once."""

from collections.abc import Sequence

from qlora_lightning.commands.adapter_config import name_adapters
from qlora_lightning.commands.options import OptionParser

_DESCRIPTION = """Talk with an adapter on its base; prompts are rendered by the code that rendered them in training.

Answers stream word by word, and end at the stop token. Greedy unless a temperature is given."""
_EPILOG = """examples:
  qlora-lightning chat --adapter runs/quickstart/adapter --prompt "Lunch with Zoe on Friday at 12:30 at Blue Room."
  qlora-lightning chat --adapter runs/quickstart/adapter --compare --prompt "Book a call with Ana, Monday 9:00."
  qlora-lightning chat --adapter runs/quickstart/adapter
  qlora-lightning chat --adapter calm=runs/a/adapter --adapter bold=runs/b/adapter --temperature 0.7 --seed 1

Several adapters, and with --compare the base, answer one below the other; the conversation continues with the answer
of the first adapter. Ctrl-C stops an answer. Lines that come through a pipe are turns of one conversation."""


def main(argv: Sequence[str]) -> int:
    """Talk; return the exit code."""
    parser = OptionParser("chat", _DESCRIPTION, _EPILOG)
    add = parser.add_argument
    add("--adapter", required=True, action="append", metavar="[NAME=]DIR", help="adapter folder; may be repeated")
    add("--base", metavar="NAME", help="the base, if it is no longer found under the name it was trained under")
    add("--prompt", metavar="TEXT", help="answer this one message, and end")
    add("--compare", action="store_true", help="let the base answer beside the adapters")
    add("--system", metavar="TEXT", help="system prompt (default: the one that data.system gave in training)")
    add("--temperature", type=float, default=0.0, metavar="T", help="of sampling (default: 0, greedy)")
    add("--top-p", type=float, default=1.0, metavar="P", help="sample from the likeliest tokens that make up P")
    add("--max-new-tokens", type=int, default=512, metavar="N", help="cut an answer there (default: 512)")
    add("--seed", type=int, metavar="N", help="of sampling")
    options = parser.parse_args(argv)
    if options.top_p < 1 and not options.temperature:
        parser.error("--top-p has no effect without --temperature")
    adapters = name_adapters(options.adapter)

    # here, so that --help and mistakes answer at once
    from qlora_lightning.commands.chat.session import Session

    Session(adapters, options).converse(options.prompt)
    return 0
