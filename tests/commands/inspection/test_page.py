from html.parser import HTMLParser

import pytest

from qlora_lightning.commands.inspection.page import render_page, write_page
from qlora_lightning.data.rows.bad_rows import BadRow
from qlora_lightning.support.errors import UserError

VOID = {"meta", "br", "rect", "line"}
HOSTILE = "</p><script>alert('1')</script>&amp;\" onmouseover=\"x"


class Reader(HTMLParser):
    """Collects elements and texts, and insists that every tag is closed where it should be."""

    def __init__(self, html):
        super().__init__()
        self.open, self.elements, self.tokens, self.text = [], [], [], ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop()[0] == tag

    def handle_data(self, data):
        self.text += data
        tag, attributes = self.open[-1] if self.open else ("", {})
        if tag == "span" and "data-about" in attributes:
            self.tokens.append((data, attributes["class"], attributes["data-about"]))


@pytest.fixture
def page(inspection):
    return lambda *arguments, **options: Reader(render_page(inspection(*arguments, **options)))


def test_tokens_have_their_kinds_and_ids(page, data_module):
    found = page(data_module(train=["{q\n}<a}>"]))
    assert found.tokens == [
        ("{", "t sp", "id 123 · special"),
        ("q", "t", "id 113"),
        ("↵\n", "t", "id 10"),
        ("}", "t sp", "id 125 · special"),
        ("a", "t la", "id 97 · labelled"),
        ("}", "t la sp st", "id 125 · labelled · special · stop"),
    ]


def test_reasoning_is_marked(page, data_module):
    found = page(data_module(train=["{q}<[think]h[/think]a}>"]))
    assert ("h", "t la re", "id 104 · labelled · reasoning") in found.tokens
    assert ("a", "t la", "id 97 · labelled") in found.tokens


def test_whatever_rows_hold_is_text(page, data_module):
    bad = {"bad": [BadRow("train.jsonl:9", HOSTILE)], "bad_rows": 1, "formats": [HOSTILE]}
    found = page(data_module(reports={"train": bad}, train=[f"{{q}}<{HOSTILE.replace('>', '')}\0>"]), search=HOSTILE)
    assert not {"script", "img", "a", "iframe"} & {tag for tag, _ in found.elements}
    assert not any(name.startswith("on") for _, attributes in found.elements for name in attributes)
    assert f"train.jsonl:9: {HOSTILE}" in found.text
    assert "\0" not in found.text


def test_it_needs_nothing_beside_itself(page, inspection):
    html = render_page(inspection())
    for reference in ("http:", "https:", "src=", "href=", "url(", "@import", "@font-face"):
        assert reference not in html
    policy = [a["content"] for tag, a in page().elements if tag == "meta" and a.get("http-equiv")]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'"]
    assert "prefers-color-scheme: dark" in html


def test_it_holds_the_numbers_and_a_drawing_a_split(page, data_module):
    overlap = {"overlap": 1, "overlap_pairs": [("val.jsonl:1", "train.jsonl:1")]}
    found = page(data_module(reports={"val": overlap}, train=["{one}<1}>", "{three}<3}>"], val=["{one}<1}>"]))
    heights = [float(attributes["height"]) for tag, attributes in found.elements if tag == "rect"]
    assert heights == [180.0, 0.0, 180.0, 180.0]  # lengths 7, 8 and 9 of train; 7 of val
    for part in (
        "val.jsonl:1 = train.jsonl:1",
        "tokens per batch",
        "16, no padding",
        "every sample trains one",
        "25.0%",
    ):
        assert part in found.text


def test_a_page_of_predict_rows_has_no_labels(page, data_module):
    found = page(data_module(predict=["{q}", "{r}"]))
    assert "predict tokens" in found.text
    assert "predict labelled" not in found.text
    assert "An epoch" not in found.text


def test_writing_where_nothing_can_be_written_is_refused(inspection, tmp_path):
    (tmp_path / "page.html").mkdir()
    with pytest.raises(UserError, match=r"page\.html cannot be written: Is a directory"):
        write_page(inspection(), tmp_path / "page.html")
