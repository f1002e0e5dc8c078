"""Preferences: rows of every shape, the objectives of the papers, and what holds for every run."""

import itertools
import json
import math
import shutil
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from qlora_lightning import InstructionDataModule, PreferenceDataModule, PreferenceModule, QLoRAModule
from qlora_lightning.cli import main
from qlora_lightning.model.preferences import KTOModule
from tests import steps
from tests.data.conftest import TEMPLATES
from tests.equality import metrics
from tests.errors import rejects
from tests.rows import write_rows
from tests.steps import assert_same_step, loss_and_gradients, make_trainer, trainable_tensors

ROWS = [
    {
        "prompt": f"Count to {n}.",
        "chosen": " ".join(map(str, range(1, n + 1))),
        "rejected": "No." if n % 2 else "I would rather not " * (n // 2),
    }
    for n in range(1, 13)
]


def make_data(tmp_path, tokenizer, rows=ROWS, **options):
    file = str(write_rows(tmp_path / "train.jsonl", rows))
    data = PreferenceDataModule(train=file, val=file, tokenizer=str(tokenizer), **{"batch_size": 4} | options)
    data.setup("fit")
    return data


make_module = partial(steps.make_module, cls=PreferenceModule)

# ---- rows ------------------------------------------------------------------------------------------------------------

ASKED, GOOD, BAD = (
    [{"role": role, "content": content}]
    for role, content in (("user", "Hi?"), ("assistant", "Hello."), ("assistant", "No"))
)
ROLES = {"customer": "user", "agent": "assistant"}


def by_name(messages):
    names = {role: name for name, role in ROLES.items()}
    return [{"from": names[message["role"]], "value": message["content"]} for message in messages]


@pytest.mark.parametrize(
    ("row", "options"),
    [
        ({"q": "Hi?", "yes": "Hello.", "no": "No"}, {"columns": {"q": "prompt", "yes": "chosen", "no": "rejected"}}),
        ({"chosen": by_name(ASKED + GOOD), "rejected": by_name(ASKED + BAD)}, {"roles": ROLES}),
    ],
    ids=["columns", "roles"],
)
def test_columns_and_roles_of_other_names_give_the_same_pair(tmp_path, smollm2_folder, row, options):
    found = make_data(tmp_path, smollm2_folder, [row], **options)
    (batch,) = found.train_dataloader()
    tokenizer, ids, labels = found.tokenizer, batch["input_ids"][0], batch["labels"][0]
    first, second = batch["cu_seqlens"].diff().tolist()
    texts = [tokenizer.decode(part) for part in ids.split([first, second])]
    trained = [tokenizer.decode(part[part >= 0]) for part in labels.split([first, second])]
    prompt = tokenizer.apply_chat_template(ASKED, tokenize=False, add_generation_prompt=True)
    assert texts == [f"{prompt}Hello.<|im_end|>\n"[: len(texts[0])], f"{prompt}No<|im_end|>\n"[: len(texts[1])]]
    assert trained == ["Hello.<|im_end|>", "No<|im_end|>"]
    assert batch["position_ids"][0].tolist() == [*range(first), *range(second)]
    assert batch["row_ids"].tolist() == [0, 0]


VERDICT = {"prompt": "Count.", "completion": "1", "label": True}


@pytest.mark.parametrize(
    ("rows", "options", "fact"),
    [
        ([{"chosen": "a", "rejected": "b"}], {}, "train.jsonl:1: a preference row needs a prompt"),
        ([{**ROWS[0], "instruction": "Who?"}], {}, "train.jsonl:1: has two prompts beside 'chosen' and 'rejected'"),
        ([ROWS[0], {"prompt": "a", "chosen": "b", "rejected": "b"}], {}, "train.jsonl:2: 'chosen' and 'rejected' are"),
        ([{"chosen": ASKED + GOOD, "rejected": [{**ASKED[0], "content": "Who?"}, *BAD]}], {}, "different prompts"),
        ([{"prompt": "q", "chosen": json.dumps(GOOD), "rejected": "b"}], {}, "'chosen' is a list of messages as text"),
        ([{"prompt": ASKED + GOOD, "chosen": "a", "rejected": "b"}], {}, "prompt ends with an assistant's message"),
        (ROWS, {"train_on": "all"}, "'all'"),
        ([ROWS[0], VERDICT], {}, "train.jsonl:2: two answers to compare and answers with a label"),
        ([{**VERDICT, "label": 1}], {}, "train.jsonl:1: 'label' must be true or false, found 1"),
    ],
)
def test_rows_that_are_neither_pairs_nor_verdicts_are_named(tmp_path, smollm2_folder, rows, options, fact):
    with rejects("data.train_on" if options else "rows.bad", fact):
        make_data(tmp_path, smollm2_folder, rows, **options)


ASKED_ON = [*ASKED, {**GOOD[0], "reasoning_content": "A greeting."}, *ASKED]
QWEN3 = str(TEMPLATES / "qwen3.jinja")  # earlier reasoning is left out


@pytest.mark.parametrize("template", [pytest.param("chatml", marks=pytest.mark.slow), pytest.param(QWEN3, id="qwen3")])
def test_a_function_gives_the_same_pair_as_a_row(tmp_path, smollm2_folder, monkeypatch, template):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_pairs.py").write_text("def read(row):\n    return row['good'], row['bad']\n")
    one, other = ASKED_ON + GOOD, ASKED_ON + BAD
    implicit = make_data(tmp_path, smollm2_folder, [{"chosen": one, "rejected": other}], chat_template=template)
    options = {"format": "my_pairs.read", "chat_template": template}
    own = make_data(tmp_path, smollm2_folder, [{"good": one, "bad": other}], **options)
    assert own.samples["train"].content_hash == implicit.samples["train"].content_hash
    for bad, fact in ((one, "are the same"), (ASKED_ON, "one has no answer")):
        with rejects("rows.bad", fact):
            make_data(tmp_path, smollm2_folder, [{"good": one, "bad": bad}], **options)


def test_a_pair_that_cannot_be_compared_is_left_out_with_its_reason(tmp_path, smollm2_folder, caplog):
    turns = {"chosen": ASKED + GOOD + ASKED + GOOD, "rejected": ASKED + BAD + ASKED + BAD}
    with rejects("rows.untrained", "1 of 2 rows", "; 1: the chat template makes several samples of an answer"):
        make_data(tmp_path, smollm2_folder, [ROWS[0], turns], chat_template=QWEN3)
    alike = {"prompt": "Count.", "chosen": "1 " * 40 + "2", "rejected": "1 " * 40 + "3"}
    long = {"prompt": "Count. " * 40, "chosen": "1", "rejected": "2 " * 20}
    data = make_data(tmp_path, smollm2_folder, [ROWS[0], alike, long], max_length=56)
    assert data.samples["train"].row_ids.tolist() == [0]
    assert "1 row dropped: their two answers are the same within max_length" in caplog.text
    assert "1 row dropped: their prompt is too long for the two answers to share" in caplog.text


# ---- objectives ------------------------------------------------------------------------------------------------------


def plain_log_probs(model, batch):
    """Log-probabilities and labeled tokens of each sample, which comes alone, by transformers' forward."""
    found, bounds = [], batch["cu_seqlens"].tolist()
    for start, end in itertools.pairwise(bounds):
        ids, labels = (batch[name][:, start:end] for name in ("input_ids", "labels"))
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1].log_softmax(-1)
        there = labels[0, 1:] != -100
        found.append((logits[there, labels[0, 1:][there]].sum(), int(there.sum())))
    log_probs, counts = zip(*found, strict=True)
    return torch.stack(log_probs).view(-1, 2), torch.tensor(counts).view(-1, 2)


def gradients_of(loss, module):
    return torch.cat([each.flatten() for each in torch.autograd.grad(loss, list(trainable_tensors(module).values()))])


def ahead(values):
    """How far the chosen answer of each pair is ahead of the rejected one."""
    return values[:, 0] - values[:, 1]


FORMULAS = {  # of an objective and the share of imitation
    # -log σ(β (log π(c)/π_ref(c) - log π(r)/π_ref(r)))
    ("dpo", 0.0): lambda own, ref, counts: -F.logsigmoid(0.1 * ahead(own - ref)),
    # and λ times the NLL per token of chosen
    ("dpo", 0.5): lambda own, ref, counts: -F.logsigmoid(0.1 * ahead(own - ref)) - 0.5 * (own / counts)[:, 0],
    # (log-ratio per token of chosen minus that of rejected, minus 1 / 2β)²
    ("ipo", 0.0): lambda own, ref, counts: (ahead((own - ref) / counts) - 5.0) ** 2,
    # -log σ(β (log π(c)/|c| - log π(r)/|r|) - γ)
    ("simpo", 0.0): lambda own, ref, counts: -F.logsigmoid(2.0 * ahead(own / counts) - 1.0),
    # NLL per token of chosen - λ log σ(log odds(c) - log odds(r)), odds = p / (1 - p)
    ("orpo", 0.0): lambda own, ref, counts: (
        -(own / counts)[:, 0] - 0.1 * F.logsigmoid(ahead(torch.logit((own / counts).exp())))
    ),
}


@pytest.mark.parametrize(("objective", "sft_share"), FORMULAS)
def test_loss_and_gradients_are_those_of_the_papers(tmp_path, tiny_base, objective, sft_share):
    batch = next(iter(make_data(tmp_path, tiny_base).train_dataloader()))
    module = make_module(tiny_base, objective=objective, sft_share=sft_share, quantization="none")
    own, counts = plain_log_probs(module.model, batch)
    with torch.no_grad(), module.model.disable_adapter():
        reference, _ = plain_log_probs(module.model, batch)
    losses = FORMULAS[objective, sft_share](own, reference, counts)
    expected = float(losses.detach().mean()), gradients_of(losses.sum(), module)
    assert_same_step(loss_and_gradients(module, batch), expected)
    sums = module.compute_loss(batch)
    assert sums.count == 4
    rewards = 0.1 * (own - reference) if objective in ("dpo", "ipo") else module.beta * own / counts
    assert sums.metrics["reward_accuracy"] == (rewards[:, 0] > rewards[:, 1]).sum()
    torch.testing.assert_close(sums.metrics["chosen_reward"], rewards[:, 0].sum().detach(), rtol=1e-5, atol=1e-5)


def test_the_reference_of_a_run_from_an_adapter_is_that_adapter_without_dropout(tmp_path, tiny_base):
    start = make_module(tiny_base, dropout=0.5).eval()
    start.save_adapter(tmp_path / "start")
    batch = next(iter(make_data(tmp_path, tiny_base).train_dataloader()))
    module = make_module(tiny_base, adapter=str(tmp_path / "start"))
    trained = set(trainable_tensors(module))
    with module.model.disable_adapter(), torch.no_grad():  # as the base is evaluated
        own, _ = plain_log_probs(module.model, batch)
        base = module.compute_loss(batch)
    rewards = 0.1 * (own - plain_log_probs(start.model, batch)[0])
    torch.testing.assert_close(base.metrics["chosen_reward"], rewards[:, 0].sum().detach(), rtol=1e-4, atol=1e-6)
    first, second = module.compute_loss(batch), module.compute_loss(batch)
    assert first.loss_sum != second.loss_sum  # what is trained drops inputs
    sums = module.eval().compute_loss(batch)
    module.train()
    assert float(sums.loss_sum.detach()) == pytest.approx(4 * math.log(2), rel=1e-6)  # nothing is ahead of anything
    assert set(trainable_tensors(module)) == trained
    sums.loss_sum.backward()
    assert all(tensor.grad.abs().sum() > 0 for name, tensor in trainable_tensors(module).items())


@pytest.mark.parametrize("options", [{"trainable_token_indices": [5, 6]}, {"modules_to_save": ["norm"]}], ids=str)
def test_in_bf16_a_run_starts_exactly_at_its_reference_which_does_not_train(tmp_path, tiny_base, options):
    steps.make_module(tiny_base, compute_dtype="bf16", lora_options=options).save_adapter(tmp_path / "start")
    module = make_module(tiny_base, adapter=str(tmp_path / "start"), compute_dtype="bf16")
    data = make_data(tmp_path, tiny_base)
    sums = module.compute_loss(next(iter(data.train_dataloader())))
    assert sums.metrics["chosen_reward"] == sums.metrics["rejected_reward"] == 0
    make_trainer(tmp_path, max_steps=1, limit_val_batches=0).fit(module, data)  # which rejects tensors of the base


# ---- answers with a verdict ------------------------------------------------------------------------------------------

VERDICTS = [
    {"prompt": row["prompt"], "completion": row["rejected" if n % 3 == 1 else "chosen"], "label": n % 3 != 1}
    for n, row in enumerate(ROWS)
]


def test_the_last_answer_is_trained_with_the_verdict_of_a_column_or_a_function(tmp_path, smollm2_folder, monkeypatch):
    rows = [{"prompt": ASKED + BAD + ASKED, "completion": GOOD, "good": "true"}]
    (batch,) = make_data(tmp_path, smollm2_folder, rows, columns={"good": "label"}).train_dataloader()
    assert (int((batch["labels"] >= 0).sum()), batch["desirable"].tolist()) == (3, [True])  # Hello . <|im_end|>
    assert "pairs" not in batch
    rows = [{**VERDICTS[0], "label": label, "chosen": None, "rejected": None} for label in ("True", False)]
    (batch,) = make_data(tmp_path, smollm2_folder, rows, deduplicate=False).train_dataloader()
    assert sorted(batch["desirable"].tolist()) == [False, True]
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_verdicts.py").write_text("def read(row):\n    return row['turns'], row['stars'] > 3\n")
    rows = [{"turns": ASKED + GOOD + ASKED + BAD, "stars": stars} for stars in (2, 5)]
    data = make_data(tmp_path, smollm2_folder, rows, format="my_verdicts.read")
    (batch,) = data.train_dataloader()
    labels = batch["labels"][0]
    assert data.tokenizer.decode(labels[labels >= 0]) == "No<|im_end|>" * 2
    assert sorted(batch["desirable"].tolist()) == [False, True]


@pytest.mark.parametrize(
    ("make", "data", "rows", "key"),
    [
        (PreferenceModule, InstructionDataModule, [{"prompt": "a", "completion": "b"}], "data.class_path"),
        (QLoRAModule, PreferenceDataModule, ROWS, "data.class_path"),
        (KTOModule, partial(PreferenceDataModule, batch_size=1), VERDICTS, "data.batch_size"),
        (KTOModule, partial(PreferenceDataModule, batch_size=None, tokens_per_batch=64), VERDICTS, "data.batch_size"),
        (KTOModule, PreferenceDataModule, ROWS, "model.objective"),
        (PreferenceModule, PreferenceDataModule, VERDICTS, "model.objective"),
    ],
)
def test_module_and_data_must_be_of_the_same_kind(tmp_path, tiny_base, make, data, rows, key):
    with rejects(key):
        data = data(train=str(write_rows(tmp_path / "rows.jsonl", rows)))
        make_trainer(tmp_path, max_steps=1).fit(make(str(tiny_base)), data)


def other_answers(batch):
    """The batch with each answer at the prompt of the next row, and the last one's at the first."""
    rows = [
        (batch["input_ids"][0, start:end].tolist(), batch["labels"][0, start:end].tolist())
        for start, end in itertools.pairwise(batch["cu_seqlens"].tolist())
    ]
    begins = [next(at for at, label in enumerate(labels) if label != -100) for _, labels in rows]
    mixed = [
        [values[:begin] + rows[at - 1][part][begins[at - 1] :] for part, values in enumerate(row)]
        for at, (row, begin) in enumerate(zip(rows, begins, strict=True))
    ]
    ids, labels = (torch.tensor([list(itertools.chain(*each))]) for each in zip(*mixed, strict=True))
    bounds = torch.tensor([0, *itertools.accumulate(len(own) for own, _ in mixed)])
    return {"input_ids": ids, "labels": labels, "cu_seqlens": bounds}


@pytest.mark.parametrize(("shares", "weight"), [((None, None), 1.5), ((2, 2), 2.0)])
def test_loss_and_gradients_of_kto_are_the_papers_however_a_batch_is_cut(
    tmp_path, tiny_base, monkeypatch, shares, weight
):
    data = make_data(tmp_path, tiny_base, VERDICTS)
    batch = next(iter(data.train_dataloader()))
    module = make_module(tiny_base, objective="kto", quantization="none")
    verdicts, source = np.array([True, True, True, False, False]), np.array([0, 0, 1, 1, 1])  # of the training rows
    data.samples["train"] = SimpleNamespace(desirable=verdicts, source=source)
    data.sample_sources["train"] = [SimpleNamespace(weight=share) for share in shares]
    monkeypatch.setattr("qlora_lightning.model.preferences.datamodule_of", lambda trainer: data)
    own, others = plain_log_probs(module.model, batch)[0].flatten(), other_answers(batch)
    with torch.no_grad():
        mixed = plain_log_probs(module.model, others)[0].flatten()
        with module.model.disable_adapter():
            reference, mixed_reference = (plain_log_probs(module.model, each)[0].flatten() for each in (batch, others))
    kl = (mixed - mixed_reference).mean().clamp(min=0)
    value = torch.sigmoid(0.1 * torch.where(batch["desirable"], own - reference - kl, kl - own + reference))
    loss = (torch.where(batch["desirable"], 1.0, weight) * (1 - value)).sum()
    expected = float((1 - value.detach()).sum()), gradients_of(loss, module)  # logged without weights
    for tokens in (8192, 1):  # all at once; each row alone
        module.token_budget.tokens = tokens
        parts = [module.compute_loss(part) for part in module.cutter.cut(module.prepare_batch(batch))]
        assert len(parts) == (1 if tokens > 1 else 4)
        total = sum(sums.loss_sum for sums in parts)
        assert_same_step((float(total.detach()), gradients_of(total, module)), expected)
        assert sum(float(sums.metrics["kl"]) for sums in parts) == pytest.approx(4 * float(kl), rel=1e-4, abs=1e-4)


# ---- a run -----------------------------------------------------------------------------------------------------------


CONFIG = """
model:
  {class_path: qlora_lightning.PreferenceModule, base: tiny, rank: 4, learning_rate: 0.005, schedule: constant}
data:
  {class_path: qlora_lightning.PreferenceDataModule, train: train.jsonl, val: train.jsonl, batch_size: 2}
trainer: {accelerator: cpu, max_epochs: 2, enable_progress_bar: false, accumulate_grad_batches: 2}
"""


@pytest.fixture
def config(tmp_path, tiny_base, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "train.jsonl", ROWS)
    (tmp_path / "tiny").symlink_to(tiny_base)
    (tmp_path / "config.yaml").write_text(CONFIG)
    return ["--config", "config.yaml"]


@pytest.mark.parametrize(
    ("objective", "rows", "least"), [("dpo", ROWS, 1.0), pytest.param("kto", VERDICTS, 0.8, marks=pytest.mark.slow)]
)
def test_a_run_prefers_what_it_is_shown(config, tmp_path, objective, rows, least):
    write_rows(tmp_path / "train.jsonl", rows)
    options = ["--model.objective", objective, "--evaluation", "null", "--trainer.default_root_dir", "whole"]
    assert main(["fit", *config, *options]) == 0
    accuracies, margins = (metrics(tmp_path / "whole", name) for name in ("val_reward_accuracy", "val_margin"))
    assert accuracies[-1] >= least
    assert margins[-1] > margins[0]
    assert metrics(tmp_path / "whole", "val_token_accuracy") == []
    assert all(rate > 0 for rate in metrics(tmp_path / "whole", "rows_per_second"))
    progress = json.loads((tmp_path / "whole" / "manifest.json").read_text())["progress"]
    assert progress["rows"] == 2 * len(rows)  # epochs


@pytest.mark.slow
def test_a_run_on_an_adapter_is_evaluated_against_where_it_started(config, tmp_path):
    first = ["--trainer.default_root_dir", "first", "--evaluation", "null"]
    assert main(["fit", *config, *first, "--model.objective", "orpo"]) == 0
    then = ["--model.adapter", "first", "--trainer.default_root_dir", "then", "--evaluation.rows", "2"]
    assert main(["fit", *config, *then, "--evaluation.max_new_tokens", "4"]) == 0
    found = json.loads((tmp_path / "then" / "evaluation.json").read_text())["metrics"]["loss"]
    assert found["adapter"]["value"] < math.log(2)
    assert found["base"]["value"] != pytest.approx(math.log(2), abs=1e-3)
    assert main(["evaluate", "--config", "then/config.yaml", "--json", "again.json"]) == 0
    assert json.loads((tmp_path / "again.json").read_text())["metrics"]["loss"] == found
    assert main(["validate", "--config", "then/config.yaml"]) == 0


@pytest.mark.slow
def test_a_resume_against_another_reference_is_rejected(config, tmp_path, capsys):
    fit = ["fit", *config, "--evaluation", "null", "--trainer.max_steps", "1"]
    for name in ("one", "other"):
        options = ["--seed_everything", str(len(name)), "--trainer.default_root_dir", name]
        assert main([*fit, *options]) == 0
    run = [*fit, "--model.adapter", "one/adapter", "--trainer.default_root_dir", "run", "--ckpt_path", "last"]
    assert main(run) == 0
    shutil.copytree(tmp_path / "other" / "adapter", tmp_path / "one" / "adapter", dirs_exist_ok=True)
    assert main([*run, "--trainer.max_steps", "2"]) == 2
    assert "was trained against another reference" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("objective", "rows", "words"),
    [
        ("dpo", ROWS, ["train.jsonl:1  chosen: ", "train.jsonl:1  rejected: "]),
        ("kto", VERDICTS, [" answers desirable", "train.jsonl:1  desirable: ", "train.jsonl:2  undesirable: "]),
    ],
)
def test_inspect_shows_each_answer_and_what_it_is(config, tmp_path, capsys, monkeypatch, objective, rows, words):
    monkeypatch.setenv("COLUMNS", "200")
    write_rows(tmp_path / "train.jsonl", rows)
    assert main(["inspect", *config, "--model.objective", objective]) == 0
    printed = capsys.readouterr().out
    assert [each for each in words if each not in printed] == []


@pytest.mark.slow
def test_base_and_adapter_are_compared_by_which_answer_is_likelier(config, tmp_path, capsys):
    write_rows(tmp_path / "val.jsonl", ROWS[::-1])  # each has a reference of its own
    fit = ["fit", *config, "--data.val", "val.jsonl", "--trainer.default_root_dir", "run", "--trainer.max_epochs", "6"]
    assert main([*fit, "--evaluation.rows", "2", "--evaluation.max_new_tokens", "4"]) == 0
    found = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    accuracy = found["metrics"]["preference_accuracy"]
    assert "perplexity" not in found["metrics"]
    assert found["metrics"]["loss"]["base"]["value"] == pytest.approx(math.log(2), rel=1e-5)
    assert accuracy["adapter"]["value"] > accuracy["base"]["value"]
    assert accuracy["adapter"]["low"] < accuracy["adapter"]["value"]
    assert "By preference accuracy, the adapter is better on" in capsys.readouterr().out
    won = (accuracy["adapter"]["value"] - accuracy["base"]["value"]) * len(ROWS)
    compared = found["comparisons"]["adapter"]
    assert len(compared["wins"]) - len(compared["losses"]) == pytest.approx(won)
    assert main(["report", "run", "--json", "report.json"]) == 0
    (reported,) = json.loads((tmp_path / "report.json").read_text())["runs"]
    assert reported["results"]["preference_accuracy"] == accuracy["adapter"]["value"]
    page = (tmp_path / "run" / "report.html").read_text()
    assert all(words in page for words in ("preference accuracy", "mean over rows"))
    assert main(["evaluate", "--config", "run/config.yaml", "--json", "again.json"]) == 0
    again = json.loads((tmp_path / "again.json").read_text())
    assert again["metrics"] == {name: found["metrics"][name] for name in again["metrics"]}
    assert again["metrics"]["loss"]["adapter"]["value"] < math.log(2)
