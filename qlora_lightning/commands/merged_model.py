"""The files of a merged model beside a GGUF: weights, configs, tokenizer, and a Modelfile for Ollama."""

import json
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor
from transformers import GenerationConfig

from qlora_lightning.data.chat.templates import find_stop_ids
from qlora_lightning.model.adapters.trained import AdapterSource
from qlora_lightning.model.merge import Merge, TrainedWeights
from qlora_lightning.sources import folders
from qlora_lightning.support.console import progress_counter
from qlora_lightning.support.errors import UserError
from qlora_lightning.support.files import read_json_object, set_usual_mode, write_whole


def write_weights(
    plan: Merge, weights: TrainedWeights, base: folders.BaseFolder, folder: Path, dtype: torch.dtype
) -> None:
    """Merge tensor by tensor, and write the shards; what is no weight of the text model is copied as it is."""
    base_files, names_in_model = folders.TensorFiles(base.folder), dict[str, str]()
    shapes, tensors = dict[str, Tensor](), dict[str, Tensor]()
    for name, shape in plan.shapes.items():
        parts = plan.publish(name, torch.empty(shape, dtype=dtype, device="meta"))
        shapes |= parts
        names_in_model |= dict.fromkeys(parts, name)
    shapes |= {name: torch.empty(shape, dtype=dtype, device="meta") for name, shape in plan.copied.items()}
    shards = split_torch_state_dict_into_shards(shapes, max_shard_size=2_000_000_000)
    with progress_counter("merging", len(shapes)) as advance:
        for shard, names in shards.filename_to_tensors.items():
            for name in names:
                if name in plan.copied:
                    tensors[name] = base_files.read(name, dtype)
                elif name not in tensors:
                    name_in_model = names_in_model[name]
                    merged = plan.merge(name_in_model, weights(name_in_model))
                    tensors |= plan.publish(name_in_model, merged.to(dtype))
                advance(1)
            written = {name: tensors.pop(name).contiguous() for name in names}
            save_file(written, folder / shard, {"format": "pt"})
            set_usual_mode(folder / shard)  # a server may run as another user
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        write_whole(folder / "model.safetensors.index.json", index)


def write_companions(source: AdapterSource, folder: Path, dtype: str) -> None:
    """Write config and tokenizer, the files beside the weights; tokenizer and stop tokens are the adapter's."""
    config = folders.read_config(source.base.folder, source.base.name)
    dropped = {"quantization_config", "torch_dtype", "auto_map", *folders.FIXED_KEYS}  # some name code
    dropped |= {f"{prefix}{part}_implementation" for prefix in ("", "_") for part in ("attn", "experts")}
    config = {name: value for name, value in config.items() if name not in dropped}
    config["dtype"] = dtype
    for origin in (source.base.folder, source.folder):
        file = origin / "generation_config.json"
        if file.is_file():
            settings = read_json_object(file, "Copy it from where the base came from.")
            # a link from elsewhere may lead to any file of the user
            settings = {name: value for name, value in settings.items() if name in vars(GenerationConfig())}
            write_whole(folder / file.name, settings)
            tokens = ("bos_token_id", "eos_token_id", "pad_token_id")
            config |= {name: settings[name] for name in tokens if settings.get(name) is not None}
    for file in source.base.folder.glob("*processor_config.json"):  # of what else than text a model reads
        settings = read_json_object(file, "Copy it from where the base came from.")
        write_whole(folder / file.name, {key: value for key, value in settings.items() if key != "auto_map"})
    write_whole(folder / "config.json", config)
    _check_links(source.tokenizer_folder)
    folders.load_tokenizer(str(source.tokenizer_folder)).save_pretrained(folder)


def write_modelfile(file: Path, source: AdapterSource, folder: Path) -> None:
    """Write the Modelfile, by which Ollama runs a GGUF file, beside it; stop tokens are those of the folder."""
    tokenizer = folders.load_tokenizer(str(folder))
    stops = (tokenizer.decode([token_id]) for token_id in sorted(find_stop_ids(tokenizer)))
    # in JSON's quotes a token cannot end its line
    lines = [f"FROM ./{file.name}", *(f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in stops)]
    system = source.data_settings.get("system")
    if system and '"""' not in f'{system}"':  # Ollama unescapes nothing in its quotes
        lines.append(f'SYSTEM """{system}"""')
    # Ollama takes the chat template from the file, if it knows that
    (file.parent / "Modelfile").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _check_links(folder: Path) -> None:
    """Reject files of a tokenizer that are links out of its folder: what they lead to would be copied."""
    root = folder.resolve()
    root = root.parents[1] if root.parent.name == "snapshots" else root  # the hub's cache links to its blobs
    for file in [*folder.glob("*token*"), *folder.rglob("*.jinja")]:
        if not file.resolve().is_relative_to(root):
            raise UserError(
                f"{file} is a link to {file.resolve()}, which merge would copy: put the file itself there.",
                "tokenizer.link",
            )
