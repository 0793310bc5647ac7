"""The report of a run in Markdown: the machine, tables, ratios, plots and findings."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .measures import MEASURES, OURS, Measure
from .results import Outcome, Results
from .sizes import Size, size_of
from .tables import NONE, listed, number, ratio, table, wrapped

if TYPE_CHECKING:
    from .plots import Plot

ONE_RUN = (
    "This page compares asgi_sse with other ways to send Server-Sent Events from Python. The command below measured "
    "all figures in one run. To write the page again from the saved figures, run "
    "`python -m benchmarks report --from benchmarks/results.json`. [SESSIONS.md](SESSIONS.md) has the output of the "
    "other nox sessions."
)
HOW = (
    "Each peer is an app as its users would write it. It runs in its own uvicorn process on one core. The client is a "
    "separate process, on a second core if the machine has one. `raw` uses no library: it sends one ASGI message per "
    "event and does nothing else. Compare ratios rather than absolute figures, and treat small differences with care. "
    "A shared machine is noisy, and figures from different machines cannot be compared."
)
GLANCE = (  # benchmarks and their columns in the first table
    ("gen", "k events/s"), ("gen200", "k events/s"), ("idle", "KiB/connection"), ("fan", "us/delivery"),
    ("pace", "us/delivery"), ("storm", "us/delivery"), ("storm", "p99 ms"), ("idle-sub", "KiB/subscriber"),
    ("hold", "us/delivery"), ("hold", "p99 ms"), ("hold", "KiB/connection"), ("hold-idle", "KiB/connection"),
)  # fmt: skip


def markdown(results: Results, plots: Sequence["Plot"] = ()) -> str:
    """Return the whole page."""
    size = size_of(results.size)
    parts = [introduction(results), glance(results)]
    explained: set[tuple[str, str]] = set()
    for name, outcome in results.measures.items():
        shown = [plot for plot in plots if plot.under == name]
        parts.append(section(name, outcome, size, shown, explained))
    return wrapped("\n\n".join(filter(None, parts))) + "\n"


def introduction(results: Results) -> str:
    """Return the title, the machine and how to read the figures."""
    seconds = results.seconds
    duration = f"- duration: {seconds / 60:.1f} minutes" if seconds >= 60 else f"- duration: {seconds:.0f} s"
    return "\n\n".join(["# Results", ONE_RUN, f"{where(results)}\n{duration}", HOW])


def where(results: Results) -> str:
    """Return the command, the machine and the versions as a list."""
    versions = ", ".join(f"{name} {version}" for name, version in results.versions.items())
    facts = {"command": f"`{results.command}`", "started": results.began, **results.machine, "versions": versions}
    return "\n".join(f"- {name}: {fact}" for name, fact in facts.items())


def glance(results: Results) -> str:
    """Return a table of the main ratios of all benchmarks."""
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
    about = (
        f"The first column is the figure of {OURS}. The others divide it by the figure of each peer: 2.00 x means "
        "twice the peer's figure, and 0.50 x means half of it."
    )
    return f"## At a glance\n\n{about}\n\n" + table(["", OURS, *(f"/ {peer}" for peer in peers)], rows)


def link(name: str) -> str:
    return f"[`{name}`](#{name})"


def compared(ours: float | None, theirs: float | None) -> str:
    return ratio(ours / theirs) if ours is not None and theirs else NONE


def section(
    name: str, outcome: Outcome, size: Size, plots: Sequence["Plot"] = (), explained: set[tuple[str, str]] | None = None
) -> str:
    """Return the section of a benchmark; ``""`` if none of its peers was selected.

    Args:
        name: The benchmark.
        outcome: Its outcome.
        size: The size of the run.
        plots: The plots of the section.
        explained: The columns that earlier sections explain. They are left out here, and this section's are added.
    """
    if not outcome.rows and not outcome.left_out:
        return ""
    measure = MEASURES[name]
    fields = size._asdict()
    parts = [f"## {name}", f"**{measure.title.format(**fields)}.** {measure.about.format(**fields)}"]
    if outcome.rows:
        explained = set() if explained is None else explained
        parts += [rounds(outcome), figures(measure, outcome), legend(measure, outcome, explained)]
        parts += measure.findings(outcome, size)
    parts += [f"![{plot.alt}](plots/{plot.file})" for plot in plots]
    parts += [f"Not measured: {peer} ({why})." for peer, why in outcome.left_out.items()]
    return "\n\n".join(filter(None, parts))


def rounds(outcome: Outcome) -> str:
    """Return how many rounds the peers were measured; ``""`` for one round."""
    most = max(outcome.rounds.values())
    if most == 1:
        return ""
    fewer = [f"{peer} ({count})" for peer, count in outcome.rounds.items() if count < most]
    text = f"The figures are the median of {most} rounds, in which the peers took turns."
    return text + (f" Peers with a very long round have fewer: {listed(fewer)}." if fewer else "")


def figures(measure: Measure, outcome: Outcome) -> str:
    """Return the table of a benchmark: a column for each peer, and the ratio to it below each compared figure."""
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
            lines.append([f"*{measure.own} / peer*", *against])
            if spread := difference(outcome, name, peers):
                lines.append(["*spread of rounds*", *spread])
    return table(["", *(f"**{peer}**" if peer == measure.own else peer for peer in peers)], lines)


def difference(outcome: Outcome, name: str, peers: Sequence[str]) -> list[str]:
    """Return by how much each peer's highest round exceeds its lowest; an empty list if there was one round."""
    if max(outcome.rounds.values()) == 1:
        return []
    spreads = [outcome.spread[peer].get(name, (0.0, 0.0)) if outcome.rounds[peer] > 1 else (0.0, 0.0) for peer in peers]
    return [f"{100 * (most / least - 1):.0f} %" if least else NONE for least, most in spreads]


def legend(measure: Measure, outcome: Outcome, explained: set[tuple[str, str]]) -> str:
    """Return the meanings of the columns that are not in `explained` yet, and add them to it."""
    measured = {name for row in outcome.rows.values() for name in row}
    lines = []
    for name, column in measure.columns.items():
        if name in measured and (name, column.meaning) not in explained:
            explained.add((name, column.meaning))
            lines.append(f"- {name}: {column.meaning}" + (f" ({column.better} is better)" if column.better else ""))
    return "\n".join(lines)
