"""Which values settings take: numbers and their bounds by YAML key, names, and what the Trainer's settings must be."""

import re
import typing
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any, Literal

from lightning import Trainer

from qlora_lightning.support.errors import UserError
from qlora_lightning.support.values import Bounds, check_setting, fits

_COUNT = Bounds("1 or more", minimum=1, whole=True)
_COUNT_OR_ZERO = Bounds("0 or more", minimum=0, whole=True)
_NOT_NEGATIVE = Bounds("0 or more", minimum=0)
NUMBERS = {
    "model.rank": Bounds("a positive integer, such as 8", minimum=1, whole=True),
    "model.alpha": Bounds("a positive number, such as 16, or null", above=0),
    "model.dropout": Bounds("a probability in [0, 1)", minimum=0, below=1),
    "model.learning_rate": Bounds("a positive number, such as 2e-4, or auto", above=0),
    "model.weight_decay": _NOT_NEGATIVE,
    "model.warmup": Bounds("a share of the steps in [0, 1), or a whole number of steps", minimum=0, whole_from=1),
    "model.loraplus_ratio": Bounds("1 or more, such as 16, or null", minimum=1),
    "model.neftune_alpha": Bounds("a positive number, such as 5, or null", above=0),
    "model.micro_batch_tokens": Bounds("1 or more, or auto", minimum=1, whole=True),
    "model.beta": Bounds("a positive number, such as 0.1 (2 for simpo), or null", above=0),
    "model.gamma": _NOT_NEGATIVE,
    "model.sft_share": _NOT_NEGATIVE,
    "data.batch_size": _COUNT,
    "data.tokens_per_batch": _COUNT,
    "data.max_length": Bounds("2 or more", minimum=2, whole=True),
    "data.max_new_tokens": _COUNT,
    "data.val_fraction": Bounds("a share between 0 and 1", above=0, below=1),
    "source.weight": Bounds("a number above 0", above=0),  # of a mapping in data.train, as the next
    "source.rows": Bounds("a whole number above 0", minimum=1, whole=True),
    "adapter_checkpoint.every_n_train_steps": _COUNT,
    "adapter_checkpoint.every_minutes": Bounds("a positive number, or null", above=0),
    "adapter_checkpoint.save_top_k": _COUNT,
    "evaluation.rows": _COUNT_OR_ZERO,
    "evaluation.every_n_validations": _COUNT,
    "evaluation.max_new_tokens": _COUNT,
    "evaluation.batch_size": _COUNT,
    "evaluation.samples": _COUNT_OR_ZERO,
    "evaluation.forgetting_rows": _COUNT,
    # what Lightning accepts and then ignores, or takes for something else; the rest it rejects itself
    "trainer.accumulate_grad_batches": _COUNT,
    "trainer.gradient_clip_val": Bounds("0 or more; null or 0 clips nothing", minimum=0, infinite=True),
    "trainer.check_val_every_n_epoch": _COUNT,
    "trainer.val_check_interval": Bounds("1 or more batches, or a share of an epoch above 0", above=0),
    "trainer.log_every_n_steps": _COUNT_OR_ZERO,
    "trainer.min_steps": _COUNT_OR_ZERO,
    "trainer.min_epochs": _COUNT_OR_ZERO,
    "seed_everything": Bounds("0 or more, and less than 2^32", minimum=0, below=2**32, whole=True),
}
"""Each setting that is a number, by its key in YAML. ``null`` and names such as ``auto`` are in the type hints."""


def check_arguments(section: str, function: Callable[..., Any], arguments: Mapping[str, Any]) -> None:
    """Check the arguments of a constructor, which are the keys of a section: numbers, bools, names of a ``Literal``.

    ``arguments`` may be the constructor's ``locals()``. Other types are left to Python.
    """
    for name, hint in typing.get_type_hints(function).items():
        if name not in arguments:
            continue
        key, value = f"{section}.{name}", arguments[name]
        if key in NUMBERS:
            is_valid = value in NUMBERS[key] or (not isinstance(value, Real) and fits(value, hint))
            check_setting(key, value, is_valid, NUMBERS[key].expected)
        elif choices := _choices(hint):
            check_setting(key, value, fits(value, hint), f"one of {', '.join(choices)}")


def _choices(hint: Any) -> list[str]:
    """Return the values of a bool, a ``Literal``, or a union with one, as YAML has them; none of any other hint."""
    parts = typing.get_args(hint)
    if hint is bool:
        return ["true", "false"]
    if typing.get_origin(hint) is Literal:
        return [str(part) for part in parts]
    names = [name for part in parts for name in _choices(part)]
    return [*names, "null"] if names and type(None) in parts else names


# ---- the Trainer -----------------------------------------------------------------------------------------------------


def check_trainer_settings(settings: Any) -> None:
    """Check settings of Lightning's Trainer, which are attributes of a parsed config, and of a Trainer too."""
    names = [key.partition(".")[2] for key in NUMBERS if key.startswith("trainer.")]
    # of a Trainer that validates by the clock, val_check_interval is no attribute
    check_arguments("trainer", Trainer.__init__, {name: getattr(settings, name, None) for name in names})
    for unit in ("steps", "epochs"):
        least, most = (getattr(settings, f"{bound}_{unit}", None) for bound in ("min", "max"))
        is_valid = least is None or most is None or most < 0 or least <= most
        expected = f"at most trainer.max_{unit}, which is {most} and ends the run"
        check_setting(f"trainer.min_{unit}", least, is_valid, expected)
    folder = str(settings.default_root_dir)
    is_local = re.match(r"[A-Za-z][\w+.-]+:/", folder) is None  # one letter is a drive of Windows
    expected = "a folder of this machine, or one that is mounted here"
    check_setting("trainer.default_root_dir", folder, is_local, expected)


_SMALL_IS_GOOD = re.compile("(train|val|test)_(loss|perplexity)")
_LARGE_IS_GOOD = re.compile("(train|val|test)_((token_|preference_|reward_)?accuracy|(exact|numeric)_match)")


def natural_mode(monitor: str) -> Literal["min", "max"] | None:
    """Return whether a small or a large value of a metric that we log is good; ``None`` for any other."""
    if _SMALL_IS_GOOD.fullmatch(monitor):
        return "min"
    return "max" if _LARGE_IS_GOOD.fullmatch(monitor) else None


def check_mode(key: str, monitor: str, mode: str | None, owner: str = "AdapterCheckpoint") -> None:
    """Reject a mode under which the worst value of a metric would count as the best."""
    natural = natural_mode(monitor)
    if mode is not None and natural is not None and mode != natural:
        size = "small" if natural == "min" else "large"
        message = f"{key}: the mode of {owner} is {mode}, and of {monitor} a {size} value is good. Set mode: {natural}."
        raise UserError(message, key)
