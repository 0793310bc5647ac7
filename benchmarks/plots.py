"""What a run has found, drawn.

The drawings are SVG with a background that shows through, in tones that stand out on white and on black alike.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .measures import OURS
from .results import BenchmarkError, Outcome, Results
from .tables import number

INK = "#7d7d7d"  # of text and lines: over 4 : 1 on white and on the dark of the usual pages
COLOURS = {
    OURS: "#2f7fe8", "valkey": "#2f7fe8", "nats": "#0f9b8e", "memory": "#8a63d2", "raw": "#8c8c8c",
    "sse_starlette": "#d9480f", "fastapi": "#0f9b8e", "litestar": "#a855c7", "adapter": "#5ba3f5",
    f"{OURS} + 1 stuck": "#c98a00",
}  # fmt: skip
OTHER = "#9a8f7c"
LINES = {
    OURS: "-",
    "raw": "--",
    "sse_starlette": "-.",
    "fastapi": ":",
    "litestar": (0, (3, 1, 1, 1, 1, 1)),
    "adapter": (0, (6, 2)),
}
FAR_APART = 30  # times; then the axis is logarithmic

Measures = dict[str, Outcome]


class Plot(NamedTuple):
    """A drawing.

    Attributes:
        file: Its name.
        under: The measure where it stands.
        alt: What it shows, for who cannot see it.
    """

    file: str
    under: str
    alt: str


def library() -> Any:
    """matplotlib.

    Raises:
        BenchmarkError: It is not installed.
    """
    try:
        import matplotlib as mpl  # noqa: PLC0415
        from matplotlib import pyplot as plt  # noqa: PLC0415
    except ImportError as error:
        raise BenchmarkError(
            f"a report has plots, which need matplotlib ({error}); install it: pip install 'asgi-sse[bench]'"
        ) from error
    plt.switch_backend("svg")
    mpl.rcParams.update(
        {
            "svg.fonttype": "none",  # letters stay letters: the file is small, and a page's search finds them
            "svg.hashsalt": "asgi_sse",  # the same figures give the same file
            "font.family": "sans-serif",
            "font.size": 10,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.titlesize": 11,
            "axes.titlelocation": "left",
            "axes.axisbelow": True,
            "grid.alpha": 0.3,
            "legend.frameon": False,
            **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
            "grid.color": INK,
        }
    )
    return plt


def draw(results: Results, directory: Path) -> list[Plot]:
    """Draw all that it has figures for; what was drawn before and is not now is removed.

    Raises:
        BenchmarkError: matplotlib is not installed.
    """
    plt = library()
    directory.mkdir(parents=True, exist_ok=True)
    plots = []
    for name, (wanted, alt, plot) in PLOTS.items():
        path = directory / f"{name}.svg"
        path.unlink(missing_ok=True)
        there = {one: results.measures[one] for one in wanted if results.measures.get(one, Outcome()).rows}
        if figure := plot(plt, there) if there else None:
            figure.savefig(path, transparent=True, bbox_inches="tight", metadata={"Date": None, "Creator": None})
            plt.close(figure)
            plots.append(Plot(path.name, list(there)[-1], alt))
    return plots


def colour(peer: str) -> str:
    return COLOURS.get(peer, OTHER)


def logarithmic(axis: Any) -> None:
    """With ticks that are read without counting noughts."""
    from matplotlib.ticker import LogLocator, NullLocator  # noqa: PLC0415

    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:,g}")


def panels(plt: Any, titles: Sequence[str], height: float) -> tuple[Any, list[Any]]:
    """Axes beside one another."""
    figure, axes = plt.subplots(1, len(titles), figsize=(4.4 * max(len(titles), 1.4), height), squeeze=False)
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title)
        axis.grid(axis="x")
        axis.tick_params(length=0)
    figure.subplots_adjust(wspace=0.45 if len(titles) < 3 else 0.65)
    return figure, list(axes[0])


def bars(axis: Any, values: dict[str, float | None], unit: str) -> None:
    """A bar for each peer, with its figure, and a line where `raw` is."""
    known = {peer: value for peer, value in values.items() if value is not None and value > 0}
    places = range(len(known))[::-1]
    axis.barh(places, list(known.values()), color=[colour(peer) for peer in known], height=0.7)
    axis.set_yticks(places, list(known))
    for place, value in zip(places, known.values(), strict=True):
        axis.annotate(number(value), (value, place), xytext=(3, 0), textcoords="offset points", va="center")
    if known and max(known.values()) > FAR_APART * min(known.values()):
        logarithmic(axis)
        unit += ", logarithmic"
    if raw := known.get("raw"):  # what a send an event costs anybody
        axis.axvline(raw, color=INK, linestyle="--", linewidth=1, alpha=0.6, zorder=0)
    axis.set_xlabel(unit)
    axis.margins(x=0.18)


def barred(shown: Sequence[tuple[str, str, str]]) -> Callable[[Any, Measures], Any]:
    """Draws a panel of bars for each measure and figure, with its title."""

    def plot(plt: Any, measures: Measures) -> Any:
        there = [(measures[name], column, title) for name, column, title in shown if name in measures]
        figure, axes = panels(plt, [title for _, _, title in there], 0.36 * most_rows(measures) + 0.9)
        for axis, (outcome, column, _) in zip(axes, there, strict=True):
            bars(axis, {peer: row.get(column) for peer, row in outcome.rows.items()}, column)
        return figure

    return plot


def most_rows(measures: Measures) -> int:
    return max(len(outcome.rows) for outcome in measures.values())


def percentiles(plt: Any, measures: Measures) -> Any:
    """A line from p50 to p99 for each peer."""
    figure, axes = panels(plt, list(measures), 0.36 * most_rows(measures) + 0.9)
    for axis, outcome in zip(axes, measures.values(), strict=True):
        known = {peer: row for peer, row in outcome.rows.items() if row.get("p50 ms") and row.get("p99 ms")}
        for place, (peer, row) in zip(range(len(known))[::-1], known.items(), strict=True):
            p50, p99 = row["p50 ms"], row["p99 ms"]
            axis.plot([p50, p99], [place, place], color=colour(peer), linewidth=3, alpha=0.6)
            axis.plot([p50], [place], "o", color=colour(peer))
            axis.plot([p99], [place], "D", color=colour(peer))
            axis.annotate(number(p99), (p99, place), xytext=(7, 0), textcoords="offset points", va="center")
            axis.annotate(
                number(p50), (p50, place), xytext=(-7, 0), textcoords="offset points", va="center", ha="right"
            )
        axis.set_yticks(range(len(known))[::-1], list(known))
        logarithmic(axis)
        axis.set_xlabel("ms, logarithmic: p50 (circle), p99 (diamond)")
        axis.margins(x=0.35, y=0.1)
    return figure


def distribution(plt: Any, measures: Measures) -> Any:
    """Which share of the deliveries took at most so long."""
    figure, axes = panels(plt, list(measures), 3.2)
    peers: dict[str, Any] = {}
    for axis, outcome in zip(axes, measures.values(), strict=True):
        for peer, series in outcome.series.items():
            if values := series.get("delays ms"):
                shares = [100 * step / (len(values) - 1) for step in range(len(values))]
                (line,) = axis.plot(values, shares, color=colour(peer), linestyle=LINES.get(peer, "-"), linewidth=1.8)
                peers.setdefault(peer, line)
        logarithmic(axis)
        axis.set_xlabel("delay in ms, logarithmic")
        axis.set_ylabel("% of deliveries")
        axis.grid(axis="y")
    if not peers:
        return None
    figure.legend(
        peers.values(), peers.keys(), loc="upper center", ncols=min(len(peers), 4), bbox_to_anchor=(0.5, -0.06)
    )
    return figure


def memory(plt: Any, measures: Measures) -> Any:
    """Over time: all come, are held, leave, and come again."""
    titles = {"hold": "an event a second", "hold-idle": "idle, kept alive"}
    figure, axes = panels(plt, [titles[name] for name in measures], 3.2)
    for axis, outcome in zip(axes, measures.values(), strict=True):
        for peer, series in outcome.series.items():
            if samples := series.get("memory MiB"):
                seconds, mib = zip(*samples, strict=True)
                axis.plot(seconds, mib, color=colour(peer), linestyle=LINES.get(peer, "-"), linewidth=1.8, label=peer)
                begin, end = series["held s"]
                held = [sample for sample in samples if begin <= sample[0] <= end]
                for at, size in (held[0], held[-1]):
                    axis.plot([at], [size], "o", color=colour(peer), markersize=4)
        axis.set_xlabel("s (held between the dots)")
        axis.set_ylabel("resident MiB")
        axis.set_ylim(bottom=0)
        axis.grid(axis="y")
        axis.legend(loc="lower right")
    return figure


PLOTS: dict[str, tuple[tuple[str, ...], str, Callable[[Any, Measures], Any]]] = {  # by file: of what, and what it shows
    "rate": (
        ("gen", "gen200"),
        "Bars: thousands of events a second of each peer, with one client and with many",
        barred([("gen", "k events/s", "one client"), ("gen200", "k events/s", "many clients")]),
    ),
    "memory": (
        ("idle", "idle-sub"),
        "Bars: KiB of memory of each peer for an idle connection, and for a subscriber",
        barred([("idle", "KiB/connection", "an idle stream"), ("idle-sub", "KiB/subscriber", "a subscriber")]),
    ),
    "delivery": (
        ("fan", "pace", "storm"),
        "Bars: microseconds of CPU time for one delivery, of each peer, at three paces",
        barred([(name, "us/delivery", name) for name in ("fan", "pace", "storm")]),
    ),
    "delays": (("pace", "storm"), "The p50 and the p99 of the delays of each peer", percentiles),
    "distribution": (("pace", "storm"), "Which share of deliveries took at most so long, of each peer", distribution),
    "hold": (("hold", "hold-idle"), "Memory over time, while connections come, are held, leave and come again", memory),
    "engine": (
        ("engine",),
        "Bars: thousands of events that are acknowledged in a second, and the p99 of their delays, of each engine",
        lambda plt, measures: engine_panels(plt, measures["engine"]),
    ),
}


def engine_panels(plt: Any, outcome: Outcome) -> Any:
    columns = {"us/publish": "one after the other", "k events/s": "many at once", "p99 ms": "delay"}
    figure, axes = panels(plt, list(columns.values()), 0.36 * len(outcome.rows) + 0.9)
    for axis, column in zip(axes, columns, strict=True):
        bars(axis, {peer: row.get(column) for peer, row in outcome.rows.items()}, column)
    return figure
