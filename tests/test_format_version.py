import pytest

from qlora_lightning.support.errors import UserError
from qlora_lightning.support.versions import FORMAT_VERSION, check_version


def test_what_this_version_or_an_older_one_wrote_is_read():
    check_version(FORMAT_VERSION, "a.ckpt")
    check_version(FORMAT_VERSION - 1, "a.ckpt")


def test_what_a_newer_version_wrote_is_refused():
    with pytest.raises(UserError, match=rf"a\.ckpt has format version {FORMAT_VERSION + 1}.*update qlora_lightning"):
        check_version(FORMAT_VERSION + 1, "a.ckpt")
