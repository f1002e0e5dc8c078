from qlora_lightning.report.settings import find_differences, flatten, write_setting


def test_settings_are_flattened_down_to_lists():
    config = {"model": {"rank": 8, "lora_options": {}}, "data": {"train": ["a", "b"]}, "seed_everything": 1}
    assert flatten(config) == {
        **{"model.rank": 8, "model.lora_options": {}, "data.train": ["a", "b"], "seed_everything": 1}
    }


def test_only_what_differs_is_told_and_the_run_folder_is_not():
    one = {"model": {"rank": 8, "alpha": None}, "trainer": {"default_root_dir": "a", "max_epochs": 1}}
    other = {"model": {"rank": 16}, "trainer": {"default_root_dir": "b", "max_epochs": 1}, "throughput": False}
    assert find_differences([one, other]) == {"model.rank": [8, 16], "throughput": [None, False]}
    assert find_differences([one, one]) == {}


def test_settings_are_written_as_yaml_in_one_line():
    assert [write_setting(value) for value in (None, True, "a: b", ["x", {"path": "y"}], 1e-3)] == [
        *["null", "true", "'a: b'", "[x, {path: y}]", "0.001"]
    ]
