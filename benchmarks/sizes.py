"""The sizes of the benchmarks: for a real run, and for a quick try."""

from typing import Any, NamedTuple


class Size(NamedTuple):
    """The sizes of all benchmarks. Titles and explanations are formatted with them, so the report matches the run.

    Attributes:
        rounds: Rounds of each short benchmark, in which the peers take turns. The report has the median.
        window: Seconds for which `gen` and `gen200` count events.
        clients: Clients of `gen200`.
        patience: Seconds for which `gen200` waits for the first event of each client.
        idle: Connections of `idle`.
        subscribers: Subscribers of `fan`, `pace` and `storm`.
        idle_subscribers: Subscribers of `idle-sub`.
        fan_events: Events that `fan` publishes at once.
        pace_rate: Events a second in `pace`.
        pace_seconds: Seconds of `pace`.
        storm_rate: Events a second in `storm`.
        storm_seconds: Seconds of `storm`.
        delivery: Seconds to wait for deliveries after the last event.
        hold: Connections of `hold` and `hold-idle`.
        hold_seconds: Seconds for which asgi_sse holds them.
        hold_peer_seconds: Seconds for which the peers hold them.
        hold_rest: Seconds between the end of all connections and the next look at memory.
        ping: Seconds between the keep-alives of `hold-idle`.
        publishes: Events that a round of `engine` publishes one after another.
        tasks: Tasks of `engine` that publish at the same time.
        publishes_each: Events that each task publishes.
        engine_rate: Events a second while `engine` measures delays.
        engine_seconds: Seconds for which `engine` measures delays.
        repeats: Repetitions of each step of `micro`. The report has the best.
    """

    rounds: int = 3
    window: float = 1.5
    clients: int = 200
    patience: float = 5.0
    idle: int = 2000
    subscribers: int = 1000
    idle_subscribers: int = 2000
    fan_events: int = 200
    pace_rate: int = 10
    pace_seconds: int = 3
    storm_rate: int = 200
    storm_seconds: int = 5
    delivery: float = 30.0
    hold: int = 5000
    hold_seconds: int = 60
    hold_peer_seconds: int = 20
    hold_rest: float = 3.0
    ping: float = 15.0
    publishes: int = 1000
    tasks: int = 50
    publishes_each: int = 100
    engine_rate: int = 500
    engine_seconds: int = 4
    repeats: int = 7


FULL = Size()
QUICK = Size(
    rounds=1, window=0.3, clients=20, patience=0.5, idle=100, subscribers=50, idle_subscribers=100, fan_events=50,
    pace_seconds=1, storm_seconds=1, delivery=5.0, hold=300, hold_seconds=4, hold_peer_seconds=2, hold_rest=0.5,
    ping=1.0, publishes=100, tasks=10, publishes_each=20, engine_rate=100, engine_seconds=1, repeats=1,
)  # fmt: skip


def size_of(figures: dict[str, Any]) -> Size:
    """Return the size of a saved run."""
    return Size(**figures)
