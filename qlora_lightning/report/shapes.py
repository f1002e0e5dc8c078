"""The types of what the JSON files of a run folder say, as far as a page shows it."""

from qlora_lightning.support.files import Shape

_IDENTITY: dict[str, Shape] = {
    **{"base": str, "revision": str, "fingerprint": str, "quantization": str, "double_quant": bool},
    "compute_dtype": str,
}
_ADAPTER: Shape = {"target_modules": [str], "layers": [int]}
_SPLIT: Shape = {
    **{"rows!": int, "samples!": int, "tokens!": int, "labelled!": int, "shortened!": int, "lost_labels!": int},
    **{"bad_rows!": int, "duplicates!": int, "overlap!": int, "dropped": {"*!": int}},
}
_DEVICE: Shape = {
    **{"kind!": str, "name!": str, "memory_gib!": float, "processor": str, "cores!": int, "threads!": int},
    **{"processes!": int, "nodes!": int, "strategy": str},
}
_SIDE: Shape = (float, {"value": float, "low": float, "high": float})
CONFIG: Shape = {"data": {}}
"""Of ``config.yaml``."""
MANIFEST: Shape = {
    "status": str,
    "error": str,
    "base": _IDENTITY,
    "adapter": _ADAPTER,
    "parameters": {"trainable": int, "all": int},
    "data": {"files": {}, "splits": {"*!": _SPLIT}, "hashes": {}, "settings": {}},
    "config": CONFIG,
    "device": _DEVICE,
    "packages": {},
    "git": {"commit!": str, "branch": str, "dirty!": bool},
    "command": str,
    "reproduce": str,
    "progress": {"steps!": int, "planned_steps": int, "tokens": int, "labelled_tokens": int, "seconds": float},
    "peak_memory_gib": {"*": float},
    "best": {"monitor!": str, "value!": float, "checkpoint!": str},
    "lives": [{"started": str, "seconds": float, "from_step": int, "to_step": int, "status": str, "error": str}],
    "warnings": [{"text!": str, "count!": int}],
}
EVALUATION: Shape = {
    **{"rows": int, "answered_rows": int, "split": str, "scores": [str], "adapters": {}},
    "metrics": {"*!": {"*": _SIDE, "differences": {"*": _SIDE}}},
    "samples": [{}],
}
PLAN: Shape = {"predicted": {"peak_bytes": float}, "measured": {"peak_bytes": float}}
ADAPTER: Shape = {**_IDENTITY, "adapter": _ADAPTER}
"""Of ``adapter/qlora_lightning.json``."""
