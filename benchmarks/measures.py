"""Every benchmark: what it does, what its figures mean, and what the report says about its outcome.

The texts contain no measured figures. Sizes come from the `Size` of the run, and the rest is computed from its outcome.
"""

import importlib.util
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from typing import NamedTuple

from . import engine
from .broadcast import FAN_ROUNDS, SAMPLE, fan, idle_sub, pace, storm
from .hold import hold, hold_idle
from .micro import micro
from .results import BenchmarkError, Outcome, Sample
from .server import PEERS
from .sizes import Size
from .sources import gen, gen200, idle
from .tables import listed, number, ratio, small_table

OURS = "asgi_sse"
STUCK = f"{OURS} + 1 stuck"
LONG_ROUND_S = 10.0  # a peer whose round takes longer is not measured again


class Column(NamedTuple):
    """A figure of a benchmark.

    Attributes:
        meaning: What the figure is.
        better: ``"more"`` or ``"less"`` if peers are compared by it; ``""`` if not.
        exact: Cut the digits instead of rounding up, so that 99.999 % does not become 100 %.
    """

    meaning: str
    better: str = ""
    exact: bool = False


Columns = dict[str, Column]
Findings = Callable[[Outcome, Size], list[str]]


def no_findings(outcome: Outcome, size: Size) -> list[str]:
    return []


class Measure(NamedTuple):
    """A benchmark.

    Attributes:
        title: One line, with fields of the size in braces.
        about: What it does and why, with the same fields.
        columns: The rows of its table.
        run: Measures the given peers.
        peers: The peers that it measures.
        own: The peer that the others are compared with.
        findings: Returns paragraphs about an outcome.
    """

    title: str
    about: str
    columns: Columns
    run: Callable[[list[str], Size], Outcome]
    peers: tuple[str, ...] = tuple(PEERS)
    own: str = OURS
    findings: Findings = no_findings


def in_turn(measure: Callable[[str, Size], Sample], *, rounds: bool = True) -> Callable[[list[str], Size], Outcome]:
    """Return a function that measures every peer once a round.

    The peers take turns, so a disturbance of the machine does not hit all the rounds of one peer.
    """

    def run(peers: list[str], size: Size) -> Outcome:
        outcome = Outcome()
        samples: dict[str, list[Sample]] = {}
        done: set[str] = set()
        for _ in range(size.rounds if rounds else 1):
            for peer in peers:
                if peer in done:
                    continue
                began = time.perf_counter()
                try:
                    samples.setdefault(peer, []).append(measure(peer, size))
                except BenchmarkError:
                    raise
                except Exception as error:
                    traceback.print_exc()
                    outcome.failed(peer, error)
                    done.add(peer)
                if time.perf_counter() - began > LONG_ROUND_S:
                    done.add(peer)
        for peer in peers:
            if peer in samples and peer not in outcome.left_out:
                outcome.add(peer, samples[peer])
        return outcome

    return run


def measured(name: str, size: Size, peers: Sequence[str] | None = None) -> Outcome:
    """Run a benchmark with its peers that are selected and installed."""
    measure = MEASURES[name]
    wanted = [peer for peer in measure.peers if peers is None or peer.partition(" ")[0] in peers]
    absent = {peer: PEERS[peer] for peer in wanted if peer in PEERS and not importlib.util.find_spec(PEERS[peer])}
    began = time.perf_counter()
    outcome = measure.run([peer for peer in wanted if peer not in absent], size)
    outcome.left_out |= {peer: f"{module} is not installed" for peer, module in absent.items()}
    outcome.seconds = time.perf_counter() - began
    for peer, why in outcome.left_out.items():
        print(f"{name}: {peer} was not measured: {why}", file=sys.stderr)
    return outcome


# Findings


def gen_findings(outcome: Outcome, size: Size) -> list[str]:
    busy = [peer for peer, row in outcome.rows.items() if (row["client CPU %"] or 0) > 90]
    if not busy:
        return []
    return [
        f"The client used over 90 % of its core with {listed(busy)}. These servers may be a little faster than shown."
    ]


def gen200_findings(outcome: Outcome, size: Size) -> list[str]:
    starved = [peer for peer, row in outcome.rows.items() if (row["started"] or 0) < size.clients]
    if not starved:
        return ["With every peer, all clients received their first event."]
    started = listed([f"{number(outcome.rows[peer]['started'])} ({peer})" for peer in starved])
    never = [peer for peer in starved if outcome.rows[peer]["newcomer s"] is None]
    text = (
        f"Of {size.clients} clients, only {started} received an event within {size.patience:g} s. A source that never "
        "waits starves all other clients there."
    )
    return [text + (f" With {listed(never)}, the newcomer never received an event." if never else "")]


def fan_findings(outcome: Outcome, size: Size) -> list[str]:
    slow = [peer for peer, row in outcome.rows.items() if (row["delivered %"] or 0) < 100]
    text = (
        f"{listed(slow)} did not deliver all events within {size.delivery:g} s."
        if slow
        else "Every peer delivered all events."
    )
    if OURS in outcome.rows:
        text += (
            f" asgi_sse sends {size.subscribers:,} messages of up to {size.fan_events} events. The others send "
            f"{size.subscribers * size.fan_events:,} messages, which explains most of the difference. Events that are "
            "published with pauses in between do not have this advantage (see `pace`)."
        )
    return [text]


def pace_findings(outcome: Outcome, size: Size) -> list[str]:
    return [
        (
            "A send costs more than in `fan`, for `raw` too. The server sleeps between events, so it presumably finds "
            "little of its clients' state in the CPU caches. Every send also wakes the client."
        )
    ]


def storm_findings(outcome: Outcome, size: Size) -> list[str]:
    text = f"The schedule requires {size.subscribers * size.storm_rate:,} deliveries a second."
    if row := outcome.rows.get(OURS):
        lag_s = (row["seconds"] or 0) - size.storm_seconds
        if lag_s < 1:
            text += (
                f" asgi_sse keeps up and leaves {100 - (row['server CPU %'] or 0):.0f} % of the core free. After a "
                "long round of sends it pauses for as long as the round took, so several events leave in one message."
            )
        else:
            text += f" asgi_sse finishes {number(lag_s)} s late."
    paragraphs = [text]
    slow = {
        peer: row for peer, row in outcome.rows.items() if peer not in {OURS, STUCK} and (row["max ms"] or 0) > 1000
    }
    if slow:
        delays = [
            f"`{peer}` {number((row['p50 ms'] or 0) / 1000)} s ({number((row['max ms'] or 0) / 1000)} s)"
            for peer, row in slow.items()
        ]
        paragraphs.append(f"These peers do not keep up, by p50 (and maximum) of their delays: {listed(delays)}.")
    incomplete = [
        f"`{peer}` had delivered {number(row['delivered %'])} %"
        for peer, row in outcome.rows.items()
        if (row["delivered %"] or 0) < 100
    ]
    if incomplete:
        paragraphs.append(
            f"{size.delivery:g} s after the last event, {listed(incomplete)} of the events. The delays in the table "
            "cover only delivered events, so they are too low."
        )
    return paragraphs


def hold_findings(outcome: Outcome, size: Size) -> list[str]:
    paragraphs = [memory_over_time(outcome)]
    row = outcome.rows.get(OURS)
    if row is None:
        return paragraphs
    seconds, grown = size.hold_seconds, (row["end MiB"] or 0) - (row["full MiB"] or 0)
    text = (
        f"asgi_sse held {number(row['held'])} of {size.hold:,} connections for {seconds} s. Its memory went from "
        f"{number(row['full MiB'])} to {number(row['end MiB'])} MiB ({grown:+.2f} MiB)."
    )
    if "delivered %" in row:
        text += (
            f" Every client received all {seconds} events, after {number(row['p50 ms'])} ms (p50) and "
            f"{number(row['p99 ms'])} ms (p99)."
            if row["delivered %"] == 100
            else f" It delivered {number(row['delivered %'], exact=True)} % of the events."
        )
    else:
        text += f" Every client received at least {number(row['fewest pings'])} keep-alive comments."
    paragraphs.append(text)
    if row["gone s"] is None:
        paragraphs.append("asgi_sse did not release all connections.")
    else:
        paragraphs.append(
            f"{number(row['gone s'])} s after all clients had disconnected, the registry held "
            f"{number(row['streams left'])} streams and the broker {number(row['subscribers left'])} subscribers. "
            f"{number(row['blocks left %'])} % of the memory blocks that Python had allocated for the connections were "
            f"still in use. Resident memory was {number(row['after MiB'])} MiB, against {number(row['base MiB'])} MiB "
            "at the start, because the allocators keep freed memory for later. When the same number of clients "
            f"connected again, it rose to {number(row['again MiB'])} MiB."
        )
    return paragraphs


def memory_over_time(outcome: Outcome) -> str:
    """Return the data of the memory plot as tables."""
    parts = []
    for peer, series in outcome.series.items():
        begin, end = series["held s"]
        held = [(seconds - begin, mib) for seconds, mib in series["memory MiB"] if begin <= seconds <= end]
        step = max(1, round(held[-1][0] / 6))
        shown = [min(held, key=lambda one: abs(one[0] - at)) for at in range(0, round(held[-1][0]) + 1, step)]
        parts.append(
            small_table(f"{peer}, s", [f"{at:.0f}" for at, _ in shown], "MiB", [f"{mib:.1f}" for _, mib in shown])
        )
    return "Resident memory by seconds since the last client connected:\n\n" + "\n\n".join(parts)


def engine_findings(outcome: Outcome, size: Size) -> list[str]:
    paragraphs = [
        "What each peer guarantees when publishing returns:\n\n"
        + "\n".join(f"- `{peer}`: {engine.PEERS[peer].about}." for peer in outcome.rows),
    ]
    streams = [peer for peer in ("litestar-stream", "broadcaster-stream") if peer in outcome.rows]
    if "valkey" in outcome.rows and streams:
        row = outcome.rows["valkey"]

        def against(name: str) -> str:
            values = sorted((row[name] or 0) / (outcome.rows[peer][name] or float("inf")) for peer in streams)
            return " to ".join(dict.fromkeys(map(ratio, values)))

        paragraphs.append(
            "The guarantees differ. Compare `valkey` with the two peers that store events in a stream, not with those "
            f"that keep nothing. To publish one event at a time, asgi_sse takes {against('us/publish')} their time. "
            "Its script gives the event an id in one sequence for all channels, writes it to two streams and remembers "
            "the reply. Most of the remaining time is spent in redis-py, about equally for publishing the event and "
            f"for reading it back. Delivery to the subscribers takes {against('p50 ms')} their time (p50). With many "
            f"events at once, asgi_sse publishes {against('k events/s')} as many, because one call carries up to 64. "
            "Without hiredis the rate would be far lower: each event comes back as 11 strings, and parsing them then "
            "takes most of the CPU time."
        )
    return paragraphs


CPU: Columns = {
    "server CPU %": Column("share of one core; at 100 the server is the limit"),
    "client CPU %": Column("share of one core; near 100 the client may be the limit, and the server could do more"),
}
PER_CLIENT = "the server's resident memory for each, without the kernel's socket buffers"
DELIVERY_COST = "CPU time of the server in microseconds, for one event to one subscriber"
PUBLISHER_DELAY = "the longest delay of the publisher behind its schedule"
DELAYS: Columns = {
    "p50 ms": Column(
        "half of the deliveries took no longer, from publishing to the client's read; measured at one subscriber in "
        f"{SAMPLE}"
    ),
    "p99 ms": Column("99 of 100 deliveries took no longer", "less"),
    "max ms": Column("the slowest delivery"),
}
DELIVERED: Columns = {
    "delivered %": Column("share of all events to all subscribers; 100 means that none is missing", exact=True)
}
HELD: Columns = {
    "held": Column("connections that were still open at the end"),
    **DELIVERED,
    **DELAYS,
    "us/delivery": Column(DELIVERY_COST, "less"),
    "fewest pings": Column("keep-alive comments that the client with the fewest received"),
    **CPU,
    "base MiB": Column("resident memory of the server after a warm-up, without connections"),
    "full MiB": Column("resident memory when all clients have connected"),
    "end MiB": Column("resident memory at the end of the holding time"),
    "KiB/connection": Column(PER_CLIENT, "less"),
    "slope B/s/connection": Column(
        "memory growth while the connections are held, in bytes a second for each connection; a straight line fitted "
        "to the samples, so 0 means no growth"
    ),
    "gone s": Column("time from the last client's disconnect until the server has closed all connections"),
    "streams left": Column("streams in the server's registry after that; `-` for a peer without a registry"),
    "subscribers left": Column("subscribers in the broker, or in the list of queues, after that"),
    "blocks left %": Column(
        "share of the memory blocks allocated by Python for the connections that is still in use after that"
    ),
    "after MiB": Column(
        "resident memory after that; it includes freed blocks, which Python and the C library keep for later"
    ),
    "again MiB": Column(
        "resident memory when the same number of clients has connected again; if freed memory is reused, it equals "
        "full MiB"
    ),
}
BROADCAST = (
    "One channel, many subscribers. asgi_sse uses its `Broker`. The others use an unbounded `asyncio.Queue` for each "
    "subscriber, as their users would write it. `raw` encodes each event only once. An event is an id and about 50 "
    "bytes of JSON, which contain the time of publishing. Both processes read the same clock."
)

MEASURES: dict[str, Measure] = {
    "micro": Measure(
        "Steps of the hot path, one by one",
        "Each step runs in one process without a server. A figure is microseconds, the best of {repeats} runs.",
        {
            "encode us": Column("`encode()` of an existing one-line event"),
            "build+encode us": Column("create the event and encode it"),
            "item: dict us": Column("encode a `dict` that a source yields"),
            "item: str us": Column("encode a `str` that a source yields"),
            "decode us": Column("decode one event with `EventDecoder`, from 10,000 in a single chunk"),
            "overhead us": Column("the time that `SSEMiddleware` adds to a request for anything but an event stream"),
        },
        micro,
        (OURS,),
    ),
    "gen": Measure(
        "One client, a source that never waits",
        "The source produces events as fast as the server takes them. `raw` yields to the event loop after each send, "
        "or no other task would run. It shows the lowest cost of one send per event; a peer that batches events can "
        "be faster. `adapter` is the drop-in replacement for sse-starlette. Like the original, it sends one message "
        "per event and never reads ahead of the client, so it gains nothing from batching.",
        {"k events/s": Column("thousands of events a second that the client received", "more"), **CPU},
        in_turn(gen),
        findings=gen_findings,
    ),
    "gen200": Measure(
        "{clients} clients with a source each, then one newcomer",
        "No source ever waits. Each client, and then the newcomer, has {patience:g} s to receive its first event.",
        {
            "k events/s": Column("thousands of events a second that all clients together received", "more"),
            "slowest / mean": Column("events of the slowest client, divided by the mean of all clients; 1 is fair"),
            "started": Column("clients that received an event in time"),
            "client CPU %": CPU["client CPU %"],
            "newcomer s": Column("seconds until one more client receives its first event"),
        },
        in_turn(gen200),
        findings=gen200_findings,
    ),
    "idle": Measure(
        "Memory of a server that holds {idle:,} idle streams",
        "Each stream has sent one event. Peers that have a keep-alive use it, with its default interval.",
        {
            "KiB/connection": Column(PER_CLIENT, "less"),
            "started": Column("streams that sent their event"),
        },
        in_turn(idle, rounds=False),
    ),
    "fan": Measure(
        "{subscribers:,} subscribers, {fan_events} events published at once",
        f"{BROADCAST} The figures are the median of {FAN_ROUNDS} repetitions on one server.",
        {
            "us/delivery": Column(DELIVERY_COST, "less"),
            "seconds": Column("until every subscriber has all events, or the wait ends", "less"),
            **DELIVERED,
            **CPU,
        },
        in_turn(fan, rounds=False),
        findings=fan_findings,
    ),
    "pace": Measure(
        "{subscribers:,} subscribers, {pace_rate} events a second for {pace_seconds} seconds",
        "Like `fan`, but the server sends each event to each client on its own.",
        {
            "us/delivery": Column(DELIVERY_COST, "less"),
            **{name: DELAYS[name] for name in ("p50 ms", "p99 ms")},
            **DELIVERED,
            **CPU,
        },
        in_turn(pace),
        findings=pace_findings,
    ),
    "storm": Measure(
        "{subscribers:,} subscribers, {storm_rate} events a second for {storm_seconds} seconds",
        f"Like `pace`, at a high rate. `{STUCK}` adds a client that reads nothing, so its send is blocked from the "
        "start. The other clients should not notice. The benchmark waits up to {delivery:g} s after the last event.",
        {
            "us/delivery": Column(DELIVERY_COST, "less"),
            **DELAYS,
            "late ms": Column(f"{PUBLISHER_DELAY}; delivery delays start at the actual publishing"),
            **DELIVERED,
            "seconds": Column("until every subscriber has all events, or the wait ends", "less"),
            **CPU,
        },
        in_turn(storm, rounds=False),
        (*PEERS, STUCK),
        findings=storm_findings,
    ),
    "idle-sub": Measure(
        "Memory of a server with {idle_subscribers:,} idle subscribers",
        "Each subscriber has received one event. A subscription of asgi_sse needs no task and no queue. The others "
        "use an `asyncio.Queue`.",
        {
            "KiB/subscriber": Column(PER_CLIENT, "less"),
            "subscribed": Column("subscribers that are connected"),
        },
        in_turn(idle_sub, rounds=False),
    ),
    "hold": Measure(
        "{hold:,} subscribers held for {hold_seconds} seconds, one event a second",
        "One uvicorn worker with one channel; the clients run in another process. The peers hold their connections for "
        "only {hold_peer_seconds} s. Then all clients disconnect at once, and the same number connects again.",
        {name: column for name, column in HELD.items() if name != "fewest pings"},
        in_turn(hold, rounds=False),
        ("raw", "sse_starlette", OURS),
        findings=hold_findings,
    ),
    "hold-idle": Measure(
        "{hold:,} idle streams held for {hold_seconds} seconds, with keep-alive",
        "Like `hold`, but the source yields one event and then nothing. The server sends a keep-alive comment after "
        "{ping:g} s of silence. sse_starlette holds its connections for {hold_peer_seconds} s. `raw` has no "
        "keep-alive, so it is not measured.",
        {name: column for name, column in HELD.items() if name not in {*DELIVERED, *DELAYS, "us/delivery"}},
        in_turn(hold_idle, rounds=False),
        ("sse_starlette", OURS),
        findings=hold_findings,
    ),
    "engine": Measure(
        f"Publishing to a backend, and delivery to {engine.SUBSCRIBERS} subscribers",
        "One process publishes and subscribes; the backend's server has a core of its own. With one subscriber, the "
        "process publishes {publishes:,} events one after another, then {tasks} tasks publish {publishes_each} events "
        "each. Both take the time until the events are acknowledged, as the median of {rounds} rounds. Then "
        f"{engine.SUBSCRIBERS} subscribers receive {{engine_rate}} events a second for {{engine_seconds}} seconds. An "
        "event is 200 bytes of JSON, and a subscriber is an `async for`. All peers use uvloop, and those on Redis the "
        "same redis-py with hiredis. Valkey writes nothing to disk. NATS writes to disk without waiting for it.",
        {
            "us/publish": Column("microseconds until an event is acknowledged, published one after another", "less"),
            "k events/s": Column("thousands of events a second that are acknowledged, published by many tasks", "more"),
            "p50 ms": Column("half of the deliveries took no longer, from just before publishing", "less"),
            "p99 ms": Column("99 of 100 deliveries took no longer", "less"),
            "delivered %": Column("share of all events to all subscribers", exact=True),
            "late ms": Column(PUBLISHER_DELAY),
            "CPU %": Column("share of one core that the process uses"),
            "engine CPU %": Column("share of one core that the backend's server uses"),
        },
        engine.engine,
        tuple(engine.PEERS),
        "valkey",
        engine_findings,
    ),
}
