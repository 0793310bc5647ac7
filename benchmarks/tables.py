"""Formatting of figures, and Markdown tables."""

import math
import textwrap
from collections.abc import Iterable, Sequence

NONE = "-"  # in place of a missing figure


def number(value: float | None, *, exact: bool = False) -> str:
    """Return a figure with three significant digits, or as a whole number from 1,000 up.

    An exact figure is cut after two decimals instead, so that 99.999 does not become 100.
    """
    if value is None:
        return NONE
    if exact:
        return f"{math.floor(value * 100) / 100:.2f}"
    if value == 0:
        return "0"
    if abs(value) >= 999.5:
        return f"{value:,.0f}"
    places = max(0, 2 - math.floor(math.log10(abs(value))))
    text = f"{value:.{min(places, 5)}f}"
    return text if value != round(value) else f"{value:.0f}"


def ratio(value: float) -> str:
    """Return a ratio as text, such as ``"2.00 x"``."""
    places = 2 if value >= 0.1 else min(5, 1 - math.floor(math.log10(value))) if value > 0 else 0
    return f"{value:,.{0 if value >= 100 else 1 if value >= 10 else places}f} x"


def listed(names: Sequence[str]) -> str:
    """Return names as an enumeration, such as ``"a, b and c"``."""
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]])) if names else ""


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table with aligned columns, so that it is readable as plain text too."""
    lines = [list(header), *map(list, rows)]
    widths = [max(3, *(len(line[column]) for line in lines)) for column in range(len(header))]
    cells = [
        [
            text.ljust(width) if column == 0 else text.rjust(width)
            for column, (text, width) in enumerate(zip(line, widths, strict=True))
        ]
        for line in lines
    ]
    rule = ["-" * width if column == 0 else "-" * (width - 1) + ":" for column, width in enumerate(widths)]
    return "\n".join("| " + " | ".join(line) + " |" for line in (cells[0], rule, *cells[1:]))


def small_table(name: str, at: Sequence[str], unit: str, values: Sequence[str]) -> str:
    """Return a table with one row of values."""
    return table([name, *at], [[unit, *values]])


def wrapped(text: str) -> str:
    """Wrap paragraphs and list items at 120 characters, and keep tables, headings and images."""
    return "\n".join(
        line
        if line.startswith(("|", "#", "!"))
        else textwrap.fill(
            line,
            120,
            subsequent_indent="  " if line.startswith("- ") else "",
            break_long_words=False,
            break_on_hyphens=False,
        )
        for line in text.splitlines()
    )
