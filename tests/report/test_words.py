import json

import pytest

from qlora_lightning.report.run import read_run
from qlora_lightning.report.words import (
    headline,
    machine_facts,
    training_facts,
    version_facts,
    word_seconds,
    word_subject,
)


def test_the_headline_shows_before_and_after(make_run):
    assert headline(read_run(make_run())) == [
        ("2.000 → 0.450", "validation loss, base → adapter"),
        ("90.0%", "token accuracy, validation"),
        ("20 of 40", "optimizer steps"),
        ("90 s", "wall time of the fit"),
        ("60", "tokens/s, median"),
        ("1.5 GiB", "peak memory, with loading"),
    ]


def test_the_headline_shows_the_score_that_counts_most_and_names_test_rows(make_run):
    folder = make_run()
    metrics = {"loss": {"base": {"value": 2.0}, "mine": {"value": 0.5}}, "rouge_l": {"mine": {"value": 0.5}}}
    metrics["numeric_match"] = {"base": {"value": 0.02}, "mine": {"value": 0.25}}
    evaluation = {"metrics": metrics, "scores": ["numeric_match", "rouge_l"], "split": "val"}
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    assert headline(read_run(folder))[:2] == [
        ("2.000 → 0.500", "validation loss, base → adapter"),
        ("2% → 25%", "numeric match, base → adapter"),
    ]
    later = {**evaluation, "rows": 3, "adapters": {"mine": str(folder / "adapter")}}
    (folder / "evaluation.json").write_text(json.dumps(later))
    assert headline(read_run(folder))[0] == ("2.000 → 0.500", "loss of 3 validation rows, base → adapter")
    assert ("0.550", "validation loss, best") in headline(read_run(folder))
    (folder / "evaluation.json").write_text(json.dumps({**evaluation, "split": "test"}))
    assert headline(read_run(folder))[:3] == [
        ("2.000 → 0.500", "test loss, base → adapter"),
        ("2% → 25%", "numeric match, base → adapter"),
        ("0.550", "validation loss, best"),
    ]


def test_the_subject_is_a_sentence(make_run):
    assert word_subject(read_run(make_run())) == ("LoRA of rank 8 on package:tiny, trained on rows.jsonl (12 rows).")
    assert word_subject(read_run(make_run("b", manifest=False))) == (
        "LoRA of rank 8 on package:tiny, trained on rows.jsonl."
    )


def test_training_is_told_with_its_settings(make_run):
    facts = dict(training_facts(read_run(make_run())))
    assert facts["base"] == "package:tiny, nf4 with double quantization"
    assert facts["adapter"] == (
        "rank 8, alpha 16, dropout 0.0, on q_proj of 2 layers: 1,000 of 50,000 parameters (2.00%)"
    )
    assert facts["trained"] == "20 optimizer steps, 2,000 tokens, 500 labelled tokens"
    assert facts["optimization"] == "learning_rate 0.001, gradient_clip_val 1.0"
    assert facts["batches"] == "batch_size 4"
    assert facts["length"] == "max_epochs 1"
    assert facts["best checkpoint"] == "step-000020.ckpt, val_loss 0.5000"


def test_what_is_beyond_plain_training_is_told(make_run):
    stopping = {"class_path": "lightning.pytorch.callbacks.EarlyStopping", "init_args": {"monitor": "val_loss"}}
    config = {
        "model": {"base": "tiny", "adapter": "runs/b/adapter", "neftune_alpha": 5.0, "loraplus_ratio": 16},
        "trainer": {"callbacks": [stopping, {"class_path": "mine.Printer"}]},
        "ema": {"enabled": None, "decay": 0.9},
    }
    run = read_run(make_run(config=config, stopped_early="val_loss did not improve."))
    facts = dict(training_facts(run))
    assert facts["began from"] == "runs/b/adapter"
    assert facts["stopped early"] == "val_loss did not improve."
    assert facts["extras"] == (
        "NEFTune alpha 5.0, LoRA+ ratio 16, EMA decay 0.9, EarlyStopping (monitor val_loss), Printer"
    )
    assert "on package:tiny, going on from runs/b/adapter, trained on" in word_subject(run)
    config["ema"]["enabled"] = False
    assert "EMA" not in dict(training_facts(read_run(make_run("b", config=config))))["extras"]


def test_machine_and_versions_are_told(make_run):
    folder = make_run()
    (folder / "plan.json").write_text('{"predicted": {"peak_bytes": 1073741824}, "measured": {}}')
    run = read_run(folder)
    assert dict(machine_facts(run)) == {
        **{"device": "A CPU, 16 GiB", "threads": "2 on 2 cores", "processes": "1 on 1 machine(s)"},
        **{"peak rss": "1.50 GiB", "peak, predicted": "1.00 GiB"},
    }
    assert dict(version_facts(run)) == {
        **{"fingerprint of the base": "ab" * 8, "hash of train": "cd" * 8, "seed": "42"},
        **{"git": "1234567890abcdef on main, with changes", "packages": "torch 2.13.0", "python": "3.11.9 on Linux"},
    }


def test_what_a_manifest_does_not_tell_is_left_out(make_run):
    folder = make_run()
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest |= {"adapter": {"rank": 8, "alpha": None}, "parameters": {}, "python": None}
    manifest["data"]["files"] = {"train": "rows.jsonl", "val": None}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    facts = dict(training_facts(read_run(folder)))
    assert facts["adapter"] == "rank 8"
    assert (facts["train"], "val" in facts) == ("rows.jsonl", False)
    assert "python" not in dict(version_facts(read_run(folder)))


@pytest.mark.parametrize(("seconds", "words"), [(42.4, "42 s"), (250, "4.2 min"), (900, "15 min"), (12_600, "3.5 h")])
def test_durations_are_short(seconds, words):
    assert word_seconds(seconds) == words
