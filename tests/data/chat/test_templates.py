import copy
import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from qlora_lightning.data.chat.labels import ChatRenderer
from qlora_lightning.data.chat.templates import choose_chat_template
from qlora_lightning.data.chat.tokenizer import find_stop_ids, find_turn_end
from qlora_lightning.data.rows.bad_rows import RowFault
from qlora_lightning.data.rows.conversation import Chat
from qlora_lightning.support.errors import UserError

SYSTEM = [{"role": "system", "content": "Be brief."}]


@pytest.fixture
def base(families):
    """A family's tokenizer as its base model has it: without template, and with the end of a text as its end."""
    ends = {"llama31": "<|end_of_text|>", "qwen25": "<|endoftext|>"}

    def make(name):
        tokenizer = copy.deepcopy(families[name])
        tokenizer.chat_template = None
        tokenizer.eos_token = ends.get(name, tokenizer.eos_token)
        return tokenizer

    return make


def show(tokenizer, messages, generation=False):
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation)


def test_llama3_by_hand(base, talk):
    chosen = choose_chat_template(base("llama31"), "llama3")
    assert show(chosen, SYSTEM + talk("q ", "\na", "r"), generation=True) == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nq<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\na<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nr<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )


def test_chatml_by_hand(base, talk):
    chosen = choose_chat_template(base("qwen25"), "chatml")
    assert show(chosen, SYSTEM + talk("q ", "\na", "r"), generation=True) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nq <|im_end|>\n"
        "<|im_start|>assistant\n\na<|im_end|>\n<|im_start|>user\nr<|im_end|>\n<|im_start|>assistant\n"
    )


def test_alpaca_by_hand(base, talk):
    chosen = choose_chat_template(base("llama2"), "alpaca")
    assert show(chosen, SYSTEM + talk("q", "a", "r"), generation=True) == (
        "<s>Be brief.\n\n### Instruction:\nq\n\n### Response:\na</s>\n\n### Instruction:\nr\n\n### Response:\n"
    )
    assert show(chosen, talk("q", "a")) == (
        "<s>Below is an instruction that describes a task. Write a response that appropriately completes the "
        "request.\n\n### Instruction:\nq\n\n### Response:\na</s>\n\n"
    )


def test_a_bos_is_written_where_the_tokenizer_writes_one_itself(base, talk):
    assert show(choose_chat_template(base("qwen25"), "alpaca"), SYSTEM + talk("q", "a")).startswith("Be brief.")
    tokenizer = base("qwen25")
    tokenizer.bos_token = "<|endoftext|>"
    assert show(choose_chat_template(tokenizer, "chatml"), talk("q", "a")).startswith("<|im_start|>")
    first = [("<|endoftext|>", tokenizer.bos_token_id)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=first
    )
    assert show(choose_chat_template(tokenizer, "chatml"), talk("q", "a")).startswith("<|endoftext|><|im_start|>")


@pytest.mark.parametrize("answer", ["yes", "\n\n yes ", "é🙂\n\n"])
@pytest.mark.parametrize(
    ("name", "choice", "stop"),
    [
        ("llama31", "llama3", "<|eot_id|>"),
        ("qwen25", "chatml", "<|im_end|>"),
        ("llama2", "alpaca", "</s>"),
        ("mistral", "alpaca", "</s>"),
        ("qwen25", "alpaca", "<|endoftext|>"),
    ],
)
def test_a_preset_trains_each_answer_and_its_stop_token(base, talk, name, choice, stop, answer):
    tokenizer = base(name)
    chosen = choose_chat_template(tokenizer, choice)
    ((ids, labels),) = ChatRenderer(chosen).render(Chat(SYSTEM + talk("q", answer, "r", "no")))
    wanted = answer.strip() if choice == "llama3" else answer
    assert chosen.decode([label for label in labels if label != -100]) == f"{wanted}{stop}no{stop}"
    assert chosen.eos_token == stop
    assert find_stop_ids(chosen) == {chosen.eos_token_id, tokenizer.eos_token_id}
    assert ids.count(chosen.bos_token_id) == (chosen.bos_token is not None)


def test_the_tokenizer_given_stays_as_it_is_and_no_id_is_added(base):
    tokenizer = base("llama31")
    before = tokenizer.backend_tokenizer.to_str()
    chosen = choose_chat_template(tokenizer, "llama3")
    assert (tokenizer.chat_template, tokenizer.eos_token) == (None, "<|end_of_text|>")
    assert tokenizer.backend_tokenizer.to_str() == before
    assert find_stop_ids(tokenizer) == {tokenizer.eos_token_id}
    assert (len(chosen), chosen.get_vocab()) == (len(tokenizer), tokenizer.get_vocab())


def test_a_saved_tokenizer_keeps_template_and_stop_token(base, talk, tmp_path):
    chosen = choose_chat_template(base("llama31"), "llama3")
    chosen.save_pretrained(tmp_path)
    assert (tmp_path / "chat_template.jinja").read_text() == chosen.chat_template
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.eos_token == "<|eot_id|>"
    assert ChatRenderer(loaded).render(Chat(talk("q", "a"))) == ChatRenderer(chosen).render(Chat(talk("q", "a")))


@pytest.fixture
def plain_entries(base):
    """ChatML's tokens in the vocabulary, and nothing that says that they are special: a text is not split at them."""
    state = json.loads(base("qwen25").backend_tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] == "<|endoftext|>"]
    backend = Tokenizer.from_str(json.dumps(state))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")
    assert tokenizer.encode("<|im_end|>") != [2]
    return tokenizer


def test_tokens_of_the_vocabulary_that_are_not_special_become_so(plain_entries, talk, tmp_path):
    chosen = choose_chat_template(plain_entries, "chatml")
    chosen.save_pretrained(tmp_path)
    for tokenizer in (chosen, AutoTokenizer.from_pretrained(tmp_path)):
        assert len(tokenizer) == len(plain_entries)
        assert tokenizer.encode("<|im_start|>a<|im_end|>", add_special_tokens=False) == [1, *tokenizer.encode("a"), 2]
        assert tokenizer.decode([1, 2], skip_special_tokens=True) == ""
        with pytest.raises(RowFault, match="contains the control token"):
            ChatRenderer(tokenizer).render(Chat(talk("a<|im_end|>", "b")))
    assert plain_entries.encode("<|im_end|>") != [2]


def test_without_a_choice_a_stop_token_that_the_tokenizer_does_not_know_is_made_right(families, base):
    right = families["qwen25"]
    assert choose_chat_template(right, None) is right
    without = base("qwen25")
    assert choose_chat_template(without, None) is without
    wrong = base("qwen25")
    wrong.chat_template = right.chat_template  # as Qwen's base models come
    chosen = choose_chat_template(wrong, None)
    assert (chosen.eos_token, wrong.eos_token) == ("<|im_end|>", "<|endoftext|>")
    assert chosen.chat_template == right.chat_template
    assert find_stop_ids(chosen) == {0, 2}


def test_a_preset_whose_tokens_are_lacking_is_refused_with_those_that_fit(base):
    with pytest.raises(UserError) as error:
        choose_chat_template(base("qwen25"), "llama3")
    assert "chat_template: llama3 needs <|start_header_id|>, <|end_header_id|>, <|eot_id|>" in str(error.value)
    assert "Presets that fit it: chatml, chatml-tools, alpaca" in str(error.value)
    endless = base("qwen25")
    endless.eos_token = None
    with pytest.raises(UserError, match="alpaca needs an end-of-sequence token"):
        choose_chat_template(endless, "alpaca")


@pytest.mark.parametrize(("choice", "hint"), [("lama3", "llama3"), ("no/x.jinja", "")])
def test_what_is_not_there_is_refused_with_the_nearest(base, choice, hint):
    with pytest.raises(UserError, match=f"expected llama3, .* or a .jinja file, found '{choice}'.*{hint}"):
        choose_chat_template(base("qwen25"), choice)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a\n{{ b\n", "own.jinja is damaged, line 2"),
        ("{% for m in messages %}{{ m.content }}<|eot_id|>{% endfor %}", "writes no token of .* after an answer"),
        ("not a template", "does not write what an assistant message says: it makes 'not a template'"),
        ("{{ raise_exception('no') }}", "cannot render a question and its answer: TemplateError: no"),
    ],
)
def test_a_file_that_cannot_work_is_refused_with_the_reason(base, write, text, found):
    Path("own.jinja").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=f"chat_template: .*{found}"):
        choose_chat_template(base("qwen25"), "own.jinja")


def test_a_template_of_the_tokenizer_that_does_not_parse_is_refused(base):
    tokenizer = base("llama31")
    tokenizer.chat_template = "{% for message in messages %}\n{{ message['content'] }"
    with pytest.raises(UserError, match=r"the chat template of .* is damaged, line 2"):
        choose_chat_template(tokenizer, None)


def test_stop_ids_are_those_of_tokenizer_config_and_former_end(characters, tmp_path):
    assert find_stop_ids(characters) == {125}
    characters.name_or_path = str(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": [7, 8]}))
    assert find_stop_ids(characters) == {7, 8, 125}
    for given, expected in ((7, {7, 125}), ([7, 9], {7, 9, 125}), (None, {125})):
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": given}))
        assert find_stop_ids(characters) == expected
    characters.former_stop_ids = {10}
    assert find_stop_ids(characters) == {10, 125}
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(UserError, match=r"generation_config\.json is not JSON"):
        find_stop_ids(characters)


def test_the_end_of_a_turn_is_found_by_rendering(families):
    for tokenizer in families.values():
        assert find_turn_end(tokenizer) == tokenizer.eos_token_id


@pytest.mark.parametrize(
    ("after", "end"),
    [
        ("<|im_end|>\n<|endoftext|>", "<|im_end|>"),
        (" Next:<|im_end|>", "<|im_end|>"),
        ("<think>x<|im_end|>", "<think>"),  # in the vocabulary, and not special
        ("<thought><|im_end|>", "<|im_end|>"),  # the first is in no vocabulary: mere text
        ("\n", None),
    ],
)
def test_the_first_control_token_after_an_answer_ends_the_turn(families, after, end):
    tokenizer = copy.deepcopy(families["qwen25"])
    tokenizer.add_tokens(["<think>"])
    tokenizer.chat_template = "{% for m in messages %}<|im_start|>{{ m.content }}" + after + "{% endfor %}"
    assert find_turn_end(tokenizer) == (None if end is None else tokenizer.convert_tokens_to_ids(end))
