import datetime

import pytest
import torch

from qlora_lightning.callbacks.checkpoint_file import check_checkpoint, find_checkpoint
from qlora_lightning.model.checkpoint.format import KEY
from qlora_lightning.support.errors import UserError
from qlora_lightning.support.versions import FORMAT_VERSION


@pytest.fixture
def folder(tmp_path):
    place = tmp_path / "checkpoints"
    place.mkdir()
    return place


def write(file, step, version=FORMAT_VERSION):
    parts = {"callbacks": {}, "global_step": step, "state_dict": {"w": torch.arange(5000.0)}}
    torch.save({**parts, KEY: {"format_version": version}}, file)
    return file


def change(file, edit):
    """Write a checkpoint again with something else in it."""
    checkpoint = torch.load(file, weights_only=True)
    edit(checkpoint)
    torch.save(checkpoint, file)


def test_last_is_the_run_folders_last_checkpoint_or_a_fresh_start(folder, tmp_path):
    assert find_checkpoint(tmp_path, None) is None
    assert find_checkpoint(tmp_path, "last") is None
    last = write(folder / "last.ckpt", 8)
    write(folder / "step-000009.ckpt", 9)
    assert find_checkpoint(tmp_path, "last") == str(last)
    assert find_checkpoint(tmp_path / "other", str(last)) == str(last)


def test_where_a_kill_left_no_last_the_newest_whole_one_is(folder, tmp_path):
    write(folder / "unfinished.ckpt", 12)
    assert find_checkpoint(tmp_path, "last") is None
    write(folder / "step-000010.ckpt", 10)
    newest = write(folder / "step-000011.ckpt", 11)
    (folder / "step-000012.ckpt").write_bytes(newest.read_bytes()[:-100])
    assert find_checkpoint(tmp_path, "last") == str(newest)


def test_another_checkpoint_must_exist(tmp_path):
    with pytest.raises(UserError, match=r"--ckpt_path .*no\.ckpt: there is no such file\. Expected a \.ckpt file, or"):
        check_checkpoint(tmp_path / "no.ckpt")


def cut(content, at):
    return content[: len(content) * at // 10]


def flip(content, at):
    """Flip a bit of a tensor, which torch does not notice."""
    tensor, content = torch.arange(5000.0).numpy().tobytes(), bytearray(content)
    content[content.index(tensor) + len(tensor) * at // 10] ^= 1
    return bytes(content)


@pytest.mark.parametrize("damage", [cut, flip])
@pytest.mark.parametrize("at", [0, 3, 6, 9])
def test_a_damaged_last_is_refused_and_the_newest_good_one_named(folder, tmp_path, damage, at):
    last = write(folder / "last.ckpt", 9)
    last.write_bytes(damage(last.read_bytes(), at))
    with pytest.raises(UserError, match=rf"{last} is damaged.* There is no good checkpoint beside it\."):
        find_checkpoint(tmp_path, "last")
    write(folder / "step-000004.ckpt", 4)
    newest = write(folder / "step-000008.ckpt", 8)
    for asked in ("last", str(last)):
        with pytest.raises(UserError, match=rf"is damaged.* The newest good one .* {newest}: .*`--ckpt_path {newest}`"):
            check_checkpoint(find_checkpoint(tmp_path, asked))


def test_a_foreign_checkpoint_is_refused(folder):
    good = write(folder / "step-000008.ckpt", 8)
    foreign = folder / "foreign.ckpt"
    for content in ({"state_dict": {}}, [1]):
        torch.save(content, foreign)
        with pytest.raises(UserError, match=rf"foreign.ckpt was not written by qlora_lightning.* {good}: resume"):
            check_checkpoint(foreign)
    foreign.write_bytes(b"hi")
    with pytest.raises(UserError, match=rf"foreign.ckpt is damaged or not a checkpoint.* {good}: resume"):
        check_checkpoint(foreign)
    write(foreign, 99, FORMAT_VERSION + 1)
    with pytest.raises(UserError, match=rf"update qlora_lightning.* {good}: resume"):
        check_checkpoint(foreign)
    write(foreign, 9)
    change(foreign, lambda found: found["callbacks"].update(day=datetime.date(2020, 1, 1)))
    with pytest.raises(UserError, match=r"foreign.ckpt is damaged or not a checkpoint: it holds a datetime\.date\."):
        check_checkpoint(foreign)
    check_checkpoint(good)
