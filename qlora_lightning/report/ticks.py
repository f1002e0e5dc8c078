"""Axes: round ticks that cover a range, linear or logarithmic, and how numbers are written at them."""

import math


def linear_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Give multiples of 1, 2 or 5 times a power of ten, the first not above ``low``, the last not below ``high``."""
    span = high - low
    if span <= 0:
        span = abs(high) or 1.0
        low, high = low - span / 2, high + span / 2
    step = _round_up(span / (most - 1))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [_exact(number * step) for number in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Give powers of ten around a range of positive numbers; with 2 and 5 times them where it is short."""
    first, last = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
    if last - first > 2:
        step = -(-(last - first) // 6)
        return [_exact(10.0**power) for power in range(first, last + step, step)]
    every = [_exact(factor * 10.0**power) for power in range(first, last + 1) for factor in (1, 2, 5)]
    below, above = [tick for tick in every if tick <= low], [tick for tick in every if tick >= high]
    return [tick for tick in every if (below[-1:] or every)[0] <= tick <= (above or every[-1:])[0]]


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
