from qlora_lightning.data.rows.bad_rows import kind_of


def test_values_are_named_as_in_json_where_python_has_no_good_name():
    assert [kind_of(value) for value in (None, [], [1], "x", 1, True, {})] == [
        "null",
        "an empty list",
        "list",
        "str",
        "int",
        "bool",
        "dict",
    ]
