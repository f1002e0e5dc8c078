import argparse
from types import SimpleNamespace

import pytest

from qlora_lightning.commands.inspection.arguments import Config
from qlora_lightning.commands.inspection.facts import inspect_data
from qlora_lightning.data.batches.epoch_plan import EpochPlan
from qlora_lightning.data.batches.loader import FlatLoader
from qlora_lightning.data.report import Report
from qlora_lightning.data.samples import SampleSetBuilder


class CharTokenizer:
    """Each character is its code; `{` begins a turn and `}` ends it."""

    bos_token, bos_token_id = None, None
    all_special_ids = (ord("{"), ord("}"))
    added_tokens_decoder = {}  # noqa: RUF012

    def decode(self, ids, **kwargs):
        return "".join(map(chr, ids))

    def batch_decode(self, rows, **kwargs):
        return [self.decode(ids) for ids in rows]


@pytest.fixture
def characters():
    return CharTokenizer()


def cut_text(text):
    """Return ids and whether each is labelled: what is between < and > is."""
    prompt, _, answer = text.partition("<")
    answer, _, end = answer.partition(">")
    labelled = [False] * len(prompt) + [True] * len(answer) + [False] * len(end)
    return [ord(character) for character in prompt + answer + end], labelled


@pytest.fixture
def sample_set():
    """A set of texts, a token each character; one text a line from line 1."""

    def make(*texts, file="train.jsonl", lines=None):
        builder = SampleSetBuilder()
        for number, (ids, labelled) in enumerate(map(cut_text, texts)):
            labels = [one if counts else -100 for one, counts in zip(ids, labelled, strict=True)]
            builder.add(ids, labels, number, 0, file, lines[number] if lines else number + 1)
        return builder.build()

    return make


def options(**asked):
    usual = {"split": None, "row": [], "longest": False, "shortest": False, "search": None}
    return argparse.Namespace(**{**usual, **asked})


@pytest.fixture
def inspection(sample_set, characters):
    """What is shown of texts by split, as `sample_set` takes them; `reports` are what else became of their rows."""

    def make(reports=None, trainer=None, asked=None, **texts):
        texts = texts or {"train": ["{one}<1}>", "{two}<2}>", "{three}<3}>"]}
        samples = {split: sample_set(*of_split, file=f"{split}.jsonl") for split, of_split in texts.items()}
        found = {split: Report(split, rows=len(each), formats=["alpaca"]) for split, each in samples.items()}
        for split, report in found.items():
            report.count_samples(samples[split])
            vars(report).update((reports or {}).get(split, {}))
        data = SimpleNamespace(
            samples=samples,
            reports=found,
            tokenizer=characters,
            stop_ids=[ord("}")],
            **{"max_length": 512, "too_long": "truncate", "train_on": "assistant", "val_fraction": None},
            **{"reasoning": "template", "deduplicate": False, "shuffle": True, "batch_size": 2, "streaming": False},
            sources=lambda split: [],
            setup=lambda: None,
            train_dataloader=lambda: FlatLoader(EpochPlan(samples["train"], 2)),
        )
        settings = SimpleNamespace(init_args={"tokenizer": "letters"})
        config = Config("c.yaml", settings, {}, {"devices": 1, **(trainer or {})}, 42)
        return inspect_data(data, config, options(**(asked or {})))

    return make
