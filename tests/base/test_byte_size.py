import pytest

from qlora_lightning.base.tensors import format_bytes


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (98_362_432, "98 MB"), (5_600_000_000, "5.6 GB"), (141_000_000_000, "141 GB")],
)
def test_bytes_are_worded_in_decimal_units(count: int, text: str) -> None:
    assert format_bytes(count) == text
