"""The results of a run, and their JSON format."""

import json
import re
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

FORMAT = 1
NUMBERS = re.compile(r"\[[-+.,\deE\snul]*\]")  # a list of numbers, which is written on one line
Figures = Mapping[str, float | None]  # None: the event to measure never happened


class BenchmarkError(Exception):
    """The benchmarks were called in a wrong way, or cannot run on this machine."""


@dataclass
class Sample:
    """The figures of one peer in one round.

    Attributes:
        figures: Values by column.
        series: Data of plots. With several rounds, each list has the same length in all of them.
    """

    figures: Figures
    series: dict[str, list[Any]] = field(default_factory=dict)


@dataclass
class Outcome:
    """The outcome of one benchmark, by peer.

    Attributes:
        rows: Median of the rounds, for each column.
        spread: Lowest and highest round, for each column.
        series: Data of plots.
        rounds: Number of rounds.
        left_out: Peers that were not measured, with the reason.
        failures: Peers in `left_out` that failed.
        seconds: Duration of the benchmark.
    """

    rows: dict[str, Figures] = field(default_factory=dict)
    spread: dict[str, dict[str, tuple[float, float]]] = field(default_factory=dict)
    series: dict[str, dict[str, list[Any]]] = field(default_factory=dict)
    rounds: dict[str, int] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def add(self, peer: str, samples: list[Sample]) -> None:
        """Add the rounds of a peer: the median of each figure and of each point of a series."""
        self.rounds[peer] = len(samples)
        self.rows[peer] = {name: median([one.figures[name] for one in samples]) for name in samples[0].figures}
        self.spread[peer] = {
            name: (min(values), max(values))
            for name in samples[0].figures
            if (values := [value for one in samples if (value := one.figures[name]) is not None])
        }
        self.series[peer] = {name: median_series([one.series[name] for one in samples]) for name in samples[0].series}

    def failed(self, peer: str, error: Exception) -> None:
        """Record a failure. The run continues with the other peers, because it takes long."""
        self.left_out[peer] = f"failed: {error!r}"
        self.failures.append(peer)


def median_series(rounds: list[list[Any]]) -> list[Any]:
    """Return the median of each point, over the rounds that have points."""
    known = [points for points in rounds if points]
    return known[0] if len(known) == 1 else list(map(median, zip(*known, strict=True)))


def median(values: Any) -> float | None:
    """Return the median of the known values; None unless more than half are known."""
    known = [value for value in values if value is not None]
    return statistics.median(known) if 2 * len(known) > len(values) else None


@dataclass
class Results:
    """The results of one run.

    Attributes:
        command: The command line.
        began: Date and time of the start.
        seconds: Duration.
        machine: Facts about the machine.
        versions: Versions of asgi_sse, its peers and their dependencies.
        size: The fields of a `Size`.
        measures: Outcomes by the benchmark's name.
    """

    command: str
    began: str
    seconds: float
    machine: dict[str, str]
    versions: dict[str, str]
    size: dict[str, Any]
    measures: dict[str, Outcome] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        text = json.dumps({"format": FORMAT, **rounded(asdict(self))}, indent=1, allow_nan=False)
        path.write_text(NUMBERS.sub(lambda found: " ".join(found[0].split()), text) + "\n")

    @classmethod
    def load(cls, path: Path) -> "Results":
        """Load a saved run.

        Raises:
            BenchmarkError: The file cannot be read, or is not a saved run.
        """
        try:
            saved = json.loads(path.read_text())
        except OSError as error:
            raise BenchmarkError(f"cannot read {path} ({error.strerror}); pass the results.json of a report") from error
        except ValueError as error:
            raise BenchmarkError(
                f"{path} must be JSON, got an error ({error}); pass the results.json of a report"
            ) from error
        found = saved.pop("format", None) if isinstance(saved, dict) else None
        if found != FORMAT:
            raise BenchmarkError(f"{path} must have format {FORMAT}, got {found!r}; run the report again")
        try:
            measures = {name: Outcome(**outcome) for name, outcome in saved.pop("measures").items()}
            return cls(**saved, measures=measures)
        except (KeyError, TypeError) as error:
            raise BenchmarkError(
                f"{path} must be a saved report, got other content ({error}); run the report again"
            ) from error


def rounded(value: Any) -> Any:
    """Round floats to six significant digits; more would be noise and make the file longer."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {name: rounded(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(one) for one in value]
    return value
