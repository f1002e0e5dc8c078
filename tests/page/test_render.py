import base64
import hashlib
import re

import jinja2
import pytest

from qlora_lightning.page.render import render_page


@pytest.fixture
def template(tmp_path):
    file = tmp_path / "page.html"
    file.write_text('<b title="{{ policy }}">{{ text }}</b>{{ text | visible }}<script>{{ script }}</script>')
    return file


def test_texts_are_escaped_and_the_script_is_not(template):
    html = render_page(template, "1 < 2", text="<i>\x1b")
    assert "<b" in html
    assert "&lt;i&gt;\x1b</b>&lt;i&gt;␛<script>1 < 2</script>" in html


def test_the_policy_names_the_script_by_its_hash(template):
    html = render_page(template, "alert()", text="")
    (digest,) = re.findall(r"script-src 'sha256-([^']+)'", html)
    assert base64.b64decode(digest) == hashlib.sha256(b"alert()").digest()
    assert "script-src" not in render_page(template, text="")


def test_the_shared_style_can_be_included(tmp_path):
    file = tmp_path / "page.html"
    file.write_text('{% include "style.css" %}')
    assert "prefers-color-scheme: dark" in render_page(file)


def test_a_value_that_the_template_wants_must_be_there(template):
    with pytest.raises(jinja2.UndefinedError):
        render_page(template)
