import numpy as np

from qlora_lightning.commands.inspect.numbers import Bar, histogram, percentiles


def test_percentiles_are_lengths_that_occur():
    assert percentiles(np.arange(1, 101)) == {
        "min": 1, "5 %": 5, "25 %": 25, "50 %": 50, "75 %": 75, "95 %": 95, "99 %": 99, "max": 100,
    }  # fmt: skip
    assert set(percentiles([7]).values()) == {7}
    assert percentiles([]) == {}


def test_bars_have_one_round_width_and_hold_every_sample():
    assert histogram([72, 79, 80, 80, 99], most_bars=4) == [Bar(70, 79, 2), Bar(80, 89, 2), Bar(90, 99, 1)]
    assert histogram([5, 5, 5]) == [Bar(5, 5, 3)]
    assert histogram([]) == []


def test_one_long_sample_does_not_flatten_the_others():
    bars = histogram([*range(100, 200), *range(100, 200), 30_000])
    assert bars[-1] == Bar(200, None, 1)
    assert len(bars) <= 13
    assert {bar.samples for bar in bars[:-1]} == {20}


def test_bars_are_complete_for_any_lengths():
    generator = np.random.default_rng(0)
    for scale in (1, 10, 1_000, 100_000):
        lengths = generator.integers(1, scale + 1, 300) ** 2
        bars = histogram(lengths)
        assert sum(bar.samples for bar in bars) == 300
        assert len(bars) <= 13
        for bar in bars:
            high = bar.high if bar.high is not None else lengths.max()
            assert bar.samples == np.count_nonzero((lengths >= bar.low) & (lengths <= high))


def test_a_bar_says_its_range():
    assert [bar.label for bar in (Bar(5, 5, 1), Bar(1000, 1999, 1), Bar(2000, None, 1))] == [
        "5",
        "1,000 to 1,999",
        "2,000 and more",
    ]
