"""``qlora-lightning cache``: list what the cache holds, or clear it."""

from typing import get_args

from qlora_lightning.commands.options import OptionParser
from qlora_lightning.sources.cache import Kind, cache_root, clear_entries, list_entries
from qlora_lightning.sources.tensors import format_bytes
from qlora_lightning.support.console import make_table, say, terminal

_DESCRIPTION = (
    "List or clear the cache: unpacked and quantized bases, tokenized data, compiled attention and checks of devices."
)
_EPILOG = """examples:
  qlora-lightning cache list
  qlora-lightning cache clear --kind quantized

The cache is in $QLORA_LIGHTNING_CACHE, or else in ~/.cache/qlora_lightning. It is safe to clear: what is missing is
made again at the next start, which then takes longer. But plain PEFT finds a GGUF base only while its unpacked folder
exists."""


def main(argv: list[str]) -> int:
    """List or clear the cache; return the exit code."""
    parser = OptionParser("cache", _DESCRIPTION, _EPILOG)
    parser.add_argument("action", choices=("list", "clear"), help="list entries with sizes and paths, or remove them")
    parser.add_argument("--kind", choices=get_args(Kind), help="only entries of this kind")
    options = parser.parse_args(argv)
    entries = list_entries(options.kind)
    if not entries:
        say(f"The cache holds nothing to {options.action} ({cache_root()}). It fills when a base is first loaded.")
        return 0
    rows = [
        [
            *(entry.kind, entry.label, format_bytes(entry.size_bytes)),
            *(entry.last_used.astimezone().strftime("%Y-%m-%d %H:%M"), str(entry.path)),
        ]
        for entry in entries
    ]
    console = terminal()
    if not console.is_terminal:  # in a pipe rich would assume 80 columns, and fold paths that a script reads
        console.width = 500
    console.print(make_table(("kind", "what", "size", "last used", "path"), rows, box=False, right=False))
    say(f"total {format_bytes(sum(entry.size_bytes for entry in entries))} in {cache_root()}")
    if options.action == "list":
        return 0
    removed = clear_entries(options.kind)
    say(f"Removed {len(removed)}, freed {format_bytes(sum(entry.size_bytes for entry in removed))}.")
    return 0
