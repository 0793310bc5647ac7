"""Thousands of connections that are held, and what is left of them when they have gone."""

import resource
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from .broadcast import Subscribers, delays, quantiles
from .clients import Clients, never
from .results import BenchmarkError, Sample
from .server import Server, cpu_of_this_process, serving
from .sizes import Size

MIB = 1 << 20
BATCH = 250  # connections that are made before all that there are were heard of
SPARE = 200  # file descriptors for all else
PATIENCE = 60.0  # seconds until all have begun, or all have gone
PING = b": ping"


class Memory:
    """That of a server, over time.

    Attributes:
        samples: Seconds, and MiB.
    """

    def __init__(self, server: Server) -> None:
        self.server = server
        self.began = time.perf_counter()
        self.samples: list[list[float]] = []

    def sample(self) -> float:
        """Now."""
        mib = self.server.memory() / MIB
        self.samples.append([round(time.perf_counter() - self.began, 2), round(mib, 2)])
        return mib


def slope(samples: list[list[float]]) -> float:
    """What it gains in a second: of the straight line that fits best."""
    number = len(samples)
    mean_x, mean_y = (sum(sample[axis] for sample in samples) / number for axis in (0, 1))
    square = sum((x - mean_x) ** 2 for x, _ in samples)
    return sum((x - mean_x) * (y - mean_y) for x, y in samples) / square if square else 0.0


def look_for_room(connections: int) -> None:
    """Say so before it fails in the midst.

    Raises:
        BenchmarkError: A limit of this machine is too low.
    """
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if files < connections + SPARE:
        raise BenchmarkError(
            f"{connections} connections need {connections + SPARE} file descriptors, and the hard limit is {files}; "
            "raise it (ulimit -Hn, or LimitNOFILE of systemd)"
        )
    low, high = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    if (ports := high - low + 1) < 2 * connections:  # connected twice, and a closed one keeps its port for a minute
        raise BenchmarkError(
            f"2 x {connections} connections need as many local ports, and there are {ports}; "
            "raise net.ipv4.ip_local_port_range"
        )


def hold(peer: str, size: Size) -> Sample:
    """Subscribers of a channel with an event a second."""
    return held(peer, size, Subscribers)


def hold_idle(peer: str, size: Size) -> Sample:
    """Streams with nothing but their keep-alive."""
    return held(peer, size, lambda server: Clients(server, "/idle", PING))


def held(peer: str, size: Size, connect: Callable[[Server], Clients]) -> Sample:
    look_for_room(size.hold)
    with serving(peer, size.ping) as server:
        with connected(connect(server), 20):  # warm-up
            pass
        gone(server, 0)
        files, blocks = server.files(), server.blocks()
        memory = Memory(server)
        base = memory.sample()
        with connected(connect(server), size.hold, memory) as clients:
            taken = server.blocks() - blocks
            full = memory.sample()
            ramp = len(memory.samples) - 1
            figures, series = holding(
                clients, size.hold_seconds if peer == "asgi_sse" else size.hold_peer_seconds, memory
            )
            end = memory.sample()
            growth = slope(memory.samples[ramp:])
            steady = memory.samples[-1][0]
        seconds = gone(server, files)
        left, kept = server.streams(), server.blocks() - blocks
        rest(memory, size.hold_rest)
        after = memory.sample()
        with connected(connect(server), size.hold, memory):
            again = memory.sample()
        figures |= {
            "base MiB": base,
            "full MiB": full,
            "end MiB": end,
            "KiB/connection": (end - base) * 1024 / size.hold,
            "slope B/s/connection": growth * MIB / size.hold,
            "gone s": seconds,
            "streams left": left["streams"],
            "subscribers left": left["subscribers"],
            "blocks left %": 100 * max(kept, 0) / taken,
            "after MiB": after,
            "again MiB": again,
        }
        phases = [memory.samples[ramp][0], steady]
        return Sample(figures, series | {"memory MiB": memory.samples, "held s": phases})


@contextmanager
def connected(clients: Clients, number: int, memory: Memory | None = None) -> Iterator[Clients]:
    """So many, of which each has begun."""
    with closing(clients):
        while len(clients.sockets) < number:
            clients.add(min(BATCH, number - len(clients.sockets)))
            clients.run(lambda: len(clients.heard) == len(clients.sockets), PATIENCE)
            if memory is not None:
                memory.sample()
        if isinstance(clients, Subscribers):
            clients.settle()
        yield clients


def holding(clients: Clients, seconds: int, memory: Memory) -> tuple[dict[str, float | None], dict[str, list[float]]]:
    """What happens meanwhile."""
    clients.restart()
    expected = seconds * len(clients.sockets)
    server_cpu, client_cpu, began = clients.server.cpu(), cpu_of_this_process(), time.perf_counter()
    if isinstance(clients, Subscribers):
        clients.publish(seconds, 1)
    while (elapsed := time.perf_counter() - began) < seconds:
        clients.run(never, min(1.0, seconds - elapsed))
        memory.sample()
    if isinstance(clients, Subscribers):
        clients.run(lambda: clients.received >= expected, PATIENCE)
    took = time.perf_counter() - began
    figures: dict[str, float | None] = {"held": len(clients.sockets) - len(clients.ended)}
    if isinstance(clients, Subscribers):
        figures |= {"delivered %": 100 * clients.received / expected, **delays(clients)}
        figures["us/delivery"] = (clients.server.cpu() - server_cpu) * 1e6 / max(clients.received, 1)
    else:
        figures["fewest pings"] = min(clients.counts.values())
    figures["server CPU %"] = 100 * (clients.server.cpu() - server_cpu) / took
    figures["client CPU %"] = 100 * (cpu_of_this_process() - client_cpu) / took
    return figures, {"delays ms": quantiles(clients.delays)} if isinstance(clients, Subscribers) else {}


def gone(server: Server, files: int) -> float | None:
    """Seconds until it has closed all, and knows of none; None if that does not come.

    `files` is how many descriptors it had before, or 0 to look at what it knows alone.
    """
    began = time.perf_counter()
    while time.perf_counter() - began < PATIENCE:
        # One more: of who asks for the streams.
        if not any(server.streams().values()) and (not files or server.files() <= files + 1):
            return time.perf_counter() - began
        time.sleep(0.05)
    return None


def rest(memory: Memory, seconds: float) -> None:
    """Leave it alone, for what it frees with a delay."""
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline:
        time.sleep(min(0.5, seconds))
        memory.sample()
