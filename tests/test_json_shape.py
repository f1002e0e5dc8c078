import json

import pytest

from qlora_lightning.support.files import Positive, find_fault

SHAPE = {"name!": str, "size": int, "share": float, "on": bool, "kind": ("a", "b"), "each": [int], "of": {"*!": float}}
SHAPE |= {"few": Positive(int, 8), "part": Positive(float, 1000)}


@pytest.mark.parametrize(
    "text",
    [
        '{"name": "x"}',
        '{"name": "x", "size": 3, "share": 3, "on": false, "kind": "b", "each": [], "of": {"p": 0.5}}',
        '{"name": "x", "few": 8, "part": 1e-9}',
        '{"name": "x", "size": null, "each": null, "of": null, "more": {"anything": [null]}}',
    ],
)
def test_what_has_the_shape_has_no_fault(text):
    assert find_fault(json.loads(text), SHAPE) is None


@pytest.mark.parametrize(
    ("changed", "fault"),
    [
        ('"name": null', "name is missing"),
        ('"name": 3', "name is 3, expected text"),
        ('"size": "3"', 'size is "3", expected a whole number'),
        ('"size": 1.5', "size is 1.5, expected a whole number"),
        ('"size": true', "size is true, expected a whole number"),
        ('"size": 10000000000000000000', "size is 10000000000000000000, expected a whole number"),
        ('"share": NaN', "share is NaN, expected a finite number"),
        ('"share": 1' + 400 * "0", f"share is 1{38 * '0'}…, expected a finite number"),
        ('"few": 0', "few is 0, expected a positive whole number up to 8"),
        ('"few": 2.0', "few is 2.0, expected a positive whole number up to 8"),
        ('"part": 1e308', "part is 1e+308, expected a positive number up to 1,000"),
        ('"part": NaN', "part is NaN, expected a positive number up to 1,000"),
        ('"part": -Infinity', "part is -Infinity, expected a positive number up to 1,000"),
        ('"on": 1', "on is 1, expected true or false"),
        ('"kind": "c"', 'kind is "c", expected a or b'),
        ('"each": {}', "each is an object, expected a list"),
        ('"each": [1, []]', "each[1] is a list, expected a whole number"),
        ('"each": [null]', "each[0] is missing"),
        ('"of": 3', "of is 3, expected an object"),
        ('"of": {"p": null}', "of.p is missing"),
        ('"of": {"p": "x"}', 'of.p is "x", expected a finite number'),
    ],
)
def test_a_fault_names_its_place_and_what_was_expected(changed, fault):
    assert find_fault(json.loads('{"name": "x", ' + changed + "}"), SHAPE) == fault


def test_of_several_shapes_the_nearest_is_told():
    shape = (float, {"value": float})
    assert find_fault({"value": "x"}, shape, "loss") == 'loss.value is "x", expected a finite number'
    assert find_fault([], shape, "loss") == "loss is a list, expected a finite number or an object"
    assert find_fault(2, shape) is None
