import os

import pytest

from qlora_lightning.model.adapters.folder import refill_folder, settle_folder


class KilledError(BaseException):
    pass


def refill(folder, config, weights, own=()):
    def write(place):
        (place / "config").write_text(config)
        (place / "card").write_text("card")
        (place / "weights").write_text(weights)

    refill_folder(folder, write, key_file="weights", own=own)


def read(folder):
    return {file.name: file.read_text() for file in folder.iterdir() if file.is_file()}


@pytest.fixture
def dies_at(monkeypatch):
    """Let the process die in front of its n-th rename."""

    def arrange(number):
        replace, left = os.replace, [number]

        def replace_or_die(one, other):
            left[0] -= 1
            if not left[0]:
                raise KilledError
            replace(one, other)

        monkeypatch.setattr("os.replace", replace_or_die)

    return arrange


OLD, SAME_CONFIG, OTHER_CONFIG = ("alpha 4", "old"), ("alpha 4", "new"), ("alpha 8", "new")


def as_files(config, weights):
    return {"config": config, "card": "card", "weights": weights}


@pytest.mark.parametrize("new", [SAME_CONFIG, OTHER_CONFIG])
def test_the_new_files_are_there_and_the_users_stay(tmp_path, new):
    folder = tmp_path / "a"
    refill(folder, *OLD)
    (folder / ".git").mkdir()
    (folder / "notes.txt").write_text("mine")
    refill(folder, *new)
    assert read(folder) == {**as_files(*new), "notes.txt": "mine"}
    assert (folder / ".git").is_dir()
    assert sorted(file.name for file in folder.iterdir()) == [".git", "card", "config", "notes.txt", "weights"]
    assert [place.name for place in tmp_path.iterdir()] == ["a"]


def test_what_an_earlier_filling_wrote_and_this_one_does_not_goes(tmp_path):
    refill(tmp_path / "a", *OLD)
    (tmp_path / "a" / "template").write_text("old")
    refill(tmp_path / "a", *OTHER_CONFIG, own=("template", "other"))
    assert read(tmp_path / "a") == as_files(*OTHER_CONFIG)


@pytest.mark.parametrize("new", [SAME_CONFIG, OTHER_CONFIG])
@pytest.mark.parametrize("number", range(1, 8))
def test_a_kill_at_any_rename_leaves_one_whole_filling(tmp_path, monkeypatch, dies_at, new, number):
    folder = tmp_path / "a"
    refill(folder, *OLD)
    (folder / "notes.txt").write_text("mine")
    dies_at(number)
    try:
        refill(folder, *new)
    except KilledError:
        pass
    else:
        assert number > 3
    monkeypatch.undo()
    if folder.exists():  # what a reader finds who comes now
        found = read(folder)
        found.pop("notes.txt", None)
        assert found in (as_files(*OLD), as_files(*new))
    settle_folder(folder)
    assert read(folder) in ({**as_files(*OLD), "notes.txt": "mine"}, {**as_files(*new), "notes.txt": "mine"})
    assert [place.name for place in tmp_path.iterdir()] == ["a"]
    refill(folder, *new)
    assert read(folder) == {**as_files(*new), "notes.txt": "mine"}


def test_a_full_disk_leaves_the_folder_as_it_was(tmp_path):
    refill(tmp_path / "a", *OLD)

    def fail(place):
        (place / "config").write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        refill_folder(tmp_path / "a", fail, key_file="weights")
    assert read(tmp_path / "a") == as_files(*OLD)
    settle_folder(tmp_path / "a")
    assert sorted(file.name for file in (tmp_path / "a").iterdir()) == ["card", "config", "weights"]


def test_a_folder_behind_a_link_is_filled_there_and_the_link_stays(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "adapter").symlink_to("disk")
    refill(tmp_path / "adapter", "one", "1")
    (tmp_path / "adapter" / "notes").write_text("mine")
    refill(tmp_path / "adapter", "two", "2")
    assert read(tmp_path / "disk") == {"config": "two", "card": "card", "weights": "2", "notes": "mine"}
    assert (tmp_path / "adapter").is_symlink()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["adapter", "disk"]
