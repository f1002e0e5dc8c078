"""A setting that would be ignored, or mean something else, is rejected before anything is loaded, by its YAML key."""

import itertools
import math
from functools import partial

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping
from torch.utils.data import DataLoader, IterableDataset

from qlora_lightning import (
    AdapterCheckpoint,
    Evaluation,
    GPUMemoryMonitor,
    GradientCheckpointing,
    InstructionDataModule,
    PreferenceModule,
    QLoRAModule,
    ThroughputMonitor,
)
from qlora_lightning.cli import main
from qlora_lightning.support.settings import NUMBERS
from tests.errors import rejects
from tests.steps import fit, make_trainer

CLASSES = {
    "model": partial(QLoRAModule, "base"),
    "data": InstructionDataModule,
    "adapter_checkpoint": AdapterCheckpoint,
    "evaluation": Evaluation,
}
CALLBACKS = {
    "adapter_checkpoint": AdapterCheckpoint,
    "evaluation": Evaluation,
    "gpu_memory": GPUMemoryMonitor,
    "throughput": ThroughputMonitor,
}
PREFERENCE = partial(PreferenceModule, "base", "simpo")
COUNT = (0, -1, 1.5, None)
OUT_OF_BOUNDS = {
    "model.rank": (*COUNT, "8"),
    "model.alpha": (0, -16),
    "model.dropout": (1, -0.1),
    "model.learning_rate": (0, -1e-4, "best", None),
    "model.weight_decay": (-0.1, None),
    "model.warmup": (1.0, -0.1, 2.5),
    "model.loraplus_ratio": (0.5,),
    "model.neftune_alpha": (0, -5),
    "model.micro_batch_tokens": (*COUNT, "all"),
    "model.beta": (0, -0.1),
    "model.gamma": (-1,),
    "model.sft_share": (-1, None),
    "data.batch_size": COUNT[:3],
    "data.tokens_per_batch": COUNT[:3],
    "data.max_length": (1, *COUNT),
    "data.max_new_tokens": COUNT,
    "source.weight": (0, -1, "1"),
    "source.rows": (0, -1, 2.0, "5"),
    "data.val_fraction": (0, 1, -0.1),
    "adapter_checkpoint.every_n_train_steps": COUNT[:3],
    "adapter_checkpoint.every_minutes": (0, -1),
    "adapter_checkpoint.save_top_k": COUNT,
    "evaluation.rows": COUNT[1:],
    "evaluation.every_n_validations": COUNT[:3],
    "evaluation.max_new_tokens": COUNT[:3],
    "evaluation.batch_size": COUNT,
    "evaluation.samples": COUNT[1:],
    "evaluation.forgetting_rows": COUNT,
    "trainer.accumulate_grad_batches": (0, -1),
    "trainer.gradient_clip_val": (-1, math.nan),
    "trainer.check_val_every_n_epoch": (0, -1),
    "trainer.val_check_interval": (0,),
    "trainer.log_every_n_steps": (-1,),
    "trainer.min_steps": (-1,),
    "trainer.min_epochs": (-1,),
    "seed_everything": (-1, 2**32, 2**40),
}
OF_CLASSES = [(key, values) for key, values in OUT_OF_BOUNDS.items() if key.partition(".")[0] in CLASSES]
OF_TRAINER = [(key, value) for key, values in OUT_OF_BOUNDS.items() if "trainer." in key for value in values]


@pytest.mark.parametrize(("key", "values"), OF_CLASSES)
def test_a_number_out_of_bounds_is_rejected_when_an_object_is_made(key, values):
    section, _, name = key.partition(".")
    make = PREFERENCE if name in ("beta", "gamma", "sft_share") else CLASSES[section]
    for value in (*values, math.nan, math.inf, -math.inf, True):
        with rejects(key, f"{key} is {value!r}: expected "):
            make(**{name: value})


@pytest.mark.parametrize("name", ["weight", "rows"])
def test_a_number_of_a_source_out_of_bounds_is_rejected_by_its_path(name):
    for value in (*OUT_OF_BOUNDS[f"source.{name}"], math.nan, math.inf, -math.inf, True):
        with rejects("data.train", f"{name} of a.jsonl is {value!r}: expected a "):
            InstructionDataModule({"path": "a.jsonl", name: value}).sources("train")


def test_every_setting_with_bounds_is_tried():
    assert OUT_OF_BOUNDS.keys() == NUMBERS.keys()


def test_numbers_at_their_bounds_are_taken():
    least = {"rank": 1, "alpha": 1e-9, "dropout": 0, "learning_rate": 1e-9, "weight_decay": 0, "warmup": 0}
    QLoRAModule("base", **least, loraplus_ratio=1, neftune_alpha=1e-9, micro_batch_tokens=1)
    QLoRAModule("base", dropout=0.99, warmup=100, alpha=None, loraplus_ratio=None, neftune_alpha=None)
    PREFERENCE(beta=1e-9, gamma=0, sft_share=0)
    InstructionDataModule(batch_size=1, max_length=2, max_new_tokens=1, val_fraction=0.01)
    AdapterCheckpoint(every_n_train_steps=1, every_minutes=1e-9, save_top_k=1)
    Evaluation(rows=0, every_n_validations=1, max_new_tokens=1, batch_size=1, samples=0, forgetting_rows=1)


@pytest.mark.parametrize(
    ("make", "key", "value"),
    [
        (CLASSES["model"], "model.quantization", "nf5"),
        (CLASSES["model"], "model.quantization", None),
        (CLASSES["model"], "model.compute_dtype", "bf61"),
        (PREFERENCE.func, "model.objective", "dop"),
        (InstructionDataModule, "data.train_on", ["last"]),
        (InstructionDataModule, "data.too_long", "cut"),
        (InstructionDataModule, "data.on_bad_row", "ignore"),
        (GradientCheckpointing, "gradient_checkpointing.enabled", "maybe"),
        (GradientCheckpointing, "gradient_checkpointing.enabled", 2),
        (AdapterCheckpoint, "adapter_checkpoint.mode", "low"),
        # true and false alone, since the text "false" would be true
        *((CLASSES["model"], f"model.{name}", 1) for name in ("double_quant", "cache", "target_experts", "fast")),
        (CLASSES["model"], "model.trust_remote_code", "false"),
        (PREFERENCE.func, "model.trust_remote_code", "false"),
        (InstructionDataModule, "data.shuffle", "false"),
        (InstructionDataModule, "data.deduplicate", None),
        *((kind, f"{key}.enabled", "off") for key, kind in CALLBACKS.items()),
    ],
)
def test_a_name_that_is_none_of_a_settings_is_rejected_when_an_object_is_made(make, key, value):
    arguments = {"base": "base", "objective": "dpo"} if make is PREFERENCE.func else {}
    with rejects(key, f"{key} is {value!r}: expected one of "):
        make(**arguments | {key.partition(".")[2]: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("trainable_token_indices", value) for value in ([True], 5, ["5"], {"embed_tokens": 5})),
        *(("rank_pattern", value) for value in (8, ["q_proj"], {"q_proj": "8"}, {"q_proj": True})),
        *(("alpha_pattern", value) for value in (8, {"q_proj": "8"}, {8: 8})),
        *(("modules_to_save", value) for value in ("lm_head", [8])),
        *((name, value) for name in ("use_dora", "use_rslora", "ensure_weight_tying") for value in (1, "false", None)),
        *(("init_lora_weights", value) for value in (1, None, "pissa")),
    ],
)
def test_an_option_of_lora_of_another_kind_is_rejected_when_the_module_is_made(name, value):
    with rejects("model.lora_options", f"model.lora_options.{name} is {value!r}: expected "):
        QLoRAModule("base", lora_options={name: value})
    with rejects("model.lora_options", "expected {name: value}"):
        QLoRAModule("base", lora_options=[name])


def test_options_of_lora_of_their_kind_are_taken():
    options = {"trainable_token_indices": [5], "rank_pattern": {"q_proj": 8}, "alpha_pattern": {"q_proj": 0.5}}
    for more in (
        {},
        {"trainable_token_indices": {"embed_tokens": [5]}},
        dict.fromkeys(options),
        {"modules_to_save": []},
    ):
        QLoRAModule("base", lora_options={**options, **more, "use_dora": True, "init_lora_weights": False})
    QLoRAModule("base", lora_options={})


# ---- Lightning's Trainer, by the command and from Python -------------------------------------------------------------


def rejected_by_the_command(capsys, **options):
    """Run a fit with options, and without a base that exists; return its message."""
    config = '{"model": {"base": "none"}, "data": {"train": "none.jsonl"}}'
    assert main(["fit", "--config", config, *(f"--{key}={value}" for key, value in options.items())]) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(("key", "value"), [*OF_TRAINER, *(("seed_everything", n) for n in (-1, 2**32, 2**40))])
def test_a_number_of_the_trainer_out_of_bounds_is_rejected_by_the_command(capsys, key, value):
    shown = ".nan" if value != value else value
    assert f"{key} is {value}" in rejected_by_the_command(capsys, **{key: shown}).replace(".0:", ":")


OTHER_RULES = [
    ("min_steps", {"min_steps": 3, "max_steps": 2}),
    ("min_epochs", {"min_epochs": 3, "max_epochs": 2}),
    ("default_root_dir", {"default_root_dir": "s3://bucket/run"}),
    ("default_root_dir", {"default_root_dir": "file:///run"}),
]


@pytest.mark.parametrize(("name", "options"), OTHER_RULES, ids=str)
def test_settings_of_the_trainer_that_contradict_each_other_are_rejected_by_the_command(capsys, name, options):
    options = {f"trainer.{key}": value for key, value in options.items()}
    assert f"trainer.{name} is " in rejected_by_the_command(capsys, **options)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((key.partition(".")[2], {key.partition(".")[2]: value}) for key, value in OF_TRAINER),
        *OTHER_RULES,
        *(("accumulate_grad_batches", {"accumulate_grad_batches": value}) for value in (True, "2", None)),
        # beyond the end of the run, which has eight steps an epoch
        ("min_steps", {"min_steps": 17}),
        ("min_epochs", {"min_epochs": 2, "max_steps": 15}),
        ("min_epochs", {"min_epochs": 2, "max_steps": 7}),
        ("val_check_interval", {"val_check_interval": 9}),
        ("val_check_interval", {"val_check_interval": 17, "check_val_every_n_epoch": None}),
        ("val_check_interval", {"val_check_interval": 4, "max_steps": 3}),
        ("val_check_interval", {"val_check_interval": 4, "max_steps": 1, "accumulate_grad_batches": 2}),
        ("check_val_every_n_epoch", {"check_val_every_n_epoch": 3}),
        ("check_val_every_n_epoch", {"check_val_every_n_epoch": 2, "max_steps": 15}),
        pytest.param("callbacks", {"callbacks": EarlyStopping("val_loss", mode="max")}, id="mode of a loss"),
        # whose mode is min by default
        pytest.param("callbacks", {"callbacks": EarlyStopping("val_token_accuracy")}, id="mode of an accuracy"),
    ],
    ids=str,
)
def test_the_trainers_settings_are_rejected_from_python(rows_file, tiny_base, tmp_path, monkeypatch, name, options):
    monkeypatch.chdir(tmp_path)
    module, options = QLoRAModule(str(tiny_base)), {"max_epochs": 2, "default_root_dir": tmp_path, **options}
    with rejects(f"trainer.{name}"):
        fit(module, options.pop("default_root_dir"), rows_file, val=True, **options)
    assert module.model is None  # nothing was loaded
    assert [*tmp_path.iterdir()] == [rows_file]  # and nothing written


@pytest.mark.parametrize(
    ("options", "validates"),
    [
        ({"min_steps": 16, "min_epochs": 2}, True),
        ({"min_steps": 3, "max_steps": 4}, False),  # beside which Lightning sets min_epochs to 1
        ({"val_check_interval": 16, "check_val_every_n_epoch": None}, True),
        ({"check_val_every_n_epoch": 2}, True),
        ({"val_check_interval": 5, "max_steps": 2, "accumulate_grad_batches": 2}, True),  # rounded down to whole steps
        ({"val_check_interval": 0.25, "max_steps": 1}, False),  # a trial of a long run's config
        ({"gradient_clip_val": math.inf, "max_steps": 1}, False),  # to log the norm alone
        # whose names end like those of a loss and an accuracy
        ({"callbacks": EarlyStopping("val_neg_loss", mode="max", strict=False)}, True),
        ({"callbacks": EarlyStopping("val_inaccuracy", mode="min", strict=False)}, True),
    ],
    ids=itertools.count(),
)
def test_settings_that_the_run_reaches_are_taken(rows_file, tiny_base, tmp_path, capsys, options, validates):
    trainer = fit(QLoRAModule(str(tiny_base)), tmp_path, rows_file, val=True, **{"max_epochs": 2, **options})
    assert ("val_loss" in trainer.callback_metrics) is validates
    assert ("The validation rows are not used" in capsys.readouterr().out) is not validates


class Stream(IterableDataset):
    """Rows of a user's own, of which nobody knows the number."""

    def __iter__(self):
        for number in range(4):
            ids = torch.arange(5, 15) + number
            yield {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
def test_an_own_loader_without_a_length_needs_max_steps(tiny_base, tmp_path):
    loader = DataLoader(Stream(), batch_size=2, num_workers=0)
    with rejects("trainer.max_steps", "how many batches", "Set trainer.max_steps"):
        make_trainer(tmp_path, max_epochs=1).fit(QLoRAModule(str(tiny_base)), loader)
    trainer = make_trainer(tmp_path, max_steps=3)
    trainer.fit(QLoRAModule(str(tiny_base)), loader)
    assert trainer.global_step == 3


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
def test_the_length_of_a_run_on_an_own_loader_is_checked_before_its_first_step(tiny_base, tmp_path):
    rows = DataLoader([*Stream()], batch_size=2)
    for name, options in (
        ("min_steps", {"min_steps": 5, "max_epochs": 2}),
        ("min_epochs", {"min_epochs": 2, "max_steps": 3}),
        ("val_check_interval", {"val_check_interval": 3, "check_val_every_n_epoch": None, "max_epochs": 1}),
    ):
        trainer = make_trainer(tmp_path, **options)
        with rejects(f"trainer.{name}"):
            trainer.fit(QLoRAModule(str(tiny_base)), rows, rows)
        assert trainer.global_step == 0


@pytest.mark.parametrize(
    ("schedule", "facts"),
    [
        ("cosine_with_min_lr", ["min_lr", "min_lr_rate"]),
        ({"name": "warmup_stable_decay"}, ["num_decay_steps"]),
        ({"name": "cosine", "num_cycles": "two"}, ["'two'"]),
        ({"name": "polynomial", "lr_end": 1.0}, ["lr_end"]),
        ({"name": "cosine", "num_warmup_steps": 3}, ["num_warmup_steps", "model.warmup"]),
        ({"name": "linear", "num_training_steps": 3}, ["num_training_steps", "trainer.max_steps"]),
    ],
    ids=str,
)
def test_a_schedule_that_cannot_be_computed_is_rejected_when_the_module_is_made(schedule, facts):
    with rejects("model.schedule", *facts):
        QLoRAModule("base", learning_rate=1e-3, schedule=schedule)
    for name in ("cosine", "linear", "inverse_sqrt", {"name": "cosine_with_min_lr", "min_lr_rate": 0.1}, "polynomial"):
        QLoRAModule("base", schedule=name)


@pytest.mark.parametrize(
    ("options", "word"), [({"max_epochs": -1, "max_time": {"hours": 1}}, "end"), ({"max_steps": 0}, "no step")]
)
def test_a_run_without_an_end_or_a_step_is_rejected_before_the_base_is_loaded(
    tiny_base, rows_file, tmp_path, options, word
):
    module = QLoRAModule(str(tiny_base))
    with rejects("trainer.max_steps", word, "trainer.max_epochs"):
        fit(module, tmp_path, rows_file, **options)
    assert module.model is None
