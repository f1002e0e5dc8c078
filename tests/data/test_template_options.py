"""A row renders the same on every day, and as the variables of its template are set."""

import copy
import itertools
from datetime import datetime

import pytest
from transformers import AutoTokenizer

from qlora_lightning.data.datamodule import InstructionDataModule
from qlora_lightning.support.errors import UserError

# as Llama 3.2's template begins
DATE = """{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
"""
# as SmolLM3, gpt-oss and Mistral ask for it, without a variable
TODAY = '{%- set today = strftime_now("%A, %-d %B %Y (%F, %j)") %}\n{{- today }}'
CONVERSATION = [{"role": "user", "content": "What day is it?"}, {"role": "assistant", "content": "Saturday."}]


@pytest.fixture
def clock(monkeypatch):
    """Set the day that templates see."""

    def set_day(year, month, day):
        class Clock(datetime):
            @classmethod
            def now(cls, tz=None):
                return cls(year, month, day)

        monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Clock)

    set_day(2026, 11, 27)
    return set_day


@pytest.fixture
def tokenizers(families):
    """Tokenizers whose templates have a date, a switch, or markers around answers, by what they have."""

    def with_template(name, template):
        tokenizer = copy.deepcopy(families[name])
        tokenizer.chat_template = template
        return tokenizer

    llama = families["llama31"].chat_template.replace("{%- set date =", DATE + "{%- set date =", 1)
    marked = TODAY + families["markers"].chat_template
    thinking = "{%- if add_generation_prompt %}\n    {%- if enable_thinking is defined and enable_thinking is false %}"
    switch = families["qwen25"].chat_template + thinking + "{{- '<think></think>' }}{%- endif %}{%- endif %}"
    return {
        "date": with_template("llama31", llama),
        "marked": with_template("markers", marked),
        "switch": with_template("qwen25", switch),
        "named": with_template("llama31", {"default": llama, "tool_use": "{# tools #}" + llama}),
    }


@pytest.fixture
def render(write, tmp_path, monkeypatch):
    """Prepare one row with a tokenizer; a cache of its own each time, but where one is asked for."""
    write("rows.jsonl", [{"messages": CONVERSATION}])
    numbers = itertools.count()

    def render(tokenizer, cache=None, split="train", **options):
        monkeypatch.setenv("QLORA_LIGHTNING_CACHE", str(tmp_path / f"cache-{cache or next(numbers)}"))
        data = InstructionDataModule(**{split: "rows.jsonl"}, tokenizer=tokenizer, **options)
        data.setup("fit" if split == "train" else split)
        (sample,) = data.samples[split]
        return data, sample.ids.tolist(), data.tokenizer.decode(sample.ids)

    return render


@pytest.mark.parametrize("kind", ["date", "marked", "named"])
def test_the_same_row_gives_the_same_tokens_on_every_day(tokenizers, render, clock, kind):
    before, first, text = render(tokenizers[kind])
    clock(2027, 1, 5)
    after, second, _ = render(tokenizers[kind])
    assert first == second
    assert before.identity["chat_template"] == after.identity["chat_template"]
    assert ("Friday, 26 July 2024 (2024-07-26, 208)" if kind == "marked" else "Today Date: 26 Jul 2024\n") in text


def test_options_set_variables_of_the_template_in_samples_and_prompts(tokenizers, render, clock):
    _, _, text = render(tokenizers["date"], template_options={"date_string": "27 Nov 2026"})
    assert "Today Date: 27 Nov 2026\n" in text
    value = "a\"b'c\n{{ x }} %} \\ é🙂"
    assert f"Today Date: {value}\n" in render(tokenizers["date"], template_options={"date_string": value})[2]
    for options, end in ((None, ""), ({"enable_thinking": False}, "<think></think>")):
        _, _, text = render(tokenizers["switch"], split="predict", template_options=options)
        assert text.endswith(f"<|im_start|>assistant\n{end}")


@pytest.mark.parametrize("kind", ["date", "named"])
def test_the_saved_tokenizer_renders_the_same_elsewhere_and_may_be_told_otherwise(tokenizers, render, clock, kind):
    options = {"date_string": "27 Nov 2026"}
    data, ids, _ = render(tokenizers[kind], template_options=options)
    data.tokenizer.save_pretrained("saved")
    clock(2027, 1, 5)
    plain = AutoTokenizer.from_pretrained("saved")
    assert plain.apply_chat_template(CONVERSATION, return_dict=False) == ids
    other = plain.apply_chat_template(CONVERSATION, tokenize=False, date_string="1 Jan 1970")
    assert "Today Date: 1 Jan 1970\n" in other
    for same in (None, options):  # as `chat` opens it, and as `evaluate` does with the config of the run
        again, found, _ = render("saved", template_options=same)
        assert found == ids
        assert again.identity["chat_template"] == data.identity["chat_template"]


def test_the_date_of_a_saved_tokenizer_may_be_set_again_and_to_another(tokenizers, render, clock):
    options = {"strftime_now": "2026-11-27", "date_string": 'a "word"'}
    tokenizer = copy.deepcopy(tokenizers["marked"])
    tokenizer.chat_template = DATE + tokenizer.chat_template
    data, ids, text = render(tokenizer, template_options=options)
    assert text.startswith("Friday, 27 November 2026")
    data.tokenizer.save_pretrained("saved")
    clock(2027, 1, 5)
    for same in (None, options):  # as `chat` opens it, and as `fit` does with the config of the run
        again, found, _ = render("saved", template_options=same)
        assert found == ids
        assert again.identity["chat_template"] == data.identity["chat_template"]
    other = {**options, "strftime_now": "2026-11-28"}
    again, _, text = render("saved", template_options=other)
    assert text.startswith("Saturday, 28 November 2026 (2026-11-28, 332)<|im_start|>user")
    assert again.identity["chat_template"] == render(tokenizer, template_options=other)[0].identity["chat_template"]


def test_cached_samples_are_those_of_the_same_options(tokenizers, render):
    one, two = ({"date_string": text} for text in ("1 May 2025", "2 May 2025"))
    first = render(tokenizers["date"], cache="shared", template_options=one)[1]
    assert render(tokenizers["date"], cache="shared", template_options=two)[1] != first
    assert render(tokenizers["date"], cache="shared", template_options=one)[1] == first


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        ("switch", {"enable_thinkin": False}, r"'enable_thinkin', its variables: .* Did you mean 'enable_thinking'"),
        ("switch", {"strftime_now": "2026-11-27"}, "has no variable 'strftime_now'"),
        ("date", {"messages": []}, "has no variable 'messages'"),
        ("date", {"bos_token": ""}, "has no variable 'bos_token', its variables: .*date_string, strftime_now"),
    ],
)
def test_what_would_change_nothing_is_refused_by_name(tokenizers, render, kind, options, words):
    with pytest.raises(UserError, match=words):
        render(tokenizers[kind], template_options=options)
    with pytest.raises(UserError, match=r"chat_template: chatml has no variable 'x', its variables: none"):
        render(tokenizers["switch"], chat_template="chatml", template_options={"x": 1})
