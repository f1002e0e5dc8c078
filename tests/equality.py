"""What runs leave, and whether it is the same, bit for bit."""

import torch
from safetensors.torch import load_file

from qlora_lightning.report import read_metrics

_OWN = ("_per_second", "_gib", "seconds")  # what a run has of its own: time and memory


def same(one, other) -> bool:
    """Compare tensors, dicts, lists and plain values."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def base_tensors(model):
    """Copy all frozen parameters of a model, and the scales of those that are quantized."""
    tensors = {name: each.detach().clone() for name, each in model.named_parameters() if not each.requires_grad}
    for name, module in model.named_modules():
        weight = dict(module.named_parameters(recurse=False)).get("weight")
        state = getattr(weight, "quant_state", None)
        rows = getattr(weight, "SCB", None)  # of int8; the first forward moves it to the module
        scales = {
            "absmax": getattr(state, "absmax", None),
            "SCB": getattr(getattr(module, "state", None), "SCB", None) if rows is None else rows,
        }
        tensors |= {f"{name}.{key}": each.clone() for key, each in scales.items() if each is not None}
    return tensors


def read_checkpoint(run, name="last.ckpt"):
    return torch.load(run / "checkpoints" / name, map_location="cpu", weights_only=True)


def tensors_of(run, name="last.ckpt"):
    """The adapter's tensors in a checkpoint, under the names that PEFT gives them in a file."""
    stored = read_checkpoint(run, name)["state_dict"]
    return {key.removeprefix("model.").replace(".default.", "."): tensor for key, tensor in stored.items()}


def read_adapter(run):
    return load_file(run / "adapter" / "adapter_model.safetensors")


def metrics(run, column) -> list[float]:
    return [value for _, value in read_metrics(run / "metrics.csv").get(column, [])]


def contents(folder) -> dict[str, bytes]:
    """All files of a folder, by their paths in it; what links lead to is not read."""
    files = [file for file in folder.rglob("*") if file.is_file() and not file.is_symlink()]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def adapter_bytes(run) -> bytes:
    return (run / "adapter" / "adapter_model.safetensors").read_bytes()


def differences(one, other) -> list[str]:
    """Name what differs between two finished runs, time, speed and memory aside."""
    first, second = read_checkpoint(one), read_checkpoint(other)
    parts = ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch")
    found = [f"{part} of last.ckpt" for part in parts if not same(first[part], second[part])]
    if not same(first["qlora_lightning"]["generators"], second["qlora_lightning"]["generators"]):
        found.append("random generators")
    if adapter_bytes(one) != adapter_bytes(other):
        found.append("adapter/adapter_model.safetensors")
    tables = [read_metrics(run / "metrics.csv") for run in (one, other)]
    names = [name for name in tables[0] | tables[1] if not name.endswith(_OWN)]
    return found + [f"{name} in metrics.csv" for name in names if tables[0].get(name) != tables[1].get(name)]
