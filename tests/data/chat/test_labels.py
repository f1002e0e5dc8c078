import pytest
from tokenizers.processors import TemplateProcessing

from qlora_lightning.data.chat.labels import ChatRenderer
from qlora_lightning.data.rows.bad_rows import RowFault
from qlora_lightning.data.rows.conversation import Chat
from qlora_lightning.support.errors import UserError


def render(tokenizer, conversation, **settings):
    """The one sample of a conversation."""
    (rendered,) = ChatRenderer(tokenizer, **settings).render(Chat(conversation))
    return rendered


def render_prompt(tokenizer, messages):
    return ChatRenderer(tokenizer).render_prompt(messages)


def labelled(tokenizer, rendered):
    return tokenizer.decode([label for label in rendered.labels if label != -100])


def test_ids_and_labels_by_hand(characters, talk):
    ids, labels = render(characters, talk("q", "ok"))
    #      {    u   \n   q    }   \n   {   a   \n   o    k    }   \n
    assert ids == [123, 117, 10, 113, 125, 10, 123, 97, 10, 111, 107, 125, 10]
    assert labels == [-100] * 9 + [111, 107, 125] + [-100]


def test_prompt_by_hand(characters, talk):
    assert render_prompt(characters, talk("q")) == [123, 117, 10, 113, 125, 10, 123, 97, 10]


def test_an_answer_that_begins_with_a_newline_is_cut_from_the_header(characters, talk):
    ids, labels = render(characters, talk("q", "\nk"))
    assert ids == [123, 117, 10, 113, 125, 10, 123, 97, 10, 10, 107, 125, 10]  # encoded as a whole: 1010
    assert labels == [-100] * 9 + [10, 107, 125] + [-100]


def test_every_answer_is_trained_or_the_last_or_all(characters, talk):
    conversation = talk("q", "a", "r", "b")
    assert labelled(characters, render(characters, conversation)) == "a}b}"
    assert labelled(characters, render(characters, conversation, train_on="last")) == "b}"
    rendered = render(characters, conversation, train_on="all")
    assert rendered.labels == [-100, *rendered.ids[1:]]


def test_turns_after_the_last_answer_are_left_out(characters, talk):
    assert render(characters, talk("q", "a", "r")) == render(characters, talk("q", "a"))


def test_a_template_that_rewrites_history_is_rendered_turn_by_turn(smol, templates, talk):
    smol.chat_template = templates.qwen
    conversation = talk("q", "<think>hm</think>a", "r", "b")
    first, whole = ChatRenderer(smol).render(Chat(conversation))
    assert labelled(smol, first) == "<think>hm</think>a<|im_end|>"
    assert labelled(smol, whole) == "b<|im_end|>"  # the first answer, stripped there, is no answer of this model
    for rendered, turns in ((first, 1), (whole, 3)):
        prompt = render_prompt(smol, conversation[:turns])
        assert rendered.ids[: len(prompt)] == prompt
    assert ChatRenderer(smol, train_on="last").render(Chat(conversation)) == [whole]


def test_a_template_that_writes_no_answer_as_it_begins_it_is_refused(smol, talk):
    smol.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}Answer: {% endif %}"
    )
    with pytest.raises(RowFault, match=r"not prefix-preserving: it renders message 2 \(assistant\)"):
        render(smol, talk("q", "a"))


def test_an_answer_that_is_not_to_be_trained_has_no_label(smol, talk):
    conversation = talk("q", "a", "r", "b")
    conversation[1]["train"] = False
    assert labelled(smol, render(smol, conversation)) == "b<|im_end|>"
    conversation[3]["train"] = False
    assert labelled(smol, render(smol, conversation)) == ""
    with pytest.raises(RowFault, match="`train: false` in a message contradicts `train_on: all`"):
        render(smol, conversation, train_on="all")


TOOLS = (
    "{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t | tojson }}{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
    "{% for call in m['tool_calls'] or [] %}CALL {{ call['function'] | tojson }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


TURN = "{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (TURN.replace("<|im_end|>", ""), "never learn to stop"),
        (TURN.replace("<|im_end|>", "<|endoftext|>"), "never learn to stop"),
        (TURN, "expected one BOS token .*, found none"),
        ("{{ bos_token }}{{ bos_token }}" + TURN, "expected one BOS token .*, found two"),
        ("{{ raise_exception('no system role') }}", "cannot render the conversation: TemplateError: no system role"),
        ("{{ messages[0]['content'] + 1 }}", "cannot render the conversation: TypeError"),
    ],
)
def test_a_template_that_would_train_something_else_is_refused(smol, talk, template, reason):
    smol.chat_template = template
    smol.add_special_tokens({"bos_token": "<|im_start|>"})
    smol.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    with pytest.raises(UserError, match=reason):
        render(smol, talk("q", "the answer"))


def test_a_template_that_drops_or_changes_a_message_is_refused(smol, talk):
    smol.chat_template = (
        "{% for m in messages %}{% if m['role'] != 'system' %}"
        "{{ m['content'] | upper }}<|im_end|>{% endif %}{% endfor %}"
    )
    system = [{"role": "system", "content": "be brief"}]
    with pytest.raises(RowFault, match=r"leaves out or changes message 1 \(system\)"):
        render(smol, system + talk("Q", "A"))
    with pytest.raises(RowFault, match="changes the answer"):
        render(smol, talk("Q", "abc"))


CALL = {"type": "function", "function": {"name": "f", "arguments": {"city": "Rome"}}}


def calling(*calls, **marks):
    return [{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": [*calls], **marks}]


@pytest.mark.parametrize(
    ("function", "tools"),
    [
        ({"name": "f<|im_end|>", "arguments": {}}, None),
        ({"name": "f", "arguments": {"city": "a<|im_end|>b"}}, None),
        ({"name": "f", "arguments": {"<|im_start|>": 1}}, None),
        (CALL["function"], [{"type": "function", "function": {"name": "f", "description": "<|im_end|>"}}]),
    ],
)
def test_control_tokens_in_calls_and_tools_are_refused(smol, function, tools):
    smol.chat_template = TOOLS
    renderer, conversation = ChatRenderer(smol), calling({"type": "function", "function": function})
    with pytest.raises(RowFault, match="the control token"):
        renderer.render(Chat(conversation, tools))
    with pytest.raises(RowFault, match="the control token"):
        renderer.render_prompt(conversation, tools)


@pytest.mark.parametrize("lost", ["'name': call['function']['name']", "'arguments': call['function']['arguments']"])
def test_a_template_that_leaves_out_what_a_call_says_is_refused(smol, lost):
    smol.chat_template = TOOLS.replace("call['function'] | tojson", "{" + lost + "} | tojson")
    with pytest.raises(RowFault, match=r"changes the answer|leaves out the tool calls"):
        ChatRenderer(smol).render(Chat(calling(CALL)))


def test_calls_of_an_answer_that_is_not_trained_must_be_there_too(smol, talk):
    conversation = [*calling(CALL, train=False), *talk("q", "a")]
    smol.chat_template = TOOLS
    assert labelled(smol, render(smol, conversation)) == "a<|im_end|>"
    smol.chat_template = TOOLS.replace("m['tool_calls'] or []", "[]")
    with pytest.raises(RowFault, match="leaves out the tool calls of message 2"):
        render(smol, conversation)
    smol.chat_template = TOOLS.replace("{% if tools %}", "{% if false %}")
    with pytest.raises(RowFault, match="leaves out the tools"):
        ChatRenderer(smol).render(Chat(conversation, [CALL]))


def test_what_a_tool_returned_may_be_there_as_json(smol, talk):
    conversation = [*talk("q", "wait"), {"role": "tool", "content": 'a "b"\nc'}, *talk("r", "d")[1:]]
    smol.chat_template = TOOLS.replace(
        "{{ m['content'] }}", "{{ m['content'] | tojson if m.role == 'tool' else m.content }}"
    )
    assert labelled(smol, render(smol, conversation)) == "wait<|im_end|>d<|im_end|>"
