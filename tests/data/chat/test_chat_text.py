import pytest

from qlora_lightning.data.chat.render import Answer, ChatText
from qlora_lightning.data.rows.bad_rows import RowFault

CALL = {"type": "function", "function": {"name": "clock", "arguments": {}}}


def test_answers_stand_where_generation_would_begin_them(characters, talk):
    (rendered,) = ChatText(characters).render(talk("q", " ok ", "r", "k"), None, [1, 3])
    assert rendered.text == "{u\nq}\n{a\n ok }\n{u\nr}\n{a\nk}\n"
    assert rendered.answers == [Answer(1, 9, 15, ("ok",)), Answer(3, 24, 27, ("k",))]
    assert [rendered.text[answer.start : answer.end] for answer in rendered.answers] == [" ok }\n", "k}\n"]


def test_only_wanted_answers_are_looked_for(characters, talk):
    (rendered,) = ChatText(characters).render(talk("q", "ok", "r", "k"), None, [3])
    assert [answer.message for answer in rendered.answers] == [3]
    (rendered,) = ChatText(characters).render(talk("q", "ok"), None, [])
    assert rendered.answers == []


def test_an_answer_that_history_changes_gets_a_text_of_its_own(smol, templates, talk):
    smol.chat_template = templates.qwen
    alone, whole = ChatText(smol).render(talk("q", "<think>hm</think>a", "r", "b"), None, [1, 3])
    assert alone.text.endswith("assistant\n<think>hm</think>a<|im_end|>\n")
    assert [answer.message for answer in alone.answers] == [1]
    assert "<think>" not in whole.text
    assert [answer.message for answer in whole.answers] == [3]


def test_markers_are_seen_and_must_be_as_many_as_answers(smol, talk):
    assert not ChatText(smol).has_markers
    smol.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'assistant' and loop.last %}{%- generation -%}{{ m['content'] }}"
        "<|im_end|>{%- endgeneration -%}{% else %}{{ m['content'] }}<|im_end|>{% endif %}{% endfor %}"
    )
    text = ChatText(smol)
    assert text.has_markers
    (rendered,) = text.render(talk("q", "a"), None, [1])
    assert rendered.answers == [Answer(1, 11, 22, ("a",), marked=True)]
    with pytest.raises(RowFault, match=r"marks 1 answers with \{% generation %\}, the conversation has 2"):
        text.render(talk("q", "a", "r", "b"), None, [1, 3])


def test_a_call_is_part_of_what_the_answer_must_say(smol, talk):
    smol.chat_template = "{% for m in messages %}{{ m['content'] }}{{ m['tool_calls'] or '' }}<|im_end|>{% endfor %}"
    conversation = [*talk("q"), {"role": "assistant", "content": "wait", "tool_calls": [CALL]}]
    (rendered,) = ChatText(smol).render(conversation, None, [1])
    assert (rendered.answers[0].parts, rendered.answers[0].calls) == (("wait", "clock"), True)


def test_what_a_tool_returned_may_stand_there_as_json(smol, talk):
    conversation = [*talk("q", "wait"), {"role": "tool", "content": 'a "b"\nc'}, *talk("r", "d")[1:]]
    smol.chat_template = (
        "{% for m in messages %}{{ m['content'] | tojson if m['role'] == 'tool' else m['content'] }}<|im_end|>"
        "{% endfor %}"
    )
    (rendered,) = ChatText(smol).render(conversation, None, [1, 3])
    assert '"a \\"b\\"\\nc"' in rendered.text


def test_the_prompt_is_what_training_has_before_the_answer(characters, talk):
    text, conversation = ChatText(characters), talk("q", "ok", "r", "k")
    prompt = text.render_prompt(conversation[:3], None)
    (rendered,) = text.render(conversation, None, [1, 3])
    assert prompt.text == rendered.text[: rendered.answers[1].start]
    assert prompt.answers == rendered.answers[:1]


def test_templates_never_see_our_own_keys(smol, talk):
    smol.chat_template = "{% for m in messages %}{{ m.keys() | list }}{{ m['content'] }}{% endfor %}"
    conversation = talk("q", "a")
    conversation[1]["train"] = False
    assert "train" not in ChatText(smol).apply(conversation)
