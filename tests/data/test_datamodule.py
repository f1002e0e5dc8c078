from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.utilities.model_helpers import is_overridden

from qlora_lightning.data import datamodule
from qlora_lightning.data.datamodule import InstructionDataModule
from qlora_lightning.support.errors import UserError
from tests.steps import make_trainer

# Lightning 2.6.6 still asks torch 2.13 with isinstance whether a loader is a leaf.
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning")


@pytest.fixture(autouse=True)
def _no_seed_left(monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "5")


@pytest.fixture
def files(write):
    pairs = [{"prompt": f"q{number}", "completion": "k" * (1 + number % 3)} for number in range(26)]
    return {"train": write("train.jsonl", pairs), "val": write("val.jsonl", pairs[:5])}


@pytest.fixture
def make(files, characters):
    return lambda **kwargs: InstructionDataModule(**files | {"tokenizer": characters, "batch_size": 2} | kwargs)


class Recorder(pl.LightningModule):
    """A line that is fitted to token ids, with the rows that it saw."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = True
        self.line = torch.nn.Linear(1, 1)
        self.seen = []

    def training_step(self, batch, _):
        self.seen.append(batch["row_ids"].tolist())
        return self.line(batch["input_ids"].float().T / 200).square().mean()

    def validation_step(self, batch, _):
        self.seen.append("val")

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1e-3)

    def on_save_checkpoint(self, checkpoint):
        checkpoint["seen"] = len(self.seen)


class SaveAlways(pl.Callback):
    def __init__(self, folder):
        self.folder, self.files = folder, []

    def save(self, trainer, hook):
        self.files.append(str(self.folder / f"{len(self.files):03d}-{hook}.ckpt"))
        trainer.save_checkpoint(self.files[-1])

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        # where validation is due, Lightning skips it on resume: AdapterCheckpoint saves after it
        if (batch_idx + 1) % 5:
            self.save(trainer, "batch")

    def on_validation_end(self, trainer, module):
        self.save(trainer, "validation")

    def on_train_epoch_end(self, trainer, module):
        # with max_steps Lightning 2.6.6 runs one batch of the next epoch and skips the rest
        if trainer.max_steps == -1:
            self.save(trainer, "epoch")


def train(make, callbacks=(), ckpt_path=None, data=None, **kwargs):
    model = Recorder()
    options = {"max_epochs": 2, "accumulate_grad_batches": 4, "val_check_interval": 5} | kwargs
    trainer = make_trainer(None, **options, callbacks=list(callbacks))
    trainer.fit(model, datamodule=make(**data or {}), ckpt_path=ckpt_path)
    return model.seen


STEPS = {"max_epochs": -1, "max_steps": 5}
PACKED = {"batch_size": None, "tokens_per_batch": 40}


@pytest.mark.parametrize(
    "options",
    [
        {},
        STEPS,
        {"limit_train_batches": 11},
        {"data": PACKED},
    ],
)
def test_a_run_resumes_exactly_from_every_save_point(make, tmp_path, monkeypatch, options):
    saver = SaveAlways(tmp_path)
    seen = train(make, [saver], **options)
    monkeypatch.setenv("PL_GLOBAL_SEED", "6")  # the checkpoint's seed is kept
    wrong = []
    for file in saver.files:
        saved = torch.load(file, weights_only=True)["seen"]
        if train(make, ckpt_path=file, **options) != seen[saved:]:
            wrong.append(file)
    assert wrong == []
    assert len(saver.files) > 12


def test_overfitting_repeats_the_same_rows(make):
    seen = [batch for batch in train(make, overfit_batches=2, val_check_interval=1.0) if batch != "val"]
    assert seen == [[0, 1], [2, 3]] * 2


def test_without_shuffling_every_epoch_is_in_file_order(make, write):
    seen = [batch for batch in train(make, data={"shuffle": False}, max_epochs=2) if batch != "val"]
    assert seen == [[row, row + 1] for row in range(0, 26, 2)] * 2
    weighted = [{"path": "train.jsonl", "weight": 1}, {"path": "val.jsonl", "weight": 2}]
    with pytest.raises(UserError, match="shuffle: false keeps the order of the files, which weights mix"):
        make(train=weighted, shuffle=False).setup("fit")


SETTINGS = [
    ({"too_long": "cut"}, "too_long: expected truncate, drop, split, found 'cut'"),
    ({"max_length": 1}, "max_length: expected at least 2, found 1"),
    ({"batch_size": None, "tokens_per_batch": -1}, "tokens_per_batch: expected at least 1, found -1"),
    ({"val": {"path": "val.jsonl"}, "val_fraction": 0.1}, "val and val_fraction are both given"),
    ({"shuffle": False, "batch_size": None, "tokens_per_batch": 64}, "shuffle: false and tokens_per_batch"),
]


@pytest.mark.parametrize(("settings", "words"), SETTINGS)
def test_settings_that_mean_nothing_or_contradict_each_other_are_refused(make, settings, words):
    with pytest.raises(UserError, match=words):
        make(**settings)


def test_a_stage_builds_only_what_it_needs_and_only_once(make):
    data = make(train="missing.jsonl")
    data.setup("validate")
    before = data.val_dataloader().samples
    data.setup("validate")
    assert data.val_dataloader().samples is before
    with pytest.raises(UserError, match=r"missing.jsonl does not exist"):
        data.setup("fit")


def test_validation_is_optional_in_fit_but_not_in_validate(make):
    data = make(val=None)
    data.setup("fit")
    assert not is_overridden("val_dataloader", data)  # so Lightning does not validate
    for stage, split in (("validate", "val"), ("test", "test"), ("predict", "predict")):
        with pytest.raises(UserError, match=f"{split} rows are needed.*data.{split}"):
            data.setup(stage)


def test_val_fraction_holds_rows_out_by_the_checkpoints_seed(make, monkeypatch):
    def held(data):
        return [sample.row_id for sample in data.val_dataloader().samples]

    data = make(val=None, val_fraction=0.25)
    data.setup("validate")
    assert len(held(data)) == 6  # of 26
    assert (data.reports["train"].rows, data.reports["val"].rows) == (20, 6)
    monkeypatch.setenv("PL_GLOBAL_SEED", "6")
    other = make(val=None, val_fraction=0.25)
    other.setup("fit")
    assert held(other) != held(data)
    other.load_state_dict(data.state_dict())
    assert held(other) == held(data)
    told = []
    monkeypatch.setattr(datamodule, "rank_zero_info", told.append)
    other.load_state_dict({"seed": 7})
    assert any("seed_everything is 5, but the checkpoint's 7 rules" in line for line in told)


def test_the_seed_is_torchs_without_seed_everything_and_no_global_number_is_drawn(make, monkeypatch):
    monkeypatch.delenv("PL_GLOBAL_SEED")
    data, before = make(), torch.get_rng_state()
    assert data.state_dict() == {}
    data.setup("fit")
    assert data.state_dict() == {"seed": torch.initial_seed()}
    assert (len(list(data.train_dataloader())), len(list(data.val_dataloader()))) == (13, 3)
    assert torch.equal(before, torch.get_rng_state())
    data.trainer = SimpleNamespace(global_rank=1, world_size=2)
    assert [batch["row_ids"].tolist() for batch in data.val_dataloader()] == [[2, 3], [-1]]


PAIR = {"prompt": "q", "completion": "k"}
TALK = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "k"}]
OTHER_TASKS = [
    ({"prompt": "q", "chosen": "k", "rejected": "b"}, "`chosen: completion`"),
    ({**PAIR, "label": False}, "{label: null}"),  # of TRL
    ({"instruction": "q", "output": "k", "kto_tag": False}, "{kto_tag: null}"),  # of LLaMA-Factory
    ({"messages": TALK, "images": ["a.png"]}, "{images: null}"),
    ({**PAIR, "image": {"bytes": None, "path": "a.png"}}, "{image: null}"),
]


@pytest.mark.parametrize(("row", "advice"), OTHER_TASKS)
def test_rows_of_other_tasks_are_rejected_wherever_they_are_whatever_becomes_of_bad_rows(make, write, row, advice):
    write("other.jsonl", [PAIR, {"prompt": "q"}, row])
    for split, stage in (("train", "fit"), ("val", "validate")):
        with pytest.raises(UserError, match=r"^other\.jsonl:3 ") as error:
            make(**{split: "other.jsonl"}, on_bad_row="skip").setup(stage)
        assert advice in str(error.value)


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        ({**PAIR, "label": 1}, {}),  # a class
        ({**PAIR, "label": "sport"}, {}),
        ({**PAIR, "images": [], "image": None, "audio": {"bytes": None, "path": ""}}, {}),
        ({**PAIR, "chosen": None, "rejected": None}, {}),  # columns of another source of the same data set
        ({"prompt": "q", "chosen": "k", "rejected": "b"}, {"chosen": "completion"}),
        ({"prompt": "q", "label": "k"}, {"label": "completion"}),
        ({**PAIR, "label": True, "images": ["a.png"]}, {"label": None, "images": None}),
    ],
)
def test_what_only_looks_like_another_task_and_what_the_user_names_trains(make, write, row, columns):
    write("rows.jsonl", [row])
    data = make(train="rows.jsonl", columns=columns)
    data.setup("fit")
    assert "".join(map(chr, data.samples["train"][0].ids.tolist())) == "{u\nq}\n{a\nk}\n"


def test_rows_from_elsewhere(characters):
    class Mine(InstructionDataModule):
        def load_rows(self, split):
            return [{"prompt": "q", "completion": "k" if split == "train" else ""}]

    data = Mine(tokenizer=characters)
    with pytest.raises(UserError, match="val:1: the answer"):
        data.setup("fit")
    (batch,) = data.train_dataloader()
    assert batch["row_ids"].tolist() == [0]


def test_rows_to_predict(make, write):
    write("ask.jsonl", [{"prompt": "q"}, {"prompt": "r"}, {"prompt": "s", "completion": "k"}])
    data = make(predict="ask.jsonl", system="S")
    data.setup("predict")
    first, second = data.predict_dataloader()
    assert "".join(map(chr, first["prompt_ids"][0])) == "{s\nS}\n{u\nq}\n{a\n"
    assert data.samples["predict"].labelled_counts.tolist() == [0, 0, 0]
    assert data.samples["predict"].where(2) == "ask.jsonl:3"
    assert (first["references"], second["references"], second["row_ids"]) == ([None, None], ["k"], [2])
    assert data.stop_ids == [125]


def test_weights_give_each_source_its_share_of_an_epoch(make, write):
    write("few.jsonl", [{"prompt": f"z{number}", "completion": "k"} for number in range(4)])
    data = make(train=[{"path": "train.jsonl", "weight": 1}, {"path": "few.jsonl", "weight": 2}])
    data.setup("fit")
    sources = [source for batch in data.train_dataloader() for source in batch["source"].tolist()]
    assert (sources.count(0), sources.count(1)) == (10, 20)  # of 26 + 4 rows
    data = make(train=["train.jsonl", "few.jsonl"])  # without weights every row is trained once
    data.setup("fit")
    assert sorted(row for batch in data.train_dataloader() for row in batch["row_ids"].tolist()) == list(range(30))
    assert data.count_train_batches() == len(data.train_dataloader())


def test_a_folder_gives_all_splits_and_whoever_judges_is_told_of_rows_that_are_trained_on(write, characters):
    rows = [{"prompt": f"q{number}", "completion": "k"} for number in range(8)]
    Path("d").mkdir()
    for name, part in (("train", rows), ("val", rows[6:]), ("test", rows[5:6])):
        write(f"d/{name}.jsonl", part)
    data = InstructionDataModule("d", tokenizer=characters, batch_size=2)
    for stage, split, overlap in (("fit", "val", 2), ("test", "test", 1)):
        data.setup(stage)
        assert (len(data.samples["train"]), data.reports[split].overlap) == (8, overlap)
    judge = InstructionDataModule("gone.jsonl", test="d/test.jsonl", tokenizer=characters, batch_size=2)
    judge.setup("test")
    assert judge.reports["test"].overlap == 0


def test_answers_that_mean_none_and_empty_questions_are_listed_and_dropped_if_asked(write, characters):
    answers = ["yes", "N/A", "null", "None of them", "nan"]
    rows = [{"prompt": f"q{number}", "completion": answer} for number, answer in enumerate(answers)]
    write("train.jsonl", [*rows, {"prompt": " ", "completion": "k"}])
    data = InstructionDataModule("train.jsonl", tokenizer=characters)
    data.setup("fit")
    report = data.reports["train"]
    reasons = ["the answer is 'N/A'", "the answer is 'null'", "the answer is 'nan'", "the question is empty"]
    places = [f"train.jsonl:{line} ({reason})" for line, reason in zip((2, 3, 5, 6), reasons, strict=True)]
    assert (report.suspicious, report.suspicious_rows, report.samples) == (4, places, 6)
    assert "4 rows look incomplete; data.missing drops them: train.jsonl:2 (the answer is 'N/A')" in report.describe()
    data = InstructionDataModule("train.jsonl", tokenizer=characters, missing=["N/A", "null"])
    data.setup("fit")
    assert data.reports["train"].dropped == {"an answer is one of data.missing": 2}
    assert data.reports["train"].suspicious == 2
