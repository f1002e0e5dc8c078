"""``qlora-lightning chat``: talk with an adapter, or ask it once."""

import io
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console

from qlora_lightning.commands.chat.arguments import Options, parse
from qlora_lightning.commands.output import tables_beside, write_json
from qlora_lightning.support.errors import UserError

if TYPE_CHECKING:
    from qlora_lightning.commands.chat.screen import Screen
    from qlora_lightning.commands.chat.session import Session


def main(argv: Sequence[str]) -> int:
    """Talk; return the exit code.

    Raises:
        UserError: An option, an adapter or the one message cannot be used.
    """
    options = parse(argv)
    with tables_beside(options.json):
        _talk(options)
    return 0


def _talk(options: Options) -> None:
    # here, so that --help and mistakes answer at once
    from qlora_lightning.commands.chat.screen import Screen
    from qlora_lightning.commands.chat.session import Session
    from qlora_lightning.commands.chat.speakers import Speakers

    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # a line that is no UTF-8 is told, and the next one read
    speakers, screen = Speakers(options.adapters, options.base), Screen(Console(highlight=False))
    session = Session(speakers, options.sampling, screen, options.system, options.compare)
    with speakers.ready():
        _converse(options, session, screen)


def _converse(options: Options, session: "Session", screen: "Screen") -> None:
    try:
        if options.prompt is not None:
            if not session.say(options.prompt, named=False):
                raise UserError("--prompt was not answered, see above.")
            _end_if_interrupted(session)
            return
        screen.tell(f"{session.speaker.name} answers. /help says what else there is.")
        while (line := screen.read()) is not None:
            if line.startswith("/"):
                if not session.obey(line):
                    break
            elif line.strip():
                session.say(line.strip())
                if not sys.stdin.isatty():
                    _end_if_interrupted(session)
    finally:
        if options.json is not None and session.turns:
            write_json(options.json, session.as_json())


def _end_if_interrupted(session: "Session") -> None:
    """Let Ctrl-C end a conversation that nobody types."""
    if session.was_interrupted:
        raise KeyboardInterrupt
