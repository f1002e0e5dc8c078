import json
import math

import pytest

from qlora_lightning.report.manifest import read_manifest, write_manifest
from qlora_lightning.support.errors import UserError


def test_what_is_written_is_read_under_format_and_version(tmp_path):
    write_manifest(tmp_path, {"status": "finished", "name": "Grüße"})
    assert read_manifest(tmp_path) == {
        **{"format": "qlora_lightning manifest", "format_version": 1, "status": "finished", "name": "Grüße"}
    }
    assert [file.name for file in tmp_path.iterdir()] == ["manifest.json"]


def test_it_is_json_that_every_reader_takes(tmp_path):
    write_manifest(tmp_path, {"loss": math.nan, "deep": [{"norm": -math.inf}], "fine": 0.5})

    def refuse(name):
        raise AssertionError(name)

    found = json.loads((tmp_path / "manifest.json").read_text(), parse_constant=refuse)
    assert (found["loss"], found["deep"], found["fine"]) == (None, [{"norm": None}], 0.5)


def test_no_manifest_is_none(tmp_path):
    assert read_manifest(tmp_path) is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"format": "qlora_lightning man', "is not JSON"),
        ("[]", "expected a JSON object, found list"),
        ("{}", "not a manifest of ours"),
        ('{"format": "qlora_lightning manifest", "format_version": 2}', "update qlora_lightning"),
    ],
)
def test_another_or_a_damaged_file_is_refused(tmp_path, text, words):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(UserError, match=words):
        read_manifest(tmp_path)
