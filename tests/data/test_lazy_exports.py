import subprocess
import sys

import pytest

import qlora_lightning.data


def test_every_public_name_is_found():
    assert all(getattr(qlora_lightning.data, name) is not None for name in qlora_lightning.data.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = qlora_lightning.data.nothing


def test_the_import_loads_neither_torch_nor_lightning():
    code = "import sys, qlora_lightning.data as d; d.read_rows; print({'torch', 'lightning'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
