"""What is trained of a row, by hand, and what is rejected since it would train otherwise."""

import copy

import pytest
from tokenizers import Tokenizer, normalizers
from tokenizers.processors import TemplateProcessing

from qlora_lightning import InstructionDataModule
from tests.data.conftest import render_row
from tests.errors import rejects


def render_one(tokenizer, row, tools=None, **settings):
    """The one sample of a conversation, or of another row."""
    row = {"messages": row, "tools": tools} if isinstance(row, list) else row
    (rendered,) = render_row(row, tokenizer, **settings)
    return rendered


def labelled(tokenizer, rendered):
    return tokenizer.decode([label for label in rendered.labels if label != -100])


@pytest.fixture
def chatml(families):
    """A copy that a test may change."""
    return copy.deepcopy(families["qwen2_5"])


def test_ids_and_labels_by_hand(characters, talk):
    ids, labels = render_one(characters, talk("q", "ok"))
    #      {    u   \n   q    }   \n   {   a   \n   o    k    }   \n
    assert ids == [123, 117, 10, 113, 125, 10, 123, 97, 10, 111, 107, 125, 10]
    assert labels == [-100] * 9 + [111, 107, 125] + [-100]
    assert InstructionDataModule(tokenizer=characters).renderer.render_prompt(talk("q")) == ids[:9]
    ids, labels = render_one(characters, talk("q", "\nk"))  # cut from the header: encoded as a whole it is 1010
    assert ids == [123, 117, 10, 113, 125, 10, 123, 97, 10, 10, 107, 125, 10]
    assert labels == [-100] * 9 + [10, 107, 125] + [-100]


def test_all_is_all_but_the_first_token(characters, talk):
    ids, labels = render_one(characters, talk("q", "ok"), train_on="all")
    assert (ids, labels) == ([123, 117, 10, 113, 125, 10, 123, 97, 10, 111, 107, 125, 10], [-100, *ids[1:]])
    conversation = [{"role": "system", "content": "b"}, *talk("q", "\nk", "r", "m")]
    ids, labels = render_one(characters, conversation, train_on="all")
    assert (characters.decode(ids), labels) == ("{s\nb}\n{u\nq}\n{a\n\nk}\n{u\nr}\n{a\nm}\n", [-100, *ids[1:]])


def test_the_reference_of_a_prediction_has_reasoning_and_calls_as_the_model_writes_them(chatml, write):
    call = {"type": "function", "function": {"name": "sky", "arguments": {"city": "Oslo"}}}
    answers = [{"content": "k", "reasoning_content": "Hm."}, {"content": "", "tool_calls": [call]}]
    turns = [[{"role": "user", "content": "q"}, {"role": "assistant", **answer}] for answer in answers]
    data = InstructionDataModule(predict=write("a.jsonl", [{"messages": each} for each in turns]), tokenizer=chatml)
    data.setup("predict")
    (batch,) = data.predict_dataloader()
    references = [prompt.reference for prompt in batch["prompts"]]
    expected = [
        "<think>\nHm.\n</think>\n\nk",
        '<tool_call>\n{"name": "sky", "arguments": {"city": "Oslo"}}\n</tool_call>',
    ]
    assert references == expected


def test_what_follows_the_last_answer_is_left_out_and_marks_do_not_contradict_settings(characters, talk):
    assert render_one(characters, talk("q", "a", "r")) == render_one(characters, talk("q", "a"))
    conversation = [*talk("q"), {"role": "assistant", "content": "a", "train": False}]
    with rejects("rows.bad", "`train_on: all`"):
        render_one(characters, conversation, train_on="all")


@pytest.mark.parametrize("form", ["NFC", "NFKC"])
def test_a_tokenizer_that_composes_characters_trains_the_same_answer(families, talk, form):
    """As Qwen's do: the tokens say another text than the row, and begin at other characters."""
    plain = families["qwen2_5"]
    backend = Tokenizer.from_str(plain.backend_tokenizer.to_str())
    backend.normalizer = getattr(normalizers, form)()
    tokenizer = type(plain)(tokenizer_object=backend, eos_token=plain.eos_token)
    tokenizer.chat_template = plain.chat_template
    conversation = talk("cafe\u0301 o\u0302\u0301?", "\n\ne\u0301 o\u0302\u0301 Ae\u0301", "e\u0301?", "ie\u0301")
    rendered = render_one(tokenizer, conversation)
    assert labelled(tokenizer, rendered) == "\n\né ố Aé<|im_end|>ié<|im_end|>"


# ---- templates that would train something else -----------------------------------------------------------------------

WITH_TOOLS = (
    "{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t | tojson }}{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
    "{% for call in m['tool_calls'] or [] %}CALL {{ call['function'] | tojson }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TURN = "{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}"
UPPER = TURN.replace("}{{ m['content'] }}<|im_end|>{", "}{{ m['content'] | upper }}<|im_end|>{")
ONE_HEADER = (
    "{% for m in messages %}{{ '<|im_start|>assistant\n' if loop.index0 == 1 }}{{ m['content'] }}{% endfor %}<|im_end|>"
    "{{ '<|im_start|>assistant\n' if add_generation_prompt }}"
)
OTHER_HEADER = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<|im_end|>{% endfor %}"


@pytest.mark.parametrize(
    ("template", "contents", "key", "fact"),
    [
        (TURN.replace("<|im_end|>", ""), "qa", "chat_template.stop_token", "'a'"),
        ("{% for message in %}", "qa", "rows.bad", "cannot render the conversation: TemplateSyntaxError"),
        ("{{ raise_exception('no system role') }}", "qa", "rows.bad", "TemplateError: no system role"),
        (OTHER_HEADER + "{% if add_generation_prompt %}Answer: {% endif %}", "qa", "rows.bad", "prefix-preserving"),
        (ONE_HEADER, "qarb", "rows.bad", "prefix-preserving"),
        (UPPER, "qA", "rows.bad", "message 1 (user)"),
        (UPPER, "Qa", "rows.bad", "changes the answer (message 2)"),
        (None, "qa", "data.chat_template", "chatml"),
    ],
)
def test_a_template_that_would_train_something_else_is_rejected(chatml, talk, template, contents, key, fact):
    chatml.chat_template = template
    with rejects(key, fact):
        render_one(chatml, talk(*contents))


def test_a_prompt_that_its_question_changes_is_found_between_others(chatml, talk):
    end = "<|im_start|>assistant\n{% if '/no_think' in messages[-1]['content'] %}<think>\n\n</think>\n\n{% endif %}"
    header = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    chatml.chat_template = f"{header}{{% if add_generation_prompt %}}{end}{{% endif %}}"
    assert labelled(chatml, render_one(chatml, talk(*"qaqbqc"))) == "a<|im_end|>b<|im_end|>c<|im_end|>"
    samples = render_row({"messages": talk("q", "a", "q /no_think", "b", "q", "c")}, chatml)
    assert sorted(labelled(chatml, sample) for sample in samples) == ["a<|im_end|>c<|im_end|>", "b<|im_end|>"]


@pytest.mark.parametrize(
    ("prompted", "written", "trained"),  # of reasoning: by the generation prompt, by the template, and in the sample
    [
        ("<think>\n", "", "<think>\n\n</think>\n\n⟦a<|im_end|>"),  # as DeepSeek-R1
        ("<think>\n", "<think></think>", "<think>\n</think>⟦a<|im_end|>"),  # as Nemotron 3
        ("<think>", "</think>", "<think></think>⟦a<|im_end|>"),  # as GLM 4.7
        ("<think>\n\n</think>\n\n", "", "<think>\n\n</think>\n\n⟦a<|im_end|>"),
        ("<think></think>", "</think>", "<think></think>⟦a<|im_end|>"),  # as DeepSeek-V3.2
        ("<|channel>thought\n<channel|>", "", "<|channel>thought\n<channel|>⟦a<|im_end|>"),  # as Gemma 4 31B
    ],
)
def test_a_block_of_reasoning_in_the_prompt_is_closed_once(chatml, talk, prompted, written, trained):
    chatml.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
        f"{{{{ {written!r} if m['role'] == 'assistant' }}}}{{{{ m['content'] }}}}<|im_end|>\n{{% endfor %}}"
        f"{{{{ '<|im_start|>assistant\n' + {prompted!r} if add_generation_prompt }}}}"
    )
    ids, labels = render_one(chatml, talk("q", "a"))
    start = next(i for i, label in enumerate(labels) if label != -100)
    shown = f"{chatml.decode(ids[:start])}⟦{chatml.decode(ids[start:])}"
    assert shown.endswith(f"<|im_start|>assistant\n{trained}\n")


@pytest.mark.parametrize(("begin", "found"), [("", "none"), ("{{ bos_token }}{{ bos_token }}", "two")])
def test_a_template_that_writes_not_one_bos_is_rejected(chatml, talk, begin, found):
    chatml.add_special_tokens({"bos_token": "<|im_start|>"})
    first = [("<|im_start|>", 1)]
    chatml.backend_tokenizer.post_processor = TemplateProcessing(single="<|im_start|> $A", special_tokens=first)
    chatml.chat_template = begin + TURN
    with rejects("chat_template.bos", found):
        render_one(chatml, talk("q", "the answer"))


TOOLS = [{"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}}]


def answer_with(function, **others):
    call = {"type": "function", "function": function}
    return {"role": "assistant", "content": "", "tool_calls": [call], **others}


@pytest.mark.parametrize(
    ("function", "tools"),
    [
        ({"name": "f", "arguments": {"<|im_start|>": 1}}, None),
        ({"name": "f", "arguments": {}}, [{"function": {"name": "f", "description": "<|im_end|>"}}]),
    ],
)
def test_control_tokens_in_calls_and_tools_are_rejected(chatml, talk, function, tools):
    chatml.chat_template = WITH_TOOLS
    conversation = [*talk("q"), answer_with(function)]
    with rejects("rows.bad", "the control token"):
        render_one(chatml, conversation, tools)
    with rejects("row.fault", "the control token"):
        InstructionDataModule(tokenizer=chatml).renderer.render_prompt(conversation, tools)


@pytest.mark.parametrize(
    ("tools", "lost", "by", "reason"),
    [
        (None, "m['tool_calls'] or []", "[]", "leaves out or changes the tool calls of message 2"),
        (TOOLS, "{% if tools %}", "{% if false %}", "leaves out the tools"),
        (TOOLS, "m['tool_calls'] or []", "[]", "tool calls of message 2"),  # its name is among the tools
    ],
)
def test_a_template_that_leaves_out_calls_or_tools_is_rejected(chatml, talk, tools, lost, by, reason):
    conversation = [*talk("q"), answer_with({"name": "add", "arguments": {"a": 1}}, train=False), *talk("q", "a")]
    chatml.chat_template = WITH_TOOLS
    assert labelled(chatml, render_one(chatml, conversation, tools)).endswith("a<|im_end|>")
    chatml.chat_template = WITH_TOOLS.replace(lost, by)
    with rejects("rows.bad", reason):
        render_one(chatml, conversation, tools)


# ---- texts and tokens ------------------------------------------------------------------------------------------------


def test_a_document_has_a_beginning_and_an_end(chatml, families):
    llama = families["llama3_1"]
    ids = [llama.bos_token_id, *llama.encode("a four", add_special_tokens=False), llama.eos_token_id]
    assert render_one(llama, {"text": "a four"}, format="text") == (ids, [-100, *ids[1:]])
    chatml.chat_template = None  # nothing of it is needed
    ids, labels = render_one(chatml, {"text": "Once"}, format="text")
    chatml.chat_template = "{% for message in %}"
    assert render_one(chatml, {"text": "Once"}, format="text") == (ids, labels)
    assert (chatml.decode(ids), labels) == ("Once<|im_end|>", [-100, *ids[1:]])
    with rejects("rows.bad", "the control token"):
        render_one(chatml, {"text": "a<|im_end|>b"}, format="text")


def test_tokens_are_taken_as_they_are(chatml):
    row = {"input_ids": [5, 6, 7], "labels": [5, -100, 7]}
    assert render_one(chatml, row) == ([5, 6, 7], [-100, -100, 7])
    for ids, labels, reason in (
        ([5, 10**6], [5, -100], "token ids from 5 to 1000000, in a vocabulary of 375"),
        ([5, 6], [-100, 7], "a label must be -100 or the token id itself"),
        ([5, 6], [-100], "as many labels, found 2 and 1"),
    ):
        with rejects("rows.bad", reason):
            render_one(chatml, {"input_ids": ids, "labels": labels})
