"""``qlora-lightning recipes``: the configs that ship with the package."""

import shlex
from pathlib import Path

import qlora_lightning
from qlora_lightning.commands.options import OptionParser
from qlora_lightning.support.console import make_table, say
from qlora_lightning.support.errors import UserError
from qlora_lightning.support.files import write_whole

_EPILOG = """examples:
  qlora-lightning recipes
  qlora-lightning recipes copy quickstart

`copy` writes configs/NAME.yaml to the current folder, with any data or scripts that belong to it."""


def main(argv: list[str]) -> int:
    """List the recipes, or copy one into the current folder; return the exit code."""
    parser = OptionParser("recipes", "List the configs that ship with the package, or copy one.", _EPILOG)
    parser.add_argument("action", nargs="?", default="list", choices=("list", "copy"), help="default: list")
    parser.add_argument("name", nargs="?", metavar="NAME", help="recipe to copy, as `qlora-lightning recipes` lists it")
    parser.add_argument("--force", action="store_true", help="overwrite files that differ")
    options = parser.parse_args(argv)
    recipes = find_recipes()
    if options.action == "copy":
        name = (options.name or "").removesuffix(".yaml")
        if name not in recipes:
            raise UserError(f"recipes copy {name}: expected one of {', '.join(recipes)}.")
        _copy(recipes[name], force=options.force)
        return 0
    texts = {name: file.read_text(encoding="utf-8").splitlines() for name, file in recipes.items()}
    rows = [
        [name, next((line for line in lines if line.startswith("#")), "").lstrip("# ")] for name, lines in texts.items()
    ]
    say(make_table(("recipe", "what it does"), rows, box=False, right=False))
    say("\nCopy one into the current folder: qlora-lightning recipes copy NAME")
    return 0


def find_recipes() -> dict[str, Path]:
    """Return the recipes by name, sorted."""
    return {file.stem: file for file in sorted(recipes_folder().glob("*.yaml"))}


def recipes_folder() -> Path:
    """Return the folder with the configs: inside an installed package, else ``configs`` of the checkout."""
    package = Path(qlora_lightning.__file__).parent
    installed = package / "recipes"
    return installed if installed.is_dir() else package.parent / "configs"


def _copy(config: Path, *, force: bool) -> None:
    files = [config, *sorted(file for file in config.with_suffix("").rglob("*") if file.is_file())]
    copies = {file: Path("configs") / file.relative_to(config.parent) for file in files}
    # all are checked before the first is written, so that an error leaves nothing half copied
    for source, target in copies.items():
        if target.exists() and not force and target.read_bytes() != source.read_bytes():
            raise UserError(
                f"{target} exists here and differs from the recipe's. Move it away, or overwrite it with --force."
            )
    for source, target in copies.items():
        write_whole(target, source.read_bytes())
        say(f"wrote {target}")
    say(f"\nNow run: qlora-lightning fit --config {shlex.quote(str(copies[config]))}")
