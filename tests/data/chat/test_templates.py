"""Chat templates and tokenizers: presets, files, stop tokens, variables and dates."""

import copy
import json
from datetime import date, datetime

import pytest
from tokenizers import Tokenizer, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from qlora_lightning import InstructionDataModule
from tests.data.conftest import prepare_rows, render_row
from tests.errors import rejects
from tests.packed import unpack

SYSTEM = [{"role": "system", "content": "Be brief."}]


@pytest.fixture
def base(families):
    """A family's tokenizer as its base model has it: without template, and with the end of a text as its end."""

    def make(name, template=None):
        tokenizer = copy.deepcopy(families[name])
        tokenizer.chat_template, tokenizer.former_stop_ids = template, ()
        tokenizer.eos_token = "</s>" if name == "mistral" else "<|endoftext|>"
        return tokenizer

    return make


def choose(tokenizer, choice=None):
    return InstructionDataModule(tokenizer=tokenizer, chat_template=choice).tokenizer


def stop_ids_of(tokenizer):
    return InstructionDataModule(tokenizer=tokenizer).stop_ids


def test_a_bos_is_written_where_the_tokenizer_writes_one_itself(base, talk):
    tokenizer = base("qwen2_5")
    tokenizer.bos_token = "<|endoftext|>"
    shown = choose(tokenizer, "chatml").apply_chat_template(talk("q", "a"), tokenize=False)
    assert shown.startswith("<|im_start|>")
    first = [("<|endoftext|>", tokenizer.bos_token_id)]
    single = processors.TemplateProcessing(single="<|endoftext|> $A", special_tokens=first)
    tokenizer.backend_tokenizer.post_processor = single
    shown = choose(tokenizer, "chatml").apply_chat_template(talk("q", "a"), tokenize=False)
    assert shown.startswith("<|endoftext|><|im_start|>")


@pytest.mark.parametrize(
    ("name", "choice", "stop"),
    [
        ("llama3_1", "llama3", "<|eot_id|>"),
        ("qwen2_5", "chatml", "<|im_end|>"),
        ("mistral", "alpaca", "</s>"),
        ("qwen2_5", "alpaca", "<|endoftext|>"),
    ],
)
def test_a_preset_trains_each_answer_and_its_stop_token_and_is_saved(base, talk, tmp_path, name, choice, stop):
    answer = "\n\n yes é🙂\n\n"
    tokenizer = base(name)
    before = tokenizer.backend_tokenizer.to_str()
    row = {"messages": SYSTEM + talk("q", answer, "r", "no")}
    data = prepare_rows([row], tokenizer, chat_template=choice)
    chosen, ((ids, labels),) = data.tokenizer, unpack(data.samples["train"])
    wanted = answer.strip() if choice == "llama3" else answer
    assert chosen.decode([label for label in labels if label != -100]) == f"{wanted}{stop}no{stop}"
    assert set(data.stop_ids) == {chosen.eos_token_id, tokenizer.eos_token_id}
    assert ids.count(chosen.bos_token_id) == (chosen.bos_token is not None)
    # the tokenizer given stays as it is, and no id is added
    assert (tokenizer.chat_template, tokenizer.backend_tokenizer.to_str()) == (None, before)
    assert chosen.get_vocab() == tokenizer.get_vocab()
    chosen.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.eos_token == stop
    assert render_row(row, loaded) == [(ids, labels)]


def test_tokens_of_the_vocabulary_that_are_not_special_become_so(base, talk, tmp_path):
    """ChatML's are in it, and nothing says that they are special: a text is not split at them."""
    state = json.loads(base("qwen2_5").backend_tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] == "<|endoftext|>"]
    backend = Tokenizer.from_str(json.dumps(state))
    given = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")
    choose(given, "chatml").save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.encode("<|im_start|>a<|im_end|>", add_special_tokens=False) == [1, *tokenizer.encode("a"), 2]
    with rejects("rows.bad", "the control token"):
        render_row({"messages": talk("a<|im_end|>", "b")}, tokenizer)
    assert given.encode("<|im_end|>") != [2]


def test_without_a_choice_a_stop_token_that_the_tokenizer_does_not_know_is_made_right(families, base):
    right = families["qwen2_5"]
    assert choose(right) is right
    wrong = base("qwen2_5", right.chat_template)  # as Qwen's base models come
    chosen = choose(wrong)
    assert (chosen.eos_token, wrong.eos_token) == ("<|im_end|>", "<|endoftext|>")
    assert chosen.chat_template == right.chat_template
    assert stop_ids_of(chosen) == [0, 2]


@pytest.mark.parametrize(
    ("choice", "found"),
    [
        ("llama3", "<|start_header_id|>, <|end_header_id|>, <|eot_id|>, which"),
        ("lama3", "Did you mean 'llama3'?"),
        ("own.jinja", "own.jinja writes no token"),
    ],
)
def test_a_choice_that_cannot_work_is_rejected_with_the_reason(base, tmp_path, monkeypatch, choice, found):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.jinja").write_text("{% for m in messages %}{{ m.content }}<|eot_id|>{% endfor %}")
    with rejects("data.chat_template", found):
        choose(base("qwen2_5"), choice)


def test_stop_ids_are_those_of_tokenizer_config_and_former_end(characters, tmp_path):
    assert stop_ids_of(characters) == [125]
    characters.name_or_path, characters.former_stop_ids = str(tmp_path), {10}
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": [7, 8]}))
    assert stop_ids_of(characters) == [7, 8, 10, 125]
    for given, expected in ((7, [7, 10, 125]), ([7, 9], [7, 9, 10, 125]), (None, [10, 125])):
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": given}))
        assert stop_ids_of(characters) == expected


# Llama 3.2 has a variable for the date; SmolLM3, gpt-oss and Mistral ask for it without one
TODAY = '{%- set today = strftime_now("%A, %-d %B %Y (%F, %j)") %}\n{{- today }}{{- motto | default("") }}'


@pytest.fixture
def tokenizers(families):
    """Tokenizers whose templates have a date, several names, or no variable for the date."""
    llama = families["llama3_2"].chat_template
    templates = {"date": ("llama3_2", llama), "today": ("qwen2_5", TODAY + families["qwen2_5"].chat_template)}
    templates["named"] = ("llama3_2", {"default": llama, "tool_use": "{# tools #}" + llama})
    made = {name: copy.deepcopy(families[family]) for name, (family, _) in templates.items()}
    for name, (_, template) in templates.items():
        made[name].chat_template = template
    return made


DAY = [{"role": "user", "content": "What day is it?"}, {"role": "assistant", "content": "Saturday."}]


def prepare(tokenizer, **options):
    """Prepare one row; give the data module, the row's ids and its text."""
    data = prepare_rows([{"messages": DAY}], tokenizer, **options)
    (sample,) = unpack(data.samples["train"])
    return data, sample.ids, data.tokenizer.decode(sample.ids)


@pytest.mark.parametrize(
    ("kind", "options", "found", "fixed"),
    [
        ("date", {"date_string": "a\"b'c\n{{ x }} %} \\ é"}, "Today Date: a\"b'c\n{{ x }} %} \\ é\n", "26 Jul 2024\n"),
        ("named", {"date_string": "27 Nov 2026"}, "Today Date: 27 Nov 2026\n", "Today Date: 26 Jul 2024\n"),
        ("today", {"motto": "Be brief."}, "Be brief.", "Friday, 26 July 2024 (2024-07-26, 208)"),
    ],
)
def test_a_row_gives_the_same_tokens_on_every_day_also_by_the_saved_tokenizer(
    tokenizers, tmp_path, monkeypatch, kind, options, found, fixed
):
    monkeypatch.chdir(tmp_path)
    before, first, text = prepare(tokenizers[kind])
    assert fixed in text
    data, ids, text = prepare(tokenizers[kind], template_options=options)
    assert found in text
    data.tokenizer.save_pretrained("saved")
    later = type("Clock", (datetime,), {"now": classmethod(lambda cls, tz=None: cls(2027, 1, 5))})
    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", later)
    after, second, _ = prepare(tokenizers[kind])
    assert first == second
    assert before.identity["chat_template"] == after.identity["chat_template"]
    assert AutoTokenizer.from_pretrained("saved").apply_chat_template(DAY, return_dict=False) == ids
    for same in (None, options):  # as `chat` opens it, and as `fit` and `evaluate` do with the config of the run
        again, same_ids, _ = prepare("saved", template_options=same)
        assert same_ids == ids
        assert again.identity["chat_template"] == data.identity["chat_template"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"date_strin": "now"}, "has no variable 'date_strin'. Did you mean 'date_string'"),
        *(({name: "x"}, f"has no variable '{name}'") for name in ("content", "strip", "messages", "eos_token", "m")),
        ({"date_string": date(2026, 11, 27)}, "datetime.date(2026, 11, 27)"),
    ],
)
def test_options_that_no_template_has_or_can_hold_are_rejected_by_name(tokenizers, options, words):
    with rejects("data.template_options", words):
        prepare(tokenizers["date"], template_options=options)


def test_a_template_whose_date_cannot_be_fixed_is_rejected(tokenizers):
    tokenizers["today"].chat_template = '{%- set form = "%d" %}{{- strftime_now(form) }}'
    with rejects("data.chat_template", "strftime_now"):
        prepare(tokenizers["today"])
