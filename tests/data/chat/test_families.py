"""Real chat templates of families: what is trained is the answer, behind what generation begins with; or a clear error.

The templates are those that the package `trl` carries, as their models publish them, and three beside these tests. Each
has a tiny tokenizer, with the control tokens that occur in it and the stop tokens of its models.
"""

import itertools
import re

import pytest

from qlora_lightning import UserError
from tests.data.conftest import FAMILIES, prepare_rows
from tests.packed import unpack

CALL = {"name": "add", "arguments": {"one": 7, "two": "of them"}}
FUNCTION = {"name": "add", "description": "Adds.", "parameters": {"type": "object", "properties": {}}}
TOOLS = [{"type": "function", "function": FUNCTION}]


def ask(content):
    return {"role": "user", "content": content}


def answer(content, reasoning=None, calls=()):
    message = {"role": "assistant", "content": content}
    message |= {"reasoning_content": reasoning} if reasoning else {}
    return message | ({"tool_calls": [{"type": "function", "function": call} for call in calls]} if calls else {})


def result(content):
    return {"role": "tool", "name": "add", "content": content}


SYSTEM = {"role": "system", "content": "Be brief."}
ROWS = {
    "turns": [ask("first?"), answer("\nYes é🙂"), ask("second? "), answer("No\n\n"), ask("third?"), answer("Maybe.")],
    "system": [SYSTEM, *(turn for text in "abcde" for turn in (ask(f"{text}?"), answer(f"Answer {text}.")))],
    "marked": [ask("first?"), {**answer("Yes."), "train": False}, ask("second?"), answer("No.")],
    "reasoning": [ask("first?"), answer("Yes.", "Hm."), ask("second?"), answer("No.", "So, so.")],
    "blocks": [
        *(ask("first?"), answer("<think>\nHm.\n</think>\n\nYes.")),
        *(ask("second?"), answer("<think>\nSo, so.\n</think>\n\nNo.")),
    ],
    "early": [ask("first?"), answer("Yes.", "Hm."), ask("second?"), answer("No.")],
    "unused": [ask("first?"), answer("Yes.")],
    "call": [ask("first?"), answer("", None, [CALL]), result("12"), answer("Twelve."), ask("second?"), answer("No.")],
    "thought call": [ask("first?"), answer("", "Hm.", [CALL]), result("12"), answer("Twelve.", "So, so.")],
    "told call": [ask("first?"), answer("I add.", None, [CALL]), result("12"), answer("Twelve.")],
    "two calls": [
        *(ask("first?"), answer("", None, [CALL, {"name": "add", "arguments": {"one": 8, "two": "more"}}])),
        *(result("12"), result("13"), answer("Twelve.")),
    ],
}
WITH_TOOLS = ("unused", "call", "thought call", "told call", "two calls")
SETTINGS = [  # and the rows on which they make a difference
    ({}, ROWS),
    ({"train_on": "last"}, ("turns", "call", "thought call")),
]
# our own templates, and a family with the tokens that they take
PRESETS = {"llama3": "llama3_1", "chatml": "qwen2_5", "alpaca": "mistral"}
# rows that the templates of a family cannot write, or not as they generate them, under some of the settings
REJECTED = {
    **dict.fromkeys(("cohere", "cohere2", "deepseek_r1_distill", "deepseekv3", "gemma3", "llama3"), WITH_TOOLS),
    **dict.fromkeys(("phi3", "phi3_5", "qwen2_5_vl", "idefics3", "llava_next", "smolvlm"), WITH_TOOLS),
    **dict.fromkeys(("llama2", "mistral_v3", "preset alpaca", "preset llama3"), WITH_TOOLS),
    **dict.fromkeys(("gemma", "mistral"), ("system", *WITH_TOOLS)),
    **dict.fromkeys(("gemma4", "gemma4_v3", "gemma4_v4"), ("reasoning", "blocks", "early", "thought call")),
    "gemma4_v2": ("thought call",),  # writes the reasoning behind the call
    "gemma4_v5": ("told call",),
    "gptoss": ("two calls",),
    "lfm2": ("call", "thought call", "told call", "two calls"),
    **dict.fromkeys(("llama3_1", "llama3_2"), ("thought call", "told call", "two calls")),
    "muse_glimmer": ("told call",),
    "qwen3_5_nothink": ("reasoning", "blocks", "early", "thought call"),
}


def trained(samples):
    """Return the sample, start and end of each stretch of labeled tokens, in the order of the conversation."""
    stretches = []
    for sample in samples:
        edges = [i for i in range(1, len(sample.ids)) if (sample.labels[i] < 0) != (sample.labels[i - 1] < 0)]
        edges += [len(sample.ids)] if len(edges) % 2 else []
        stretches += [(sample, *pair) for pair in zip(edges[::2], edges[1::2], strict=True)]
    return sorted(stretches, key=lambda stretch: stretch[1])


def parts_of(message):
    """Return the reasoning of an answer, and the other texts of a message in their order."""
    block, _, content = message["content"].rpartition("</think>")
    reasoning = message.get("reasoning_content") or block.removeprefix("<think>").strip()
    calls = [call["function"] for call in message.get("tool_calls", [])]
    values = [str(value) for call in calls for value in (call["name"], *call["arguments"].values())]
    return reasoning, [part for part in (content.strip(), *values) if part]


# of each line of models one template is quick
_SLOW = ("gemma4", "gemma4_v2", "gemma4_v3", "gemma4_v4", "lfm2_2_5", "lfm2_2_5_vl", "lfm2_v2", "llama3_2", "phi3_5")
_SLOW += ("nemotron_3_5_lightning", "nemotron_3_super", "nemotron_3_ultra", "qwen3_5_nothink", "qwen3_6", "qwen3_vl")
_NAMES = [pytest.param(each, marks=pytest.mark.slow) if each in _SLOW else each for each in sorted(FAMILIES)]


@pytest.mark.parametrize("name", [*_NAMES, *(f"preset {preset}" for preset in PRESETS)])
def test_what_is_trained_is_the_answer_behind_what_generation_begins_with(families, name):
    preset = name.removeprefix("preset ") if name.startswith("preset ") else None
    tokenizer, rejected = families[PRESETS.get(preset, name)], set()
    for settings, rows in SETTINGS:
        for row in rows:
            content = {"messages": ROWS[row], "tools": TOOLS if row in WITH_TOOLS else None}
            try:
                data = prepare_rows([content], tokenizer, chat_template=preset, **settings)
            except UserError as error:
                rejected |= {(row, error.key)}
                continue
            check(data, **content, **settings)
    assert rejected == {(row, "rows.bad") for row in REJECTED.get(name, ())}


def check(data, messages, tools, train_on="assistant"):
    tokenizer, renderer = data.tokenizer, data.renderer
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    wanted = [i for i in answers if messages[i].get("train", True)] if train_on == "assistant" else answers[-1:]
    for index, (sample, start, end) in zip(wanted, trained(unpack(data.samples["train"])), strict=True):
        text, before = tokenizer.decode(sample.ids[start:end]), tokenizer.decode(sample.ids[:start])
        assert [id in renderer.stop_ids for id in sample.ids[start:end]] == [False] * (end - start - 1) + [True], text
        thoughts, parts = parts_of(messages[index])
        expected = [thoughts] * bool(thoughts) + parts
        positions = [text.find(part) for part in expected]
        assert min(positions) >= 0, text
        assert len(expected) == len(parts) or positions[0] == min(positions), text  # reasoning comes first
        prompt = renderer.render_prompt(messages[:index], tools)
        if before == tokenizer.decode(prompt):
            assert sample.ids[:start] == prompt
        else:  # an empty block of reasoning is not trained
            assert not thoughts, text
            assert re.fullmatch(r"\s*(<think>)?\s*</think>\s*", before.removeprefix(tokenizer.decode(prompt))), before


FINAL = "<|channel|>final<|message|>Twelve.<|return|>⟧"  # gpt-oss writes an answer in two messages
NO_THINKING = {"template_options": {"enable_thinking": False}}
TRAINED = [  # a family, settings, a row, its samples, and its last answer: what is trained is in brackets
    ("cohere2", {}, "turns", 1, "<|START_RESPONSE|>⟦Maybe.<|END_RESPONSE|><|END_OF_TURN_TOKEN|>⟧"),
    ("deepseek_r1_distill", {}, "turns", 3, "<｜Assistant｜><think>\n\n</think>\n\n⟦Maybe.<｜end▁of▁sentence｜>⟧"),
    ("deepseek_r1_distill", {}, "reasoning", 2, "<think>\n⟦So, so.\n</think>\n\nNo.<｜end▁of▁sentence｜>⟧"),
    ("gemma4_v5", {}, "blocks", 2, "<|turn>model\n⟦<|channel>thought\nSo, so.\n<channel|>No.<turn|>⟧"),
    ("gemma4_v5", {}, "call", 1, "<|turn>model\n⟦No.<turn|>⟧"),
    ("glm4moe", {}, "turns", 1, "<|assistant|>\n<think></think>\n⟦Maybe.<|user|>⟧"),
    ("glm4moe", {}, "reasoning", 2, "<|assistant|>⟦\n<think>So, so.</think>\nNo.<|user|>⟧"),
    ("gptoss", {}, "turns", 3, "<|start|>assistant⟦<|channel|>final<|message|>Maybe.<|return|>⟧"),
    ("gptoss", {}, "thought call", 2, "⟦<|channel|>analysis<|message|>So, so.<|end|><|start|>assistant" + FINAL),
    ("lfm2_2_5", {}, "blocks", 2, "<|im_start|>assistant\n⟦<think>So, so.</think>No.<|im_end|>⟧"),
    ("llama3_1", {}, "turns", 1, "assistant<|end_header_id|>\n\n⟦Maybe.<|eot_id|>⟧"),
    ("llama3_1", {}, "blocks", 1, "assistant<|end_header_id|>\n\n⟦<think>\nSo, so.\n</think>\n\nNo.<|eot_id|>⟧"),
    ("mistral", {}, "turns", 1, "[INST] third? [/INST]⟦Maybe.</s>⟧"),
    ("muse_glimmer", {}, "turns", 1, "<|start|>assistant⟦ to=user<|message|>Maybe.<|eot|>⟧"),
    ("nemotron_3_nano", {}, "turns", 3, "assistant\n<think>\n</think>⟦Maybe.<|im_end|>⟧"),
    ("nemotron_3_nano", {}, "reasoning", 2, "assistant\n<think>\n⟦So, so.\n</think>\nNo.<|im_end|>⟧"),
    ("phi3", {}, "turns", 1, "<|assistant|>\n⟦Maybe.<|end|>⟧"),
    ("qwen2_5", {}, "reasoning", 1, "<|im_start|>assistant\n⟦<think>\nSo, so.\n</think>\n\nNo.<|im_end|>⟧"),
    ("qwen3", {}, "turns", 3, "<|im_start|>assistant\n<think>\n\n</think>\n\n⟦Maybe.<|im_end|>⟧"),
    ("qwen3", {}, "reasoning", 2, "<|im_start|>assistant\n⟦<think>\nSo, so.\n</think>\n\nNo.<|im_end|>⟧"),
    ("qwen3", NO_THINKING, "turns", 3, "<|im_start|>assistant\n<think>\n\n</think>\n\n⟦Maybe.<|im_end|>⟧"),
    ("qwen3_8", {}, "blocks", 1, "<|im_start|>assistant\n<think>\n⟦So, so.\n</think>\n\nNo.<|im_end|>⟧"),
]


@pytest.mark.parametrize(("family", "settings", "row", "n_samples", "expected"), TRAINED)
def test_the_last_answer(families, family, settings, row, n_samples, expected):
    tools = TOOLS if row in WITH_TOOLS else None
    data = prepare_rows([{"messages": ROWS[row], "tools": tools}], families[family], **settings)
    samples = unpack(data.samples["train"])
    sample, start, end = trained(samples)[-1]
    decode = data.tokenizer.decode
    assert f"{decode(sample.ids[:start])}⟦{decode(sample.ids[start:end])}⟧".endswith(expected)
    assert len(samples) == n_samples


FOLDED = "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nq [/INST]"
WHOLE = [  # a system prompt inside a question: a family, settings, and its samples
    ("llama2", {}, [f"<s>{FOLDED}⟦ a é🙂 </s>⟧<s>[INST] r [/INST]⟦ b </s>⟧"]),
    ("llama2", {"train_on": "last"}, [f"<s>{FOLDED} a é🙂 </s><s>[INST] r [/INST]⟦ b </s>⟧"]),
    ("llama2", {"train_on": "all"}, [f"<s>⟦{FOLDED} a é🙂 </s><s>[INST] r [/INST] b </s>⟧"]),
    (
        "mistral_v3",  # inside the last question that there is
        {},
        [
            "<s>[INST] Be brief.\n\nq [/INST]⟦ \na é🙂</s>⟧",
            "<s>[INST] q [/INST] \na é🙂</s>[INST] Be brief.\n\nr[/INST]⟦ b</s>⟧",
        ],
    ),
]


def show(decode, ids, labels):
    """The text of a sample, what is trained of it in brackets."""
    shown, end = "", 0
    for is_trained, run in itertools.groupby(label != -100 for label in labels):
        start, end = end, end + len(list(run))
        text = decode(ids[:end]).removeprefix(decode(ids[:start]))  # by itself a run would lose its first space
        shown += f"⟦{text}⟧" if is_trained else text
    return shown


@pytest.mark.parametrize(("family", "settings", "expected"), WHOLE)
def test_a_system_prompt_inside_a_question(families, family, settings, expected):
    messages = [SYSTEM, ask("q "), answer("\na é🙂"), ask("r"), answer("b")]
    data = prepare_rows([{"messages": messages}], families[family], **settings)
    assert [show(data.tokenizer.decode, *sample) for sample in unpack(data.samples["train"])] == expected


@pytest.mark.parametrize(
    ("family", "settings", "row", "is_told"),
    [
        ("qwen3_8", {}, "early", True),
        ("qwen3_8", {}, "reasoning", False),
        ("qwen3_8", NO_THINKING, "turns", False),
        ("qwen3", {}, "turns", False),  # generation chooses
        ("qwen2_5", {}, "turns", False),
    ],
)
def test_rows_without_the_reasoning_that_generation_begins_with_are_counted(families, family, settings, row, is_told):
    report = prepare_rows([{"messages": ROWS[row]}], families[family], **settings).reports["train"]
    assert report.unreasoned == is_told
    assert ("1 row with answers without reasoning" in report.describe()) == is_told
