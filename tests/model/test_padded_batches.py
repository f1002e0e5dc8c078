"""A padded batch, as the collators of transformers make it, trains as its rows do in a packed one: bit for bit."""

import lightning
import pytest
import torch
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, DataCollatorForSeq2Seq, DataCollatorWithFlattening

from qlora_lightning import AdapterCheckpoint, Evaluation, InstructionDataModule, LossSums, QLoRAModule
from tests.equality import same
from tests.errors import rejects
from tests.steps import LENGTHS, loss_and_gradients, make_batch, make_module, make_trainer

_SETTINGS = {"rank": 2, "compute_dtype": "fp32", "learning_rate": 1e-2, "warmup": 0.0}


def pad(rows, side, name, value):
    longest = max(map(len, rows))
    padding = [torch.full((longest - len(row),), value) for row in rows]
    parts = [(fill, row) if side == "left" else (row, fill) for row, fill in zip(rows, padding, strict=True)]
    return {name: torch.stack([torch.cat(part) for part in parts])}


def padded(side="right", **changes):
    """The samples of ``make_batch``, each a row; padding has a label, which must not count."""
    batch = make_batch()
    names = {"input_ids": 7, "labels": 9}
    made = {}
    for name, value in names.items():
        made |= pad(batch[name][0].split(LENGTHS), side, name, value)
    made |= pad([torch.ones(length, dtype=torch.long) for length in LENGTHS], side, "attention_mask", 0)
    return made | changes


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_changes_no_bit_of_loss_and_gradients(tiny_base, side):
    module = make_module(tiny_base)
    for batch in (padded(side), padded(side, position_ids=padded(side)["attention_mask"].cumsum(1) - 1)):
        loss, gradients = loss_and_gradients(module, batch)
        expected_loss, expected = loss_and_gradients(module)
        assert loss == expected_loss
        assert torch.equal(gradients, expected)


def test_positions_that_restart_are_samples_and_others_are_as_given(tiny_base):
    module, batch = make_module(tiny_base), make_batch()
    flat = {name: batch[name] for name in ("input_ids", "labels", "position_ids")}
    assert torch.equal(loss_and_gradients(module, flat)[1], loss_and_gradients(module)[1])
    late = flat | {"position_ids": torch.arange(batch["input_ids"].shape[1])[None] + 3}
    assert module.micro_batch_of(late).position_ids[0, 0] == 3
    assert len(module.micro_batch_of(late).counts) == 1


MASK = padded()["attention_mask"]


@pytest.mark.parametrize(
    ("changes", "fact"),
    [
        ({"attention_mask": 2 * MASK}, "expected 1"),  # numbers of samples, as Axolotl packs
        ({"attention_mask": MASK.index_fill(1, torch.tensor([1]), 0)}, "expected 1"),  # holes
        ({"attention_mask": 0 * MASK}, "expected 1"),
        ({"attention_mask": MASK[:, None, None]}, "attention_mask (6, 1, 1, 64)"),
        ({"labels": MASK[:, :-1]}, "labels (6, 63)"),
        ({"position_ids": MASK.expand(3, -1, -1)}, "position_ids (3, 6, 64)"),
        ({"weights": MASK}, "weights"),
        ({"weights": [1.0] * 6}, "weights"),
        ({"token_type_ids": MASK}, "token_type_ids"),
        ({"seq_idx": MASK}, "seq_idx"),  # without position_ids nothing else says where samples begin
        ({"labels": None}, "no labels"),
        ({"labels": MASK.numpy()}, "labels as ndarray"),
        ({"labels": -MASK}, "label -1"),
        ({"labels": MASK * 10**6}, "label 1,000,000"),
        ({"input_ids": MASK[0]}, "input_ids (64,)"),
    ],
)
def test_what_is_not_a_row_beside_padding_is_rejected(tiny_base, changes, fact):
    with rejects("data.batch", fact):
        make_module(tiny_base).compute_loss(padded(**changes))


def test_what_collators_add_beside_is_ignored(tiny_base):
    module, positions = make_module(tiny_base), padded()["attention_mask"].cumsum(1) - 1
    others = {"length": torch.tensor(LENGTHS), "token_type_ids": 0 * MASK, "seq_idx": MASK, "max_length_q": 64}
    batch = padded(position_ids=positions, cu_seq_lens_q=torch.tensor([0, 64]), **others)
    assert torch.equal(loss_and_gradients(module, batch)[1], loss_and_gradients(module)[1])


class ReadsDict(QLoRAModule):
    """A loss written for the batches of one's own collate function, which also have a weight for each row."""

    def compute_loss(self, batch):
        assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape
        nll, _ = self.token_losses(batch)
        weights = batch["weights"].repeat_interleave(torch.tensor(self.micro_batch_of(batch).counts))
        return LossSums((weights * nll).sum(), weights.sum())


class Padded(lightning.LightningDataModule):
    """The samples of another data module, by a collator of transformers."""

    def __init__(self, samples, collate, batch_size):
        super().__init__()
        self.samples, self.collate, self.batch_size = samples, collate, batch_size

    def train_dataloader(self):
        return DataLoader(self.samples, self.batch_size, collate_fn=self.collate, num_workers=0)

    def val_dataloader(self):
        return self.train_dataloader()


@pytest.mark.filterwarnings("ignore:.*does not have many workers")  # Lightning's: there are none
def test_an_own_loss_gets_the_batch_of_an_own_collate_function_as_it_is(tiny_base, tmp_path, capsys):
    batch = padded("left", weights=torch.ones(len(LENGTHS)))
    losses = []
    for kind, rows in ((QLoRAModule, padded("left")), (ReadsDict, batch)):
        lightning.seed_everything(7, verbose=False)
        module = kind(str(tiny_base), **_SETTINGS)
        callbacks = [AdapterCheckpoint(), Evaluation(rows=0)]
        trainer = make_trainer(tmp_path / kind.__name__, max_steps=2, callbacks=callbacks, enable_checkpointing=True)
        trainer.fit(module, DataLoader([rows, rows], None), DataLoader([rows], None))
        losses.append({name: float(trainer.callback_metrics[name]) for name in ("train_loss", "val_loss")})
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert "returns no sums" not in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:.*does not have many workers")  # Lightning's: there are none
@pytest.mark.parametrize("flattens", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_an_own_data_module_of_padded_batches_trains_validates_and_is_evaluated(
    tiny_base, rows_file, tmp_path, flattens
):
    data = InstructionDataModule(str(rows_file), str(rows_file), tokenizer=str(tiny_base), batch_size=8, shuffle=False)
    data.setup("fit")
    samples = [
        {name: batch[name][0, start:end].tolist() for name in ("input_ids", "labels")}
        for batch in data.train_dataloader()
        for start, end in zip(batch["cu_seqlens"], batch["cu_seqlens"][1:], strict=False)
    ]
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    tokenizer.pad_token = tokenizer.eos_token  # what is padded is told by the mask, not by the token
    collate = DataCollatorWithFlattening() if flattens else DataCollatorForSeq2Seq(tokenizer)
    states, metrics = [], []
    for name, source in (("packed", data), ("padded", Padded(samples, collate, 8))):
        lightning.seed_everything(7, verbose=False)
        module = QLoRAModule(str(tiny_base), **_SETTINGS)
        callbacks = [AdapterCheckpoint(), Evaluation(rows=0)]
        trainer = make_trainer(tmp_path / name, max_epochs=1, callbacks=callbacks, enable_checkpointing=True)
        trainer.fit(module, datamodule=source)
        states.append(module.state_dict())
        metrics.append({key: float(value) for key, value in trainer.callback_metrics.items()})
    assert same(*states)
    assert metrics[0] == metrics[1]
    assert metrics[0]["val_loss"] > 0
