"""The report: a run as a Markdown page with its machine, tables, ratios and plots."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .measures import MEASURES, OURS, Measure
from .results import Outcome, Results
from .sizes import Size, size_of
from .tables import NONE, listed, number, ratio, table, wrapped

if TYPE_CHECKING:
    from .plots import Plot

ONE_RUN = (
    "One run measured all figures on this page and wrote the page. `results.json` has the raw figures; "
    "`python -m benchmarks report --from benchmarks/results.json` writes the page again. [SESSIONS.md](SESSIONS.md) has "
    "the results of the other long sessions."
)
HOW = (
    "Each peer is an app as its users would write it, in a uvicorn process of its own on one core. The client is "
    "another process, on another core if there is one. `raw` uses no library: one send for each event, and no more "
    "than ASGI needs. Trust the ratios rather than the figures, since a shared machine is noisy. Figures of two "
    "machines cannot be compared."
)
GLANCE = (  # of which measures, what
    ("gen", "k events/s"), ("gen200", "k events/s"), ("idle", "KiB/connection"), ("fan", "us/delivery"),
    ("pace", "us/delivery"), ("storm", "us/delivery"), ("storm", "p99 ms"), ("idle-sub", "KiB/subscriber"),
    ("hold", "us/delivery"), ("hold", "p99 ms"), ("hold", "KiB/connection"), ("hold-idle", "KiB/connection"),
)  # fmt: skip


def markdown(results: Results, plots: Sequence["Plot"] = ()) -> str:
    """All of it."""
    size = size_of(results.size)
    parts = [head(results), glance(results)]
    told: set[tuple[str, str]] = set()
    for name, outcome in results.measures.items():
        shown = [plot for plot in plots if plot.under == name]
        parts.append(section(name, outcome, size, shown, told))
    return wrapped("\n\n".join(filter(None, parts))) + "\n"


def head(results: Results) -> str:
    """What was run, and where."""
    seconds = results.seconds
    took = f"- took: {seconds / 60:.1f} minutes" if seconds >= 60 else f"- took: {seconds:.0f} s"
    return "\n\n".join(["# Results", ONE_RUN, f"{where(results)}\n{took}", HOW])


def where(results: Results) -> str:
    """The command, and the machine."""
    versions = ", ".join(f"{name} {version}" for name, version in results.versions.items())
    facts = {"command": f"`{results.command}`", "began": results.began, **results.machine, "versions": versions}
    return "\n".join(f"- {name}: {fact}" for name, fact in facts.items())


def glance(results: Results) -> str:
    """The ratios that matter, of all measures."""
    peers = [peer for peer in MEASURES["gen"].peers if peer != OURS]
    rows = []
    for name, column in GLANCE:
        outcome = results.measures.get(name, Outcome())
        if ours := outcome.rows.get(OURS, {}).get(column):
            against = (compared(ours, outcome.rows.get(peer, {}).get(column)) for peer in peers)
            better = MEASURES[name].columns[column].better
            rows.append([f"{link(name)}: {column} ({better} is better)", number(ours), *against])
    if not rows:
        return ""
    return "## At a glance\n\nThe figure of asgi_sse, and how many times the figure of each peer it is.\n\n" + table(
        ["", OURS, *(f"x {peer}" for peer in peers)], rows
    )


def link(name: str) -> str:
    return f"[`{name}`](#{name})"


def compared(ours: float | None, theirs: float | None) -> str:
    return ratio(ours / theirs) if ours is not None and theirs else NONE


def section(
    name: str, outcome: Outcome, size: Size, plots: Sequence["Plot"] = (), told: set[tuple[str, str]] | None = None
) -> str:
    """One measure; nothing where none of its peers was wanted. What was `told` of a figure is not said again."""
    if not outcome.rows and not outcome.left_out:
        return ""
    measure = MEASURES[name]
    fields = size._asdict()
    parts = [f"## {name}", f"**{measure.title.format(**fields)}.** {measure.about.format(**fields)}"]
    if outcome.rows:
        parts += [rounds(outcome), figures(measure, outcome), legend(measure, outcome, set() if told is None else told)]
        parts += measure.findings(outcome, size)
    parts += [f"![{plot.alt}](plots/{plot.file})" for plot in plots]
    parts += [f"Not measured: {peer}, because {why}." for peer, why in outcome.left_out.items()]
    return "\n\n".join(filter(None, parts))


def rounds(outcome: Outcome) -> str:
    """How often, and how far the rounds differ."""
    most = max(outcome.rounds.values())
    if most == 1:
        return ""
    fewer = [f"{peer} ({count})" for peer, count in outcome.rounds.items() if count < most]
    text = f"Median of {most} rounds, in which the peers took turns"
    return text + (f"; fewer rounds if one took long: {listed(fewer)}." if fewer else ".")


def figures(measure: Measure, outcome: Outcome) -> str:
    """The table: peers beside one another, and below what is compared how much of it ours has."""
    peers = list(outcome.rows)
    own = outcome.rows.get(measure.own, {})
    lines = []
    for name, column in measure.columns.items():
        values = [outcome.rows[peer].get(name) for peer in peers]
        lines.append([name, *(number(value, exact=column.exact) for value in values)])
        if column.better and len(peers) > 1 and own.get(name):
            against = [
                NONE if peer == measure.own else compared(own[name], value)
                for peer, value in zip(peers, values, strict=True)
            ]
            lines.append([f"*{measure.own} is at*", *against])
            if spread := difference(outcome, name, peers):
                lines.append(["*rounds differ by*", *spread])
    return table(["", *(f"**{peer}**" if peer == measure.own else peer for peer in peers)], lines)


def difference(outcome: Outcome, name: str, peers: Sequence[str]) -> list[str]:
    """How much more the most of a peer's rounds is than the least; nothing if there was one round."""
    if max(outcome.rounds.values()) == 1:
        return []
    spreads = [outcome.spread[peer].get(name, (0.0, 0.0)) if outcome.rounds[peer] > 1 else (0.0, 0.0) for peer in peers]
    return [f"{100 * (most / least - 1):.0f} %" if least else NONE for least, most in spreads]


def legend(measure: Measure, outcome: Outcome, told: set[tuple[str, str]]) -> str:
    """What the figures are."""
    had = {name for row in outcome.rows.values() for name in row}
    lines = []
    for name, column in measure.columns.items():
        if name in had and (name, column.meaning) not in told:
            told.add((name, column.meaning))
            lines.append(f"- {name}: {column.meaning}" + (f" ({column.better} is better)" if column.better else ""))
    return "\n".join(lines)
