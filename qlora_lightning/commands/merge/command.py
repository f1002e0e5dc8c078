"""``qlora-lightning merge``: merge an adapter into its base, checked against both."""

from collections.abc import Sequence

from jsonargparse.typing import NonNegativeInt

from qlora_lightning.commands.merge import DTYPES, K_QUANTS, RECORD
from qlora_lightning.commands.options import OptionParser, expand_path
from qlora_lightning.sources.folders import find_adapter_folder, read_identity
from qlora_lightning.support.errors import UserError

_DESCRIPTION = """Merge an adapter into its base: a folder for transformers, vLLM and others, and a GGUF file if asked.

Layer by layer, in fp32, never into 4 bits, onto the dequantized base that the adapter was trained on. The result is
compared with base and adapter on validation rows, and kept only if they agree; merge.json in it has the figures."""
_EPILOG = """examples:
  qlora-lightning merge --adapter runs/quickstart/adapter --out runs/quickstart/merged
  qlora-lightning merge --adapter runs/quickstart/adapter --out runs/quickstart/gguf --gguf q8_0 --rows 16

The validation rows are those of the run's config.yaml beside the adapter folder; --config FILE, or options of fit such
as --data.val FILE, name others. q4_k_m, q5_k_m and q6_k are quantized by llama.cpp's own program llama-quantize; where
it is not on the PATH, f16 is written, and the command that quantizes it is printed."""


def main(argv: Sequence[str]) -> int:
    """Merge an adapter; return the exit code."""
    parser = OptionParser("merge", _DESCRIPTION, _EPILOG, fit=True)
    add = parser.add_argument
    add("--adapter", required=True, metavar="DIR", help="the adapter folder, or the run folder around it")
    add("--out", required=True, type=expand_path, metavar="DIR", help="the folder to write")
    add("--base", metavar="NAME", help="the base, if it is no longer found under the name it was trained under")
    add("--dtype", choices=tuple(DTYPES), default="bf16", help="of the weights that are written (default: bf16)")
    gguf_help = "write a GGUF file for llama.cpp, and a Modelfile for Ollama, too"
    add("--gguf", choices=(*K_QUANTS, "q8_0", "f16"), help=gguf_help)
    rows_help = "validation rows to check on (default: 8; 0: no check)"
    add("--rows", type=NonNegativeInt, default=8, metavar="N", help=rows_help)
    add("--force", action="store_true", help="replace a folder that an earlier merge wrote")
    options, fit_options = parser.parse_known_args(argv)
    if fit_options and not options.rows:
        parser.error(f"unrecognized arguments: {' '.join(fit_options)} (options of fit choose rows to check on)")
    if options.out.exists() and not (options.force and (options.out / RECORD).is_file()):
        raise UserError(
            f"--out {options.out} exists: choose another folder. --force replaces one that an earlier merge wrote "
            f"(with {RECORD} in it)."
        )
    read_identity(find_adapter_folder(options.adapter))  # a misspelt folder is reported before anything is imported

    # here, so that --help and mistakes answer at once
    from qlora_lightning.commands.merge.merged_folder import merge

    merge(
        options.adapter,
        options.out,
        base=options.base,
        dtype=options.dtype,
        gguf=options.gguf,
        rows=options.rows,
        fit_options=fit_options,
    )
    return 0
