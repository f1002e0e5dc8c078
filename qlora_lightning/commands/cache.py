"""``qlora-lightning cache``: what the cache holds, and clearing it."""

import sys
from typing import get_args

from rich.console import Console
from rich.table import Table

from qlora_lightning.base.cache import Kind, cache_root, clear_entries, list_entries
from qlora_lightning.base.tensors import format_bytes
from qlora_lightning.commands.options import OptionParser, SentenceParser, confirm
from qlora_lightning.support.errors import UserError

_DESCRIPTION = "Unpacked and quantized bases, tokenized data and compiled loops, kept for the next start."
_EPILOG = """examples:
  qlora-lightning cache list
  qlora-lightning cache clear --kind quantized --yes

The cache is in $QLORA_LIGHTNING_CACHE, else in ~/.cache/qlora_lightning. All of it can be made again:
clearing costs time at the next start, nothing else."""


def main(argv: list[str]) -> int:
    """List or clear the cache; return the exit code."""
    parser = OptionParser("cache", _DESCRIPTION, _EPILOG)
    actions = parser.add_subparsers(dest="action", metavar="list | clear", required=True, parser_class=SentenceParser)
    actions.add_parser("list", help="what the cache holds, with sizes and paths")
    clear = actions.add_parser("clear", help="remove it, or one kind of it")
    clear.add_argument("--kind", choices=get_args(Kind), help="remove this kind only")
    clear.add_argument("--yes", action="store_true", help="do not ask")
    arguments = parser.parse_args(argv)
    if cache_root().is_file():
        raise UserError(f"The cache's folder {cache_root()} is a file: name a folder by QLORA_LIGHTNING_CACHE.")
    return _list() if arguments.action == "list" else _clear(arguments.kind, confirmed=arguments.yes)


def _list() -> int:
    entries = list_entries()
    if not entries:
        print(f"The cache is empty ({cache_root()}). It fills when a base is first loaded.")
        return 0
    table = Table("kind", "what", "size", "made", "last used", "path", box=None, pad_edge=False)
    table.columns[2].justify = "right"
    table.columns[5].overflow = "fold"  # a path that is cut off cannot be copied
    for entry in entries:
        times = (time.astimezone().strftime("%Y-%m-%d %H:%M") for time in (entry.created, entry.last_used))
        table.add_row(entry.kind, entry.label, format_bytes(entry.size_bytes), *times, str(entry.path))
    # In a pipe, rich would assume 80 columns and fold the paths that a script looks for.
    Console(width=None if sys.stdout.isatty() else 500, markup=False, highlight=False).print(table)
    print(f"total {format_bytes(sum(entry.size_bytes for entry in entries))} in {cache_root()}")
    return 0


def _clear(kind: Kind | None, *, confirmed: bool) -> int:
    entries = list_entries(kind)
    for entry in entries:
        print(f"  {entry.kind}  {entry.label}  {format_bytes(entry.size_bytes)}  {entry.path}")
    if not entries:
        print(f"Nothing to remove in {cache_root()}.")
        return 0
    size = format_bytes(sum(entry.size_bytes for entry in entries))
    if not confirmed and not confirm(
        f"Remove {'it' if len(entries) == 1 else 'all of these'} and free {size}?", "Clearing the cache"
    ):
        print("Nothing removed.")
        return 1
    removed, busy = clear_entries(kind)
    for entry in busy:
        print(f"Left {entry.path}: a process is building it now.")
    print(f"Removed {len(removed)}, freed {format_bytes(sum(entry.size_bytes for entry in removed))}.")
    return 0
