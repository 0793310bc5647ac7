"""What a run has found: as it is kept, and as JSON."""

import json
import re
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

FORMAT = 1
NUMBERS = re.compile(r"\[[-+.,\deE\snul]*\]")  # a list of them, which goes on one line
Figures = Mapping[str, float | None]  # None: it never came to that


class BenchmarkError(Exception):
    """What is wrong with how the benchmarks were called, or with where they run."""


@dataclass
class Sample:
    """One peer, once.

    Attributes:
        figures: By what they are.
        series: What a plot shows: lists of one length in all rounds, or one round alone.
    """

    figures: Figures
    series: dict[str, list[Any]] = field(default_factory=dict)


@dataclass
class Outcome:
    """One measure.

    Attributes:
        rows: Of each peer, the median of its rounds.
        spread: Of each peer, the least and the most of its rounds.
        series: Of each peer.
        rounds: Of each peer.
        left_out: Peers that were not measured, and why.
        failures: Those among them that failed.
        seconds: That all of it took.
    """

    rows: dict[str, Figures] = field(default_factory=dict)
    spread: dict[str, dict[str, tuple[float, float]]] = field(default_factory=dict)
    series: dict[str, dict[str, list[Any]]] = field(default_factory=dict)
    rounds: dict[str, int] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def add(self, peer: str, samples: list[Sample]) -> None:
        """Of several rounds the median, of each figure and each point of a series."""
        self.rounds[peer] = len(samples)
        self.rows[peer] = {name: median([one.figures[name] for one in samples]) for name in samples[0].figures}
        self.spread[peer] = {
            name: (min(values), max(values))
            for name in samples[0].figures
            if (values := [value for one in samples if (value := one.figures[name]) is not None])
        }
        self.series[peer] = {name: middle([one.series[name] for one in samples]) for name in samples[0].series}

    def failed(self, peer: str, error: Exception) -> None:
        """It goes on with the others: a run takes long."""
        self.left_out[peer] = f"it failed: {error!r}"
        self.failures.append(peer)


def middle(rounds: list[list[Any]]) -> list[Any]:
    """Of each point the median of the rounds that have any; one round is as it is."""
    known = [points for points in rounds if points]
    return known[0] if len(known) == 1 else list(map(median, zip(*known, strict=True)))


def median(values: Any) -> float | None:
    """None if most are."""
    known = [value for value in values if value is not None]
    return statistics.median(known) if 2 * len(known) > len(values) else None


@dataclass
class Results:
    """One run.

    Attributes:
        command: That gave it.
        began: Date and time.
        seconds: That it took.
        machine: What it ran on.
        versions: Of all that took part.
        size: The fields of a `Size`.
        measures: Outcomes, by the measure's name.
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
        """The run that was saved there.

        Raises:
            BenchmarkError: There is none.
        """
        try:
            saved = json.loads(path.read_text())
        except OSError as error:
            raise BenchmarkError(f"{path} cannot be read ({error.strerror}); give the JSON of a report") from error
        except ValueError as error:
            raise BenchmarkError(f"{path} is no JSON ({error}); give the JSON of a report") from error
        found = saved.pop("format", None) if isinstance(saved, dict) else None
        if found != FORMAT:
            raise BenchmarkError(f"{path} has the format {found!r}, not {FORMAT}; run the report again")
        try:
            measures = {name: Outcome(**outcome) for name, outcome in saved.pop("measures").items()}
            return cls(**saved, measures=measures)
        except (KeyError, TypeError) as error:
            raise BenchmarkError(f"{path} is not as a report saves it ({error}); run the report again") from error


def rounded(value: Any) -> Any:
    """To six significant digits: more is noise, and makes the file long."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {name: rounded(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(one) for one in value]
    return value
