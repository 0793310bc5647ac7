"""How large the measures are: as they count, and as one tries them."""

from typing import Any, NamedTuple


class Size(NamedTuple):
    """Of all measures. Titles and explanations are written with it, so that none can say what was not run.

    Attributes:
        rounds: Of each measure that is short, each with every peer in turn; the median counts.
        window: Seconds for which `gen` and `gen200` count.
        clients: Of `gen200`.
        patience: Seconds for which `gen200` waits for the first event of a client.
        idle: Connections of `idle`.
        subscribers: Of `fan`, `pace` and `storm`.
        idle_subscribers: Of `idle-sub`.
        fan_events: Published in one go.
        pace_rate: Events a second.
        pace_seconds: Seconds.
        storm_rate: Events a second.
        storm_seconds: Seconds.
        delivery: Seconds after which what is not delivered is not waited for.
        hold: Connections.
        hold_seconds: For which they are held, of asgi_sse.
        hold_peer_seconds: The same, of its peers.
        hold_rest: Seconds between the end of all and the look at what is left.
        ping: Seconds between the keep-alive comments of `hold-idle`.
        publishes: Events of a round of `engine`, one after the other.
        tasks: That publish at the same time.
        publishes_each: Events of each of them.
        engine_rate: Events a second.
        engine_seconds: Seconds.
        repeats: Of each part of `micro`; the best counts.
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
    """What a run that was saved had."""
    return Size(**figures)
