"""All measures: what each of them does, what its figures mean, and what is to be said of a run.

No figure stands in the text: sizes come from the `Size` of the run, all else is computed from its outcome.
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
LONG = 10.0  # seconds; a peer of which a round takes as long is not measured again


class Column(NamedTuple):
    """A figure.

    Attributes:
        meaning: What it is.
        better: ``"more"`` or ``"less"``, if it is compared.
        exact: Whether no digit of it may be rounded up, as of what is 100 % or not.
    """

    meaning: str
    better: str = ""
    exact: bool = False


Columns = dict[str, Column]
Findings = Callable[[Outcome, Size], list[str]]


def nothing(outcome: Outcome, size: Size) -> list[str]:
    return []


class Measure(NamedTuple):
    """One of them.

    Attributes:
        title: A line, with the fields of the size in braces.
        about: What it does, and why so, in the same way.
        columns: Of its table.
        run: Gives the outcome of some of its peers.
        peers: Of whom it is.
        own: Which of them the others are compared with.
        findings: What is to be said of an outcome, as paragraphs.
    """

    title: str
    about: str
    columns: Columns
    run: Callable[[list[str], Size], Outcome]
    peers: tuple[str, ...] = tuple(PEERS)
    own: str = OURS
    findings: Findings = nothing


def in_turn(measure: Callable[[str, Size], Sample], *, rounds: bool = True) -> Callable[[list[str], Size], Outcome]:
    """One peer after the other, and all of them again: what disturbs the machine for a while is not of one alone."""

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
                if time.perf_counter() - began > LONG:
                    done.add(peer)
        for peer in peers:
            if peer in samples and peer not in outcome.left_out:
                outcome.add(peer, samples[peer])
        return outcome

    return run


def measured(name: str, size: Size, peers: Sequence[str] | None = None) -> Outcome:
    """Run it, with those of its peers that are wanted and installed."""
    measure = MEASURES[name]
    wanted = [peer for peer in measure.peers if peers is None or peer.partition(" ")[0] in peers]
    absent = {peer: PEERS[peer] for peer in wanted if peer in PEERS and not importlib.util.find_spec(PEERS[peer])}
    began = time.perf_counter()
    outcome = measure.run([peer for peer in wanted if peer not in absent], size)
    outcome.left_out |= {peer: f"{module} is not installed" for peer, module in absent.items()}
    outcome.seconds = time.perf_counter() - began
    for peer, why in outcome.left_out.items():
        print(f"{name}: {peer} is left out, {why}", file=sys.stderr)
    return outcome


# What is to be said of an outcome


def of_gen(outcome: Outcome, size: Size) -> list[str]:
    busy = [peer for peer, row in outcome.rows.items() if (row["client CPU %"] or 0) > 90]
    if not busy:
        return []
    return [
        f"The client used over 90 % of its core with {listed(busy)}, so the server might have been a little faster."
    ]


def of_gen200(outcome: Outcome, size: Size) -> list[str]:
    starved = [peer for peer, row in outcome.rows.items() if (row["started"] or 0) < size.clients]
    if not starved:
        return ["With each peer, all clients received their first event."]
    started = listed([f"{number(outcome.rows[peer]['started'])} ({peer})" for peer in starved])
    never = [peer for peer in starved if outcome.rows[peer]["newcomer s"] is None]
    text = (
        f"Of {size.clients} clients, only {started} received an event within {size.patience:g} s: there, a source that "
        "never waits starves all others"
    )
    return [text + (f". With {listed(never)}, the new client never received one." if never else ".")]


def of_fan(outcome: Outcome, size: Size) -> list[str]:
    slow = [peer for peer, row in outcome.rows.items() if (row["delivered %"] or 0) < 100]
    said = (
        f"{listed(slow)} did not deliver everything within {size.delivery:g} s."
        if slow
        else "All events were delivered."
    )
    if OURS in outcome.rows:
        said += (
            f" asgi_sse sends {size.subscribers:,} messages of up to {size.fan_events} events, the others "
            f"{size.subscribers * size.fan_events:,} messages. That is most of the difference. Events that are published "
            "with time in between do not have it (see `pace`)."
        )
    return [said]


def of_pace(outcome: Outcome, size: Size) -> list[str]:
    said = (
        "A send costs more than in `fan`, for `raw` too. A server that sleeps between events probably finds little of its "
        "clients in the CPU caches, and every send wakes the client."
    )
    return [said]


def of_storm(outcome: Outcome, size: Size) -> list[str]:
    said = [f"The storm needs {size.subscribers * size.storm_rate:,} deliveries a second."]
    if row := outcome.rows.get(OURS):
        behind = (row["seconds"] or 0) - size.storm_seconds
        if behind < 1:
            said[0] += (
                f" asgi_sse keeps up, with {100 - (row['server CPU %'] or 0):.0f} % of the core left. After a long round of "
                "sends, its loop rests for as long as the round took, so that several events leave in one message."
            )
        else:
            said[0] += f" asgi_sse is {number(behind)} s late at the end."
    late = {
        peer: row for peer, row in outcome.rows.items() if peer not in {OURS, STUCK} and (row["max ms"] or 0) > 1000
    }
    if late:
        ranges = [
            f"`{peer}` by {number((row['p50 ms'] or 0) / 1000)} (p50) to {number((row['max ms'] or 0) / 1000)} s"
            for peer, row in late.items()
        ]
        said.append(f"Late: {listed(ranges)}.")
    short = [
        f"`{peer}` had delivered {number(row['delivered %'])} %"
        for peer, row in outcome.rows.items()
        if (row["delivered %"] or 0) < 100
    ]
    if short:
        said.append(
            f"{size.delivery:g} s after the last event, {listed(short)}; its delays count only those events, and are too short."
        )
    return said


def of_hold(outcome: Outcome, size: Size) -> list[str]:
    said = [memory_over_time(outcome)]
    row = outcome.rows.get(OURS)
    if row is None:
        return said
    seconds, grown = size.hold_seconds, (row["end MiB"] or 0) - (row["full MiB"] or 0)
    text = (
        f"asgi_sse held {number(row['held'])} of {size.hold:,} for {seconds} s, while its memory went from "
        f"{number(row['full MiB'])} to {number(row['end MiB'])} MiB ({grown:+.2f} MiB)"
    )
    if "delivered %" in row:
        text += (
            f"; each received all {seconds} events, in {number(row['p50 ms'])} ms (p50) and {number(row['p99 ms'])} ms (p99)"
            if row["delivered %"] == 100
            else f"; {number(row['delivered %'], exact=True)} % of the events were delivered"
        )
    else:
        text += f"; each received at least {number(row['fewest pings'])} keep-alives"
    said.append(text + ".")
    if row["gone s"] is None:
        said.append("It did not release all of them.")
    else:
        said.append(
            f"{number(row['gone s'])} s after they disconnected, its registry had {number(row['streams left'])} streams "
            f"and its broker {number(row['subscribers left'])} subscribers, and {number(row['blocks left %'])} % of "
            f"the memory blocks that Python had taken for them were still in use. Resident memory was "
            f"{number(row['after MiB'])} MiB, after {number(row['base MiB'])} at the start, because Python keeps free memory. "
            f"The same number of new connections took it to {number(row['again MiB'])} MiB."
        )
    return said


def memory_over_time(outcome: Outcome) -> str:
    """Make tables of what the plot shows."""
    parts = []
    for peer, series in outcome.series.items():
        begin, end = series["held s"]
        held = [(seconds - begin, mib) for seconds, mib in series["memory MiB"] if begin <= seconds <= end]
        step = max(1, round(held[-1][0] / 6))
        shown = [min(held, key=lambda one: abs(one[0] - at)) for at in range(0, round(held[-1][0]) + 1, step)]
        parts.append(
            small_table(f"{peer}, s", [f"{at:.0f}" for at, _ in shown], "MiB", [f"{mib:.1f}" for _, mib in shown])
        )
    return "Resident memory, by seconds since all were connected:\n\n" + "\n\n".join(parts)


def of_engine(outcome: Outcome, size: Size) -> list[str]:
    said = [
        "What is done when publishing returns:\n\n"
        + "\n".join(f"- `{peer}`: {engine.PEERS[peer].about}." for peer in outcome.rows),
    ]
    streams = [peer for peer in ("litestar-stream", "broadcaster-stream") if peer in outcome.rows]
    if "valkey" in outcome.rows and streams:
        row = outcome.rows["valkey"]

        def against(name: str) -> str:
            values = sorted((row[name] or 0) / (outcome.rows[peer][name] or float("inf")) for peer in streams)
            return " to ".join(dict.fromkeys(map(ratio, values)))

        said.append(
            "An acknowledgement means different things, so compare `valkey` with the streams, not with peers that store "
            f"nothing. Publishing one event at a time takes asgi_sse {against('us/publish')} the time of the streams. Its "
            "script assigns an offset in one sequence for all channels, writes the event to two streams and remembers "
            "the answer. Most of the rest is redis-py, for reading the event back as much as for publishing it. An "
            f"event takes {against('p50 ms')} the time to reach its subscribers (p50). With many at once, "
            f"{against('k events/s')} as many are acknowledged, since up to 64 share a call. Without hiredis it would be "
            "far fewer: each event comes back as 11 strings, whose parsing then takes most of the CPU time."
        )
    return said


CPU: Columns = {
    "server CPU %": Column("of one core; 100 means that the server is the limit"),
    "client CPU %": Column("of one core; near 100 the client may be the limit, and the server could do more"),
}
EACH = "resident memory of the server for each, without the kernel's memory for its socket"
US = "CPU time of the server in microseconds, for each event and subscriber"
LATE = "the most that the publisher was late"
DELAYS: Columns = {
    "p50 ms": Column(
        "half of the deliveries took at most this long, from publishing to the client's read; one subscriber in "
        f"{SAMPLE} is measured"
    ),
    "p99 ms": Column("99 of 100 took at most this long", "less"),
    "max ms": Column("the longest"),
}
DELIVERED: Columns = {"delivered %": Column("of all events at all subscribers", exact=True)}
HELD: Columns = {
    "held": Column("connections that were open at the end"),
    **DELIVERED,
    **DELAYS,
    "us/delivery": Column(US, "less"),
    "fewest pings": Column("keep-alives at the client that received the fewest"),
    **CPU,
    "base MiB": Column("resident memory of the server before, after a warm-up"),
    "full MiB": Column("when all were connected"),
    "end MiB": Column("at the end of the hold"),
    "KiB/connection": Column(EACH, "less"),
    "slope B/s/connection": Column(
        "growth of memory per second and connection during the hold, in bytes: the slope of the best straight line"
    ),
    "gone s": Column("until the server had closed all, after the clients had"),
    "streams left": Column("streams in its registry then"),
    "subscribers left": Column("subscribers of its broker or topic then"),
    "blocks left %": Column("memory blocks that Python took for the connections and still uses then"),
    "after MiB": Column("resident memory then, with the free blocks that Python and the C library keep"),
    "again MiB": Column(
        "after the same number of clients connected again: free memory is reused, or memory grows with each wave"
    ),
}
BROADCAST = (
    "One channel and many subscribers. asgi_sse uses its `Broker`; the others an unbounded `asyncio.Queue` for each "
    "subscriber, as their users write it. `raw` encodes each event once for all. An event is an id and about 50 bytes "
    "of JSON with its time of publication, from the clock that both processes share."
)

MEASURES: dict[str, Measure] = {
    "micro": Measure(
        "The parts of the hot path, alone",
        "Microseconds, without a server: the best of {repeats}.",
        {
            "encode us": Column("`encode()` of a one-line event"),
            "build+encode us": Column("the same, with building the event"),
            "item: dict us": Column("encoding a `dict` that a source yields"),
            "item: str us": Column("encoding a `str`"),
            "decode us": Column("`EventDecoder`, for each of 10,000 events in one piece"),
            "overhead us": Column("what `SSEMiddleware` adds to a request that is not an event stream"),
        },
        micro,
        (OURS,),
    ),
    "gen": Measure(
        "One client, one source at full speed",
        "The source never waits. `raw` gives the loop a turn after each send, or nobody else would get one. It shows the "
        "least cost of one send per event; a peer that batches can be faster. `adapter` is the drop-in for "
        "sse-starlette. Like it, it sends one message per item and never runs ahead of its client, so it gains nothing "
        "from batching.",
        {"k events/s": Column("thousands of events that the client received in a second", "more"), **CPU},
        in_turn(gen),
        findings=of_gen,
    ),
    "gen200": Measure(
        "{clients} clients with a source each, then a new client",
        "All sources run at full speed. A client without an event after {patience:g} s counts as starved, and so does the "
        "new client.",
        {
            "k events/s": Column("thousands of events that all clients together received in a second", "more"),
            "slowest / mean": Column("events of the client with the fewest, divided by the mean; 1 is fair"),
            "started": Column("clients that received an event in time"),
            "client CPU %": CPU["client CPU %"],
            "newcomer s": Column("seconds until the new client receives its first event"),
        },
        in_turn(gen200),
        findings=of_gen200,
    ),
    "idle": Measure(
        "Memory of a server that holds {idle:,} idle streams",
        "Each stream has sent one event. Keep-alives are on, at the peer's default, if the peer has them.",
        {
            "KiB/connection": Column(EACH, "less"),
            "started": Column("streams"),
        },
        in_turn(idle, rounds=False),
    ),
    "fan": Measure(
        "{subscribers:,} subscribers, {fan_events} events published at once",
        f"{BROADCAST} Median of {FAN_ROUNDS} runs in one server.",
        {
            "us/delivery": Column(US, "less"),
            "seconds": Column("until every subscriber had every event", "less"),
            **DELIVERED,
            **CPU,
        },
        in_turn(fan, rounds=False),
        findings=of_fan,
    ),
    "pace": Measure(
        "{subscribers:,} subscribers, {pace_rate} events a second for {pace_seconds} seconds",
        "As `fan`, but with one send for each event and client.",
        {
            "us/delivery": Column(US, "less"),
            **{name: DELAYS[name] for name in ("p50 ms", "p99 ms")},
            **DELIVERED,
            **CPU,
        },
        in_turn(pace),
        findings=of_pace,
    ),
    "storm": Measure(
        "{subscribers:,} subscribers, {storm_rate} events a second for {storm_seconds} seconds",
        f"As `pace`, at a high rate. `{STUCK}` has one more client that reads nothing, and whose send waits from before "
        "the storm: the others should not notice. Events not delivered {delivery:g} s after the last one count as "
        "missing.",
        {
            "us/delivery": Column(US, "less"),
            **DELAYS,
            "late ms": Column(f"{LATE}; delays count from the actual publication"),
            **DELIVERED,
            "seconds": Column("until every subscriber had every event, or the end of the wait", "less"),
            **CPU,
        },
        in_turn(storm, rounds=False),
        (*PEERS, STUCK),
        findings=of_storm,
    ),
    "idle-sub": Measure(
        "Memory of a server with {idle_subscribers:,} subscribers that received one event",
        "A subscription of asgi_sse has no task and no queue. The others have an `asyncio.Queue` each.",
        {
            "KiB/subscriber": Column(EACH, "less"),
            "subscribed": Column("subscribers"),
        },
        in_turn(idle_sub, rounds=False),
    ),
    "hold": Measure(
        "{hold:,} subscribers held for {hold_seconds} seconds, an event a second to all",
        "One uvicorn worker with one channel; the clients are in another process. The peers hold theirs for "
        "{hold_peer_seconds} s. Then all clients disconnect at once, and the same number connects again.",
        {name: column for name, column in HELD.items() if name != "fewest pings"},
        in_turn(hold, rounds=False),
        ("raw", "sse_starlette", OURS),
        findings=of_hold,
    ),
    "hold-idle": Measure(
        "{hold:,} idle streams held for {hold_seconds} seconds by keep-alives",
        "As `hold`, with a source of one event and a keep-alive after each {ping:g} s of silence. sse_starlette holds its "
        "streams for {hold_peer_seconds} s; `raw` has no keep-alive.",
        {name: column for name, column in HELD.items() if name not in {*DELIVERED, *DELAYS, "us/delivery"}},
        in_turn(hold_idle, rounds=False),
        ("sse_starlette", OURS),
        findings=of_hold,
    ),
    "engine": Measure(
        f"Publishing to a backend server, and delivery to {engine.SUBSCRIBERS} subscribers",
        "One process publishes and subscribes; the server runs on another core. First, with one subscriber, the process "
        "publishes {publishes:,} events one after another, and {tasks} tasks publish {publishes_each} events each, until "
        f"all are acknowledged (median of {{rounds}}). Then {engine.SUBSCRIBERS} subscribers of the channel receive "
        "{engine_rate} events a second for {engine_seconds} seconds. An event is 200 bytes of JSON. Subscribers use "
        "`async for`. All use uvloop and, on Redis, the same redis-py with hiredis. Valkey writes nothing to disk, and "
        "NATS does not wait for the disk.",
        {
            "us/publish": Column("microseconds until one event is acknowledged, one after another", "less"),
            "k events/s": Column("thousands of events acknowledged in a second, many at once", "more"),
            "p50 ms": Column("half of the deliveries took at most this long, from just before publishing", "less"),
            "p99 ms": Column("99 of 100 took at most this long", "less"),
            "delivered %": Column("of all events at all subscribers", exact=True),
            "late ms": Column(LATE),
            "CPU %": Column("of one core, for the process"),
            "engine CPU %": Column("of one core, for the server"),
        },
        engine.engine,
        tuple(engine.PEERS),
        "valkey",
        of_engine,
    ),
}
