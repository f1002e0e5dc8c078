"""``qlora-lightning recipes``: the configs that travel with the package."""

import difflib
import shlex
import shutil
from pathlib import Path

from rich.console import Console
from rich.table import Table

import qlora_lightning
from qlora_lightning.commands.options import OptionParser, SentenceParser
from qlora_lightning.support.errors import UserError

_EPILOG = """examples:
  qlora-lightning recipes
  qlora-lightning recipes copy quickstart

`copy` writes configs/NAME.yaml, and the data that it reads, into the current folder."""


def main(argv: list[str]) -> int:
    """List the recipes, or copy one into the current folder; return the exit code.

    Raises:
        UserError: there is no such recipe, or copying would overwrite a file that differs.
    """
    arguments = _parser().parse_args(argv)
    if arguments.action == "copy":
        _copy(arguments.name, force=arguments.force)
    else:
        _list()
    return 0


def recipes_folder() -> Path:
    """Return the folder with the configs: inside an installed package, else ``configs`` of the checkout."""
    package = Path(qlora_lightning.__file__).parent
    installed = package / "recipes"
    return installed if installed.is_dir() else package.parent / "configs"


def _parser() -> OptionParser:
    parser = OptionParser("recipes", "The configs that travel with the package.", _EPILOG)
    actions = parser.add_subparsers(dest="action", metavar="[list | copy NAME]", parser_class=SentenceParser)
    actions.add_parser("list", help="their names, a line each (the default)")
    copy = actions.add_parser("copy", help="write one and its data into the current folder")
    copy.add_argument("name", metavar="NAME", help="as `qlora-lightning recipes` lists it")
    copy.add_argument("--force", action="store_true", help="overwrite files that differ")
    return parser


def _list() -> None:
    table = Table("recipe", "what it does", box=None, pad_edge=False)
    table.columns[0].no_wrap = True
    for name, file in _recipes().items():
        table.add_row(name, _first_comment(file))
    Console(markup=False, highlight=False).print(table)
    print("\nCopy one into the current folder: qlora-lightning recipes copy NAME")


def _recipes() -> dict[str, Path]:
    return {file.stem: file for file in sorted(recipes_folder().glob("*.yaml"))}


def _first_comment(file: Path) -> str:
    lines = file.read_text(encoding="utf-8").splitlines()
    return next((line.lstrip("# ").rstrip() for line in lines if line.startswith("#")), "")


def _copy(name: str, *, force: bool) -> None:
    config = _find(name.removesuffix(".yaml"))
    data = config.with_suffix("")
    files = [config, *sorted(file for file in data.rglob("*") if file.is_file())]
    copies = {file: Path("configs") / file.relative_to(config.parent) for file in files}
    if not force:
        _refuse_overwriting(copies)
    for source, target in copies.items():
        if target.is_file() and target.read_bytes() == source.read_bytes():
            print(f"{target} is there already")
            continue
        _write(source, target)
        print(f"wrote {target}")
    print(f"\nNow run: qlora-lightning fit --config {shlex.quote(str(copies[config]))}")


def _find(name: str) -> Path:
    recipes = _recipes()
    if name not in recipes:
        near = difflib.get_close_matches(name, recipes, n=3)
        hint = f"Did you mean {' or '.join(near)}?" if near else f"There are: {', '.join(recipes) or 'none'}."
        raise UserError(f"There is no recipe {name!r}. {hint} `qlora-lightning recipes` says what each does.")
    return recipes[name]


def _refuse_overwriting(copies: dict[Path, Path]) -> None:
    """Look at every target before the first is written, so that a refusal leaves nothing half copied."""
    for source, target in copies.items():
        differs = target.exists() and not (target.is_file() and target.read_bytes() == source.read_bytes())
        if differs:
            raise UserError(
                f"{target} exists here and differs from the recipe's. Move it away, or overwrite it with --force."
            )


def _write(source: Path, target: Path) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    except OSError as error:
        raise UserError(
            f"Could not write {target.absolute()}: {error.strerror}. Change to a folder of yours."
        ) from error
