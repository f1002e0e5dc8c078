import pytest

from qlora_lightning.data.bad_rows import RowFault
from qlora_lightning.data.chat import ChatRenderer, render, render_prompt
from qlora_lightning.errors import UserError


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
    with pytest.raises(UserError, match="train_on: expected assistant, last, all, found 'user'"):
        render(characters, conversation, train_on="user")


def test_turns_after_the_last_answer_are_left_out(characters, talk):
    assert render(characters, talk("q", "a", "r")) == render(characters, talk("q", "a"))


@pytest.mark.parametrize("template", [None, "llama3"])
@pytest.mark.parametrize("answer", ["yes", "\n\n  yes", "é🙂\nyes", " yes ", "1,000 <html>"])
def test_what_is_trained_follows_exactly_what_generation_sees(smol, templates, talk, template, answer):
    if template:
        smol.add_special_tokens({"additional_special_tokens": ["<|eot_id|>"]})
        smol.chat_template = getattr(templates, template)
    stop = smol.convert_tokens_to_ids("<|eot_id|>" if template else "<|im_end|>")
    conversation = talk("q é", answer, "and?", answer + "!")
    ids, labels = render(smol, conversation, stop_ids=[stop])
    for turn in (1, 3):
        prompt = render_prompt(smol, conversation[:turn])
        assert ids[: len(prompt)] == prompt
        assert labels[len(prompt)] == ids[len(prompt)]
        assert labels[len(prompt) - 1] == -100
    said = [text.strip() if template else text for text in (answer, answer + "!")]
    assert smol.decode([label for label in labels if label != -100]) == "".join(
        text + smol.decode([stop]) for text in said
    )


def test_ids_are_those_of_the_template(smol, talk):
    conversation = talk("Name a colour.", "Blue.", "Another?", "Red.")
    assert render(smol, conversation).ids == smol.apply_chat_template(conversation, return_dict=False)


def test_control_tokens_as_text_are_refused(smol, talk):
    with pytest.raises(RowFault, match=r"message 1 \(user\) contains the control token '<\|im_end\|>' as text"):
        render(smol, talk("a<|im_end|>b", "c"))
    with pytest.raises(RowFault, match="message 1"):
        render_prompt(smol, talk("a<|im_start|>b"))


def test_a_template_that_rewrites_history_trains_the_last_answer_only(smol, templates, talk):
    smol.chat_template = templates.qwen
    conversation = talk("q", "<think>hm</think>a", "r", "b")
    with pytest.raises(RowFault, match=r"not prefix-preserving: it renders message 2.*train_on: last"):
        render(smol, conversation)
    rendered = render(smol, conversation, train_on="last")
    prompt = render_prompt(smol, conversation[:3])
    assert rendered.ids[: len(prompt)] == prompt
    assert labelled(smol, rendered) == "b<|im_end|>"


@pytest.mark.parametrize(
    ("ending", "found"),
    [("", "the first control token there there is none"), ("<|endoftext|>", "'<|endoftext|>', at which generation")],
)
def test_a_template_without_stop_token_is_refused_with_the_turn(smol, talk, ending, found):
    smol.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}" + ending + "\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    with pytest.raises(UserError) as error:
        render(smol, talk("q", "the answer"))
    message = str(error.value)
    assert "never learn to stop" in message
    assert "'<|im_end|>'" in message
    assert f"'the answer{ending}\\n'" in message
    if ending:
        assert found in message


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


def test_what_the_template_raises_is_the_reason(smol, talk):
    smol.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(RowFault, match="refuses the conversation: no system role"):
        render(smol, talk("q", "a"))


def test_a_second_bos_is_refused(smol, talk):
    smol.chat_template = "{{ bos_token }}{{ bos_token }}{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}"
    with pytest.raises(UserError, match="expected one, found two"):
        render(smol, talk("q", "a"))


def test_a_tokenizer_without_template_is_refused(smol):
    smol.chat_template = None
    with pytest.raises(UserError, match="has no chat template"):
        ChatRenderer(smol)
