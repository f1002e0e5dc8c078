import pytest

from qlora_lightning.report.ticks import linear_ticks, log_ticks, write_number


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0, 2.3, [0, 0.5, 1, 1.5, 2, 2.5]),
        (0, 0.0010000000475, [0, 0.0005, 0.001]),
        (0, 1000, [0, 200, 400, 600, 800, 1000]),
        (0.41, 0.58, [0.4, 0.45, 0.5, 0.55, 0.6]),
        (-3, 7, [-4, -2, 0, 2, 4, 6, 8]),
        (5, 5, [2, 3, 4, 5, 6, 7, 8]),
        (0, 0, [-0.6, -0.4, -0.2, 0, 0.2, 0.4, 0.6]),
    ],
)
def test_linear_ticks_are_round_and_cover_the_range(low, high, ticks):
    assert linear_ticks(low, high) == ticks


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0.015, 2.5, [0.02, 0.05, 0.1, 0.2, 0.5, 1, 2]),
        (0.01, 20, [0.01, 0.1, 1, 10]),
        (1e-9, 1e3, [1e-9, 1e-7, 1e-5, 1e-3, 0.1, 10, 1000]),
    ],
)
def test_logarithmic_ticks_are_ones_twos_and_fives_or_powers(low, high, ticks):
    assert log_ticks(low, high) == ticks


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *[(0, "0"), (0.5, "0.5"), (0.1 + 0.2, "0.3"), (12.345, "12.35"), (1500, "1,500"), (9999, "9,999")],
        *[(12_000, "12k"), (12_345, "12.3k"), (2.5e6, "2.5M"), (3e9, "3G"), (0.0005, "0.0005"), (2e-5, "2e-05")],
        *[(-4, "-4"), (999_900, "1,000k")],
    ],
)
def test_numbers_are_short(value, text):
    assert write_number(value) == text
