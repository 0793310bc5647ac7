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
    return [f"The client was at over 90 % of its core with {listed(busy)}: the server might have had a little more."]


def of_gen200(outcome: Outcome, size: Size) -> list[str]:
    starved = [peer for peer, row in outcome.rows.items() if (row["started"] or 0) < size.clients]
    if not starved:
        return ["With each peer all clients had their first event."]
    started = listed([f"{number(outcome.rows[peer]['started'])} ({peer})" for peer in starved])
    never = [peer for peer in starved if outcome.rows[peer]["newcomer s"] is None]
    text = (
        f"Of {size.clients} clients only {started} had an event within {size.patience:g} s: a source that never waits "
        "starves all others there"
    )
    return [text + (f", and with {listed(never)} a newcomer never got its first." if never else ".")]


def of_fan(outcome: Outcome, size: Size) -> list[str]:
    slow = [peer for peer, row in outcome.rows.items() if (row["delivered %"] or 0) < 100]
    said = f"Not all was delivered within {size.delivery:g} s by {listed(slow)}." if slow else "All is delivered."
    if OURS in outcome.rows:
        said += (
            f" asgi_sse sends {size.subscribers:,} messages of up to {size.fan_events} events, the others "
            f"{size.subscribers * size.fan_events:,} messages: that is most of the difference, and what is published "
            "with time in between does not have it (see `pace`)."
        )
    return [said]


def of_pace(outcome: Outcome, size: Size) -> list[str]:
    said = (
        "A send costs more than in `fan`, of `raw` too: a server that sleeps between its events presumably finds "
        "little of its clients in the caches, and every send wakes the client."
    )
    return [said]


def of_storm(outcome: Outcome, size: Size) -> list[str]:
    said = [f"{size.subscribers * size.storm_rate:,} deliveries a second are due."]
    if row := outcome.rows.get(OURS):
        behind = (row["seconds"] or 0) - size.storm_seconds
        if behind < 1:
            said[0] += (
                f" asgi_sse keeps up, with {100 - (row['server CPU %'] or 0):.0f} % of the core left: its loop rests "
                "behind a long round of sends for as long as that took, so that several events leave in one message."
            )
        else:
            said[0] += f" asgi_sse is {number(behind)} s behind at the end."
    late = {
        peer: row for peer, row in outcome.rows.items() if peer not in {OURS, STUCK} and (row["max ms"] or 0) > 1000
    }
    if late:
        ranges = [
            f"`{peer}` by {number((row['p50 ms'] or 0) / 1000)} (p50) to {number((row['max ms'] or 0) / 1000)} s"
            for peer, row in late.items()
        ]
        said.append(f"Late are {listed(ranges)}.")
    short = [
        f"`{peer}` had delivered {number(row['delivered %'])} %"
        for peer, row in outcome.rows.items()
        if (row["delivered %"] or 0) < 100
    ]
    if short:
        said.append(
            f"{size.delivery:g} s behind the last event {listed(short)}; its delays are of that, and too short."
        )
    return said


def of_hold(outcome: Outcome, size: Size) -> list[str]:
    said = [memory_over_time(outcome)]
    row = outcome.rows.get(OURS)
    if row is None:
        return said
    seconds, grown = size.hold_seconds, (row["end MiB"] or 0) - (row["full MiB"] or 0)
    text = (
        f"asgi_sse held {number(row['held'])} of {size.hold:,} for {seconds} s, in which its memory went from "
        f"{number(row['full MiB'])} to {number(row['end MiB'])} MiB ({grown:+.2f} MiB)"
    )
    if "delivered %" in row:
        text += (
            f"; each had all {seconds} events, in {number(row['p50 ms'])} ms (p50) and {number(row['p99 ms'])} ms (p99)"
            if row["delivered %"] == 100
            else f"; {number(row['delivered %'], exact=True)} % of the events were delivered"
        )
    else:
        text += f"; each had {number(row['fewest pings'])} keep-alive comments or more"
    said.append(text + ".")
    if row["gone s"] is None:
        said.append("It did not let go of all of them.")
    else:
        said.append(
            f"{number(row['gone s'])} s after they had left, its registry had {number(row['streams left'])} streams "
            f"and its broker {number(row['subscribers left'])} subscribers, and {number(row['blocks left %'])} % of "
            f"what Python had taken for them was not free again. Resident were {number(row['after MiB'])} MiB, of "
            f"{number(row['base MiB'])} at first: what is free is kept for later, and as many connections again took "
            f"it to {number(row['again MiB'])} MiB."
        )
    return said


def memory_over_time(outcome: Outcome) -> str:
    """Tables of what the plot shows."""
    parts = []
    for peer, series in outcome.series.items():
        begin, end = series["held s"]
        held = [(seconds - begin, mib) for seconds, mib in series["memory MiB"] if begin <= seconds <= end]
        step = max(1, round(held[-1][0] / 6))
        shown = [min(held, key=lambda one: abs(one[0] - at)) for at in range(0, round(held[-1][0]) + 1, step)]
        parts.append(
            small_table(f"{peer}, s", [f"{at:.0f}" for at, _ in shown], "MiB", [f"{mib:.1f}" for _, mib in shown])
        )
    return "Resident memory, seconds after all were there:\n\n" + "\n\n".join(parts)


def of_engine(outcome: Outcome, size: Size) -> list[str]:
    said = [
        "What has happened when publishing returns:\n\n"
        + "\n".join(f"- `{peer}`: {engine.PEERS[peer].about}." for peer in outcome.rows),
    ]
    streams = [peer for peer in ("litestar-stream", "broadcaster-stream") if peer in outcome.rows]
    if "valkey" in outcome.rows and streams:
        row = outcome.rows["valkey"]

        def against(name: str) -> str:
            values = sorted((row[name] or 0) / (outcome.rows[peer][name] or float("inf")) for peer in streams)
            return " to ".join(dict.fromkeys(map(ratio, values)))

        said.append(
            "What is acknowledged differs, so compare `valkey` with the streams, not with those that keep nothing. "
            f"One event at a time takes asgi_sse {against('us/publish')} as long as the streams: its script numbers "
            "it in one sequence for all channels, writes it to two streams and remembers what it has answered. Most "
            "of the rest is redis-py, as much for reading the event back as for publishing it. An event takes "
            f"{against('p50 ms')} as long to its subscribers (p50). Of many at once {against('k events/s')} as many "
            "are acknowledged, as up to 64 go in one call. Without hiredis it would be far fewer: each event comes "
            "back as 11 strings, and parsing them is most of its CPU time then."
        )
    return said


CPU: Columns = {
    "server CPU %": Column("of one core; at 100 the server is what limits"),
    "client CPU %": Column("of one core; near 100 the client may be what limits, and the server would have had more"),
}
EACH = "resident memory of the server for each, without what the kernel keeps for its socket"
US = "CPU time of the server in microseconds, for one event at one subscriber"
LATE = "how far the publisher was behind its schedule, at the most"
DELAYS: Columns = {
    "p50 ms": Column(
        "half of the deliveries took at most as long, from publishing to the client's read; one subscriber of "
        f"{SAMPLE} tells"
    ),
    "p99 ms": Column("99 of 100 took at most as long", "less"),
    "max ms": Column("none took longer"),
}
DELIVERED: Columns = {"delivered %": Column("of all events at all subscribers, counted to the event", exact=True)}
HELD: Columns = {
    "held": Column("connections that were still there at the end"),
    **DELIVERED,
    **DELAYS,
    "us/delivery": Column(US, "less"),
    "fewest pings": Column("keep-alive comments, at the client that had the fewest"),
    **CPU,
    "base MiB": Column("resident memory of the server before, and after a warm-up"),
    "full MiB": Column("when all had begun"),
    "end MiB": Column("at the end of the time"),
    "KiB/connection": Column(EACH, "less"),
    "slope B/s/connection": Column(
        "bytes that memory grows in a second for each connection, while they are held: the best straight line; 0 is "
        "flat"
    ),
    "gone s": Column("until the server had closed all, after all clients had"),
    "streams left": Column("that its registry knows then; no figure for who has none"),
    "subscribers left": Column("that its broker, or topic, knows then"),
    "blocks left %": Column(
        "of the blocks of memory that Python had taken for the connections, what is still taken then: the rest is free"
    ),
    "after MiB": Column("resident memory then: free blocks are among it, where Python and the C library keep them"),
    "again MiB": Column(
        "when as many have connected once more: what was kept is used again, or it grows with each wave"
    ),
}
BROADCAST = (
    "One channel and many subscribers: asgi_sse has its `Broker`; the others an `asyncio.Queue` without a limit for "
    "each subscriber, as their users write it; `raw` encodes each event once for all. An event is an id and about 50 "
    "bytes of JSON with the time of its publishing, by the clock that both processes share."
)

MEASURES: dict[str, Measure] = {
    "micro": Measure(
        "The parts of the hot path, alone",
        "Microseconds, without a server; the best of {repeats}.",
        {
            "encode us": Column("`encode()` of a one-line event that is built already"),
            "build+encode us": Column("the same, building it too"),
            "item: dict us": Column("a `dict` that a source has yielded, to bytes"),
            "item: str us": Column("a `str`"),
            "decode us": Column("an event of a stream of 10,000 in one piece, by `EventDecoder`"),
            "overhead us": Column("what `SSEMiddleware` adds to a request that is no event stream"),
        },
        micro,
        (OURS,),
    ),
    "gen": Measure(
        "One client, a source that is flat out",
        "The source never waits. `raw` gives the loop a turn after each send, without which nobody else would have "
        "one; it is what one send an event costs at the least, and who batches can be faster. `adapter` is the "
        "drop-in for sse-starlette: one message an item and no source ahead of its client, as there, which costs "
        "what batching gains.",
        {"k events/s": Column("thousands of events that the client received in a second", "more"), **CPU},
        in_turn(gen),
        findings=of_gen,
    ),
    "gen200": Measure(
        "{clients} clients, a source each; then a newcomer",
        "All sources are flat out. Who has no event after {patience:g} s is not waited for, nor is the newcomer.",
        {
            "k events/s": Column("thousands of events that all clients together received in a second", "more"),
            "slowest / mean": Column("events of the client that had the fewest, by the mean; 1 is fair"),
            "started": Column("clients that had an event in time"),
            "client CPU %": CPU["client CPU %"],
            "newcomer s": Column("until one more client has its first event"),
        },
        in_turn(gen200),
        findings=of_gen200,
    ),
    "idle": Measure(
        "Memory of a server that holds {idle:,} idle streams",
        "Each has had one event. Keep-alive is on where the peer has it, at its default.",
        {
            "KiB/connection": Column(EACH, "less"),
            "started": Column("streams"),
        },
        in_turn(idle, rounds=False),
    ),
    "fan": Measure(
        "{subscribers:,} subscribers, {fan_events} events published in one go",
        f"{BROADCAST} The median of {FAN_ROUNDS} in one server.",
        {"us/delivery": Column(US, "less"), "seconds": Column("until all had all", "less"), **DELIVERED, **CPU},
        in_turn(fan, rounds=False),
        findings=of_fan,
    ),
    "pace": Measure(
        "{subscribers:,} subscribers, {pace_rate} events a second for {pace_seconds} seconds",
        "As `fan`, a send for each event and client.",
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
        f"As `pace`, at a high rate. `{STUCK}` is with one more client that reads nothing, and whose send waits since "
        "before the storm: the others should not notice. What is not delivered {delivery:g} s after the last event is "
        "not waited for.",
        {
            "us/delivery": Column(US, "less"),
            **DELAYS,
            "late ms": Column(f"{LATE}; delays count from when it did publish"),
            **DELIVERED,
            "seconds": Column("until all had all, or were not waited for", "less"),
            **CPU,
        },
        in_turn(storm, rounds=False),
        (*PEERS, STUCK),
        findings=of_storm,
    ),
    "idle-sub": Measure(
        "Memory of a server with {idle_subscribers:,} subscribers that have had one event",
        "A subscription of asgi_sse has no task and no queue; that of the others is an `asyncio.Queue`.",
        {
            "KiB/subscriber": Column(EACH, "less"),
            "subscribed": Column("subscribers"),
        },
        in_turn(idle_sub, rounds=False),
    ),
    "hold": Measure(
        "{hold:,} subscribers held for {hold_seconds} seconds, an event a second to all",
        "One uvicorn worker with one channel; the clients are in another process. The peers hold theirs for "
        "{hold_peer_seconds} s. Then all clients leave at once, and as many connect again.",
        {name: column for name, column in HELD.items() if name != "fewest pings"},
        in_turn(hold, rounds=False),
        ("raw", "sse_starlette", OURS),
        findings=of_hold,
    ),
    "hold-idle": Measure(
        "{hold:,} idle streams held for {hold_seconds} seconds by their keep-alive",
        "As `hold`, with a source that gives one event, and a comment after each {ping:g} s of silence. sse_starlette "
        "holds them for {hold_peer_seconds} s; `raw` has no keep-alive.",
        {name: column for name, column in HELD.items() if name not in {*DELIVERED, *DELAYS, "us/delivery"}},
        in_turn(hold_idle, rounds=False),
        ("sse_starlette", OURS),
        findings=of_hold,
    ),
    "engine": Measure(
        f"Publishing to an engine, and delivery from it to {engine.SUBSCRIBERS} subscribers",
        "One process that publishes and subscribes, on another core than the engine. First with one subscriber: "
        "publishing {publishes:,} events one after the other, and {tasks} tasks with {publishes_each} events each, "
        f"until they are acknowledged; of both the median of {{rounds}}. Then {engine.SUBSCRIBERS} subscribers of the "
        "channel have {engine_rate} events a second for {engine_seconds} seconds. An event is 200 bytes of JSON, "
        "subscribers are an `async for`, and all use uvloop and, on Redis, the same redis-py with hiredis. Valkey "
        "writes nothing to the disk, NATS does not wait for it.",
        {
            "us/publish": Column("microseconds until one event is acknowledged, one after the other", "less"),
            "k events/s": Column("thousands of events acknowledged in a second, many at once", "more"),
            "p50 ms": Column("half of the deliveries took at most as long, from just before publishing", "less"),
            "p99 ms": Column("99 of 100 took at most as long", "less"),
            "delivered %": Column("of all events at all subscribers", exact=True),
            "late ms": Column(LATE),
            "CPU %": Column("of one core, by the process"),
            "engine CPU %": Column("of one core, by the engine"),
        },
        engine.engine,
        tuple(engine.PEERS),
        "valkey",
        of_engine,
    ),
}
