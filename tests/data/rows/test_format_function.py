import sys
from pathlib import Path

import pytest

from qlora_lightning.data.rows.formats import import_function
from qlora_lightning.support.errors import UserError


def test_a_function_is_found_by_its_path_in_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("rows_of_mine.py").write_text("def convert(row):\n    return row['m']\nnumber = 3\n")
    before = list(sys.path)
    assert import_function("rows_of_mine.convert")({"m": 5}) == 5
    assert sys.path == before
    for path, reason in {
        "rows_of_mine.convrt": "has no 'convrt'; did you mean 'convert'?",
        "rows_of_mine.number": "is int, not a function",
        "no_such_module.convert": "cannot import 'no_such_module' for 'no_such_module.convert': ModuleNotFoundError",
    }.items():
        with pytest.raises(UserError) as error:
            import_function(path)
        assert reason in str(error.value)
