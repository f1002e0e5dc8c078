"""What is typed after ``qlora-lightning merge``."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qlora_lightning.base.adapter_folder import find_adapter_folder, read_identity
from qlora_lightning.commands.merge.staging import check_file, check_folder
from qlora_lightning.commands.options import OptionParser
from qlora_lightning.commands.output import add_json_option, check_output
from qlora_lightning.support.errors import UserError

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
_DESCRIPTION = """Merge an adapter into its base: a folder for plain transformers, vLLM and others, or a GGUF file.

Layer by layer, in fp32, never into 4 bits. Onto the dequantized base that the adapter was trained on, or with
--onto original onto the 16-bit weights that it never saw. The result is then compared with base and adapter on
validation rows, and kept only if they agree."""
_EPILOG = """examples:
  qlora-lightning merge --adapter runs/quickstart/adapter --out runs/quickstart/merged
  qlora-lightning merge --adapter runs/quickstart/adapter --out runs/quickstart/gguf --gguf q8_0 --rows 16
  qlora-lightning merge --adapter runs/quickstart/adapter --adapter-gguf runs/quickstart/adapter.gguf

The validation rows are those of the run's config.yaml beside the adapter folder; --config, or options of fit such as
--data.val FILE, name others. Loading a GGUF file back for its check takes the whole model's memory in fp32."""


@dataclass(frozen=True)
class Options:
    """What to merge, and where to; see ``--help``."""

    adapter: str
    out: Path | None
    base: str | None
    onto: str
    dtype: str
    gguf: str | None
    adapter_gguf: Path | None
    rows: int
    config: str | None
    max_kl: float | None
    force: bool
    json: Path | None
    overrides: tuple[str, ...]


def parse(argv: Sequence[str]) -> Options:
    """Parse the command line.

    Raises:
        UserError: An option is unknown or has a value that cannot be, or a file is there that is not to be replaced.
    """
    own, rest = make_parser().parse_known_args(argv)
    _check_overrides(rest)
    if own.out is None and own.adapter_gguf is None:
        raise UserError("--out is missing: name the folder to write the merged model into (or --adapter-gguf FILE).")
    if own.gguf is not None and own.out is None:
        raise UserError("--gguf writes the merged model: name a folder with --out. The adapter alone: --adapter-gguf.")
    if own.rows < 0:
        raise UserError(f"--rows is {own.rows}: expected 1 or more, or 0 to leave the check out.")
    if own.max_kl is not None and not own.max_kl >= 0:
        raise UserError(f"--max-kl is {own.max_kl:g}: expected 0 or more.")
    if rest and (own.out is None or not own.rows):
        raise UserError(f"{rest[0]} chooses rows for the check of a merged model, and there is no check.")
    if own.json is not None and own.out is None:
        raise UserError("--json holds the figures of a merged model, and there is none: add --out, or leave it out.")
    own.json = check_output("--json", own.json, own.force)
    own.adapter_gguf = check_output("--adapter-gguf", own.adapter_gguf, own.force)
    if own.out is not None:
        check_folder(own.out, own.force)
    if own.adapter_gguf is not None:
        check_file(own.adapter_gguf, own.force)
    read_identity(find_adapter_folder(own.adapter))  # a misspelt folder is told before anything is imported
    return Options(**vars(own), overrides=tuple(rest))


def _check_overrides(rest: Sequence[str]) -> None:
    """Refuse what is neither an option of the command nor ``--data.KEY VALUE``.

    Raises:
        UserError: There is such a word, or a value is missing.
    """
    words = iter(rest)
    for word in words:
        if word.startswith("--model."):
            raise UserError(
                f"{word}: the model is what the adapter folder says; another place of its base goes by --base."
            )
        if not word.startswith("--data."):
            raise UserError(f"unrecognized arguments: {word}. See `qlora-lightning merge --help`.")
        if "=" not in word and next(words, "--").startswith("--"):
            raise UserError(f"{word}: expected a value behind it.")


def make_parser() -> OptionParser:
    """Make the parser of the command's own options."""
    usage = "qlora-lightning merge --adapter DIR --out DIR [options] [--data.KEY VALUE …]"
    parser = OptionParser("merge", _DESCRIPTION, _EPILOG, usage)
    add = parser.add_argument
    add("--adapter", required=True, metavar="DIR", help="the adapter folder, or the run folder around it")
    add("--out", type=Path, metavar="DIR", help="the folder to write")
    add("--base", metavar="NAME", help="the base, where it is no longer found under the name it was trained under")
    add(
        "--onto",
        choices=("dequantized", "original"),
        default="dequantized",
        help="dequantized (default): the base as the adapter saw it; original: the weights before quantization",
    )
    add("--dtype", choices=tuple(DTYPES), default="bf16", help="of the weights that are written (default: bf16)")
    add("--gguf", choices=("q8_0", "f16"), help="write a GGUF file for llama.cpp into the folder, too")
    add(
        "--adapter-gguf",
        metavar="FILE",
        help="write the adapter alone as a GGUF file, for llama.cpp's --lora",
    )
    add("--rows", type=int, default=32, metavar="N", help="validation rows to check on (default: 32; 0: no check)")
    add("--config", metavar="FILE", help="a config that names validation rows (default: that of the run)")
    add(
        "--max-kl",
        type=float,
        metavar="NATS",
        help="keep nothing if what is written diverges from base and adapter by more, in nats per token "
        "(default: 0.001 in fp32 and 0.01 rounded, onto dequantized; 0.5 onto original)",
    )
    add_json_option(parser)
    return parser
