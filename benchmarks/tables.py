"""Figures as text, and tables of them in Markdown."""

import math
import textwrap
from collections.abc import Iterable, Sequence

NONE = "-"  # what has no figure


def number(value: float | None, *, exact: bool = False) -> str:
    """Three digits; all of a thousand. One that is exact is cut behind two places, so that 99.999 is not 100."""
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
    """How many times as much."""
    places = 2 if value >= 0.1 else min(5, 1 - math.floor(math.log10(value))) if value > 0 else 0
    return f"{value:,.{0 if value >= 100 else 1 if value >= 10 else places}f} x"


def listed(names: Sequence[str]) -> str:
    """A, b and c."""
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]])) if names else ""


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Its first column to the left, all else to the right; as wide as it has to be, to be read as it is, too."""
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
    """Two lines."""
    return table([name, *at], [[unit, *values]])


def wrapped(text: str) -> str:
    """Each paragraph and item of a list as wide as the other pages are; tables as they are."""
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
