"""``qlora-lightning diagnose``: how far an adapter moved each module, and how much of its rank it uses."""

from collections.abc import Sequence

from qlora_lightning.base.adapter_folder import find_adapter_folder, read_identity
from qlora_lightning.commands.input_files import find_inputs
from qlora_lightning.commands.json_output import json_file, tables_beside, write_json
from qlora_lightning.commands.options import OptionParser

_DESCRIPTION = """Say of each module how far its adapter moved the weight, ‖ΔW‖/‖W‖, and how many directions it uses.

No rows are needed, and the base is read one weight at a time."""
_EPILOG = """examples:
  qlora-lightning diagnose --adapter runs/quickstart/adapter
  qlora-lightning diagnose --adapter runs/quickstart/adapter --all --json diagnosis.json

The rank used is the effective rank: the number of equal directions that would be as spread out as those of the
update. Near the rank, all of it is used; near 1, a smaller rank would hold the same."""


def main(argv: Sequence[str]) -> int:
    """Diagnose an adapter; return the exit code.

    Raises:
        UserError: An option, the adapter or the base cannot be used.
    """
    own = make_parser().parse_args(argv)
    file = json_file(own.json, ("adapter", "base", "hints", "modules"), find_inputs([own.adapter, own.base]))
    read_identity(find_adapter_folder(own.adapter))  # a misspelt folder is told before anything is imported

    # here, so that --help and mistakes answer at once
    from rich.console import Console

    from qlora_lightning.commands.diagnose.measure import measure_adapter
    from qlora_lightning.commands.diagnose.report import as_json, print_report

    found = measure_adapter(own.adapter, own.base)
    with tables_beside(file):
        print_report(found, Console(highlight=False), every_module=own.all)
    if file is not None:
        write_json(file, as_json(found))
    return 0


def make_parser() -> OptionParser:
    """Make the parser of the command line."""
    parser = OptionParser("diagnose", _DESCRIPTION, _EPILOG)
    add = parser.add_argument
    add("--adapter", required=True, metavar="DIR", help="the adapter folder, or the run folder around it")
    add("--base", metavar="NAME", help="the base, where it is no longer found under the name it was trained under")
    add("--all", action="store_true", help="list every module, too")
    add("--json", metavar="FILE", help="write the figures of every module there")
    return parser
