"""Numbers in the form that people read."""

from __future__ import annotations

import math

import pandas as pd


def percent(share: float) -> str:
    """A share in [0, 1] as a percentage: 65.7 %."""
    return f"{100 * share:.1f} %"


def percentage_points(difference: float, sign: str = "+") -> str:
    """A difference of shares in percentage points; a gain bears `sign`."""
    return f"{100 * difference:{sign}.1f}".replace("-", "\N{MINUS SIGN}")


def human_count(n: float | None) -> str:
    """A number of parameters: 17.1 M."""
    if n is None or pd.isna(n):
        return "–"
    for size, unit in ((1e9, " B"), (1e6, " M"), (1e3, " k")):
        if n >= size:
            return f"{n / size:.1f}{unit}"
    return str(int(n))


def human_duration(seconds: float) -> str:
    """41 s, 2 min 5 s, 3 h 20 min."""
    for size, below, unit, smaller in ((3600, 60, "h", "min"), (60, 1, "min", "s")):
        if seconds >= size:
            return f"{int(seconds // size)} {unit} {int(seconds % size // below)} {smaller}"
    return f"{seconds:.0f} s"


def human_dollars(dollars: float) -> str:
    """US dollars with cents from one dollar on, below with two digits: $12.50, $0.031."""
    if dollars >= 1 or dollars <= 0:
        return f"${dollars:,.2f}"
    return f"${dollars:.{1 - math.floor(math.log10(dollars))}f}"


def human_ratio(ratio: float) -> str:
    """A ratio with one decimal below 20, without above: 7.7, 31."""
    return f"{ratio:.0f}" if ratio >= 20 else f"{ratio:.1f}"


def human_milliseconds(milliseconds: float) -> str:
    """A duration in milliseconds, with one decimal below 10."""
    return f"{milliseconds:.0f} ms" if milliseconds >= 10 else f"{milliseconds:.1f} ms"


def p_value(p: float) -> str:
    """A p value with three decimals, or a bound when it is smaller."""
    return f"p = {p:.3f}" if p >= 0.0005 else "p < 0.001"
