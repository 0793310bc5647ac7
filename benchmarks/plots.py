"""Plots of a run.

They are SVG files with a transparent background. The colours are readable on white and on black.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .measures import OURS
from .results import BenchmarkError, Outcome, Results
from .tables import number

INK = "#7d7d7d"  # text and lines; contrast over 4 : 1 on white and on the usual dark themes
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
LOGARITHMIC_RATIO = 30  # largest to smallest value, above which an axis is logarithmic

Measures = dict[str, Outcome]


class Plot(NamedTuple):
    """A plot in a file.

    Attributes:
        file: The file's name.
        under: The benchmark whose section shows it.
        alt: The text for readers who cannot see it.
    """

    file: str
    under: str
    alt: str


def library() -> Any:
    """Import matplotlib and set the style of the plots.

    Returns:
        ``matplotlib.pyplot``.

    Raises:
        BenchmarkError: matplotlib is not installed.
    """
    try:
        import matplotlib as mpl  # noqa: PLC0415
        from matplotlib import pyplot as plt  # noqa: PLC0415
    except ImportError as error:
        raise BenchmarkError(
            f"cannot draw the report's plots ({error}); install matplotlib: pip install -e . --group bench"
        ) from error
    plt.switch_backend("svg")
    mpl.rcParams.update(
        {
            "svg.fonttype": "none",  # text instead of paths: a smaller file, and browsers can search it
            "svg.hashsalt": "asgi_sse",  # equal figures give equal files
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
    """Draw every plot that the run has figures for, and delete the files of the others.

    Returns:
        The plots that were drawn.

    Raises:
        BenchmarkError: matplotlib is not installed.
    """
    plt = library()
    directory.mkdir(parents=True, exist_ok=True)
    plots = []
    for name, (wanted, alt, plot) in PLOTS.items():
        path = directory / f"{name}.svg"
        path.unlink(missing_ok=True)
        available = {one: results.measures[one] for one in wanted if results.measures.get(one, Outcome()).rows}
        if figure := plot(plt, available) if available else None:
            figure.savefig(path, transparent=True, bbox_inches="tight", metadata={"Date": None, "Creator": None})
            plt.close(figure)
            plots.append(Plot(path.name, list(available)[-1], alt))
    return plots


def colour(peer: str) -> str:
    return COLOURS.get(peer, OTHER)


def logarithmic(axis: Any) -> None:
    """Make the x axis logarithmic, with labels such as 3,000 instead of powers of ten."""
    from matplotlib.ticker import LogLocator, NullLocator  # noqa: PLC0415

    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:,g}")


def panels(plt: Any, titles: Sequence[str], height: float) -> tuple[Any, list[Any]]:
    """Create a figure with one panel for each title, side by side."""
    figure, axes = plt.subplots(1, len(titles), figsize=(4.4 * max(len(titles), 1.4), height), squeeze=False)
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title)
        axis.grid(axis="x")
        axis.tick_params(length=0)
    figure.subplots_adjust(wspace=0.45 if len(titles) < 3 else 0.65)
    return figure, list(axes[0])


def bars(axis: Any, values: dict[str, float | None], unit: str) -> None:
    """Draw a labelled bar for each peer, and a line at the value of `raw`."""
    known = {peer: value for peer, value in values.items() if value is not None and value > 0}
    rows = range(len(known))[::-1]
    axis.barh(rows, list(known.values()), color=[colour(peer) for peer in known], height=0.7)
    axis.set_yticks(rows, list(known))
    for row, value in zip(rows, known.values(), strict=True):
        axis.annotate(number(value), (value, row), xytext=(3, 0), textcoords="offset points", va="center")
    if known and max(known.values()) > LOGARITHMIC_RATIO * min(known.values()):
        logarithmic(axis)
        unit += ", logarithmic"
    if raw := known.get("raw"):  # the cost of one send per event without a library
        axis.axvline(raw, color=INK, linestyle="--", linewidth=1, alpha=0.6, zorder=0)
    axis.set_xlabel(unit)
    axis.margins(x=0.18)


def barred(shown: Sequence[tuple[str, str, str]]) -> Callable[[Any, Measures], Any]:
    """Return a function that draws a panel for each benchmark, column and title."""

    def plot(plt: Any, measures: Measures) -> Any:
        available = [(measures[name], column, title) for name, column, title in shown if name in measures]
        figure, axes = panels(plt, [title for _, _, title in available], 0.36 * most_rows(measures) + 0.9)
        for axis, (outcome, column, _) in zip(axes, available, strict=True):
            bars(axis, {peer: row.get(column) for peer, row in outcome.rows.items()}, column)
        return figure

    return plot


def most_rows(measures: Measures) -> int:
    return max(len(outcome.rows) for outcome in measures.values())


def percentiles(plt: Any, measures: Measures) -> Any:
    """Draw a line from p50 to p99 for each peer."""
    figure, axes = panels(plt, list(measures), 0.36 * most_rows(measures) + 0.9)
    for axis, outcome in zip(axes, measures.values(), strict=True):
        known = {peer: row for peer, row in outcome.rows.items() if row.get("p50 ms") and row.get("p99 ms")}
        for line, (peer, row) in zip(range(len(known))[::-1], known.items(), strict=True):
            p50, p99 = row["p50 ms"], row["p99 ms"]
            axis.plot([p50, p99], [line, line], color=colour(peer), linewidth=3, alpha=0.6)
            axis.plot([p50], [line], "o", color=colour(peer))
            axis.plot([p99], [line], "D", color=colour(peer))
            axis.annotate(number(p99), (p99, line), xytext=(7, 0), textcoords="offset points", va="center")
            axis.annotate(number(p50), (p50, line), xytext=(-7, 0), textcoords="offset points", va="center", ha="right")
        axis.set_yticks(range(len(known))[::-1], list(known))
        logarithmic(axis)
        axis.set_xlabel("ms, logarithmic: p50 (circle), p99 (diamond)")
        axis.margins(x=0.35, y=0.1)
    return figure


def distribution(plt: Any, measures: Measures) -> Any:
    """Draw the cumulative distribution of the delays."""
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
    """Draw memory over time: clients connect, stay, disconnect and connect again."""
    titles = {"hold": "one event a second", "hold-idle": "idle, with keep-alive"}
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
        axis.set_xlabel("s (connections held between the dots)")
        axis.set_ylabel("resident MiB")
        axis.set_ylim(bottom=0)
        axis.grid(axis="y")
        axis.legend(loc="lower right")
    return figure


PLOTS: dict[
    str, tuple[tuple[str, ...], str, Callable[[Any, Measures], Any]]
] = {  # by file name: benchmarks, alternative text, function
    "rate": (
        ("gen", "gen200"),
        "Bars: thousands of events a second for each peer, with one client and with many",
        barred([("gen", "k events/s", "one client"), ("gen200", "k events/s", "many clients")]),
    ),
    "memory": (
        ("idle", "idle-sub"),
        "Bars: KiB of memory for each idle stream and each subscriber, by peer",
        barred([("idle", "KiB/connection", "idle stream"), ("idle-sub", "KiB/subscriber", "subscriber")]),
    ),
    "delivery": (
        ("fan", "pace", "storm"),
        "Bars: microseconds of CPU time for one delivery, by peer, at three publishing rates",
        barred([(name, "us/delivery", name) for name in ("fan", "pace", "storm")]),
    ),
    "delays": (("pace", "storm"), "Lines from the p50 to the p99 of the delivery delays, by peer", percentiles),
    "distribution": (
        ("pace", "storm"),
        "Curves: cumulative distribution of the delivery delays, by peer",
        distribution,
    ),
    "hold": (
        ("hold", "hold-idle"),
        "Curves: memory over time while clients connect, stay, disconnect and connect again",
        memory,
    ),
    "engine": (
        ("engine",),
        "Bars: time to publish one event, thousands of events a second, and p99 of the delays, by peer",
        lambda plt, measures: engine_panels(plt, measures["engine"]),
    ),
}


def engine_panels(plt: Any, outcome: Outcome) -> Any:
    columns = {"us/publish": "one after another", "k events/s": "many at once", "p99 ms": "delay"}
    figure, axes = panels(plt, list(columns.values()), 0.36 * len(outcome.rows) + 0.9)
    for axis, column in zip(axes, columns, strict=True):
        bars(axis, {peer: row.get(column) for peer, row in outcome.rows.items()}, column)
    return figure
