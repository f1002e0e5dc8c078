"""``qlora-lightning merge``: an adapter worked into its base, checked against both."""

from collections.abc import Sequence

from qlora_lightning.commands.merge.arguments import parse
from qlora_lightning.commands.output import tables_beside


def main(argv: Sequence[str]) -> int:
    """Merge an adapter; return the exit code.

    Raises:
        UserError: The adapter, the base or an option cannot be used, or the merged model disagrees with them.
    """
    options = parse(argv)
    from qlora_lightning.commands.merge.run import merge  # here, so that --help and mistakes answer at once

    with tables_beside(options.json):
        merge(options)
    return 0
