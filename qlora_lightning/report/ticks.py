"""Axes: round ticks that cover a range, linear or logarithmic, and how numbers are written at them."""

import math

_NEAR = 1e-6  # of a step: a value that is stored in float32 is on the tick that it was meant to be on


def linear_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Give multiples of 1, 2 or 5 times a power of ten, the first not above ``low``, the last not below ``high``."""
    span = high - low
    if span <= 0:
        span = abs(high) or 1.0
        low, high = low - span / 2, high + span / 2
    step = _round_up(span / (most - 1))
    first, last = math.floor(low / step + _NEAR), math.ceil(high / step - _NEAR)
    return [_exact(number * step) for number in range(first, last + 1)]


def log_ticks(low: float, high: float, most: int = 8) -> list[float]:
    """Give 1, 2 and 5 times the powers of ten inside a range of positive numbers; of many, fewer."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    ticks: list[float] = []
    for factors, step in (((1, 2, 5), 1), *(((1,), step) for step in range(1, last - first + 2))):
        every = [_exact(factor * 10.0**power) for power in range(first, last + 1, step) for factor in factors]
        ticks = [tick for tick in every if low <= tick <= high]
        if len(ticks) <= most:
            break
    return ticks


def write_number(value: float) -> str:
    """Write a number with three or four digits, as short as it goes: ``1.5``, ``2,400``, ``12k``, ``5e-04``."""
    size = abs(value)
    if value == 0:
        return "0"
    if size < 1e-3:
        return f"{value:.2g}"
    if size < 10_000:
        return f"{value:,.0f}" if size >= 1000 else f"{value:.4g}"
    scaled, unit = (value / 1e9, "G") if size >= 1e9 else (value / 1e6, "M") if size >= 1e6 else (value / 1e3, "k")
    return f"{scaled:.3g}{unit}" if abs(scaled) < 999.5 else f"{scaled:,.0f}{unit}"


def _round_up(least: float) -> float:
    power = 10.0 ** math.floor(math.log10(least))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least * (1 - 1e-9))


def _exact(value: float) -> float:
    return float(f"{value:.12g}")
