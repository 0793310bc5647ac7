"""Benchmarks that hold thousands of connections, and check what remains after they have closed."""

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
BATCH = 250  # connections to open before waiting until all have started
SPARE_FILES = 200  # file descriptors for anything but connections
TIMEOUT_S = 60.0  # to wait until all connections have started, or are closed
PING = b": ping"


class Memory:
    """The resident memory of a server over time.

    Attributes:
        samples: Pairs of seconds and MiB.
    """

    def __init__(self, server: Server) -> None:
        self.server = server
        self.began = time.perf_counter()
        self.samples: list[list[float]] = []

    def sample(self) -> float:
        """Record the current memory and return it in MiB."""
        mib = self.server.memory() / MIB
        self.samples.append([round(time.perf_counter() - self.began, 2), round(mib, 2)])
        return mib


def slope(samples: list[list[float]]) -> float:
    """Return the growth per second, by the straight line that fits the samples best."""
    number = len(samples)
    mean_x, mean_y = (sum(sample[axis] for sample in samples) / number for axis in (0, 1))
    square = sum((x - mean_x) ** 2 for x, _ in samples)
    return sum((x - mean_x) * (y - mean_y) for x, y in samples) / square if square else 0.0


def check_limits(connections: int) -> None:
    """Check the limits of the machine before the run, so that it does not fail halfway.

    Raises:
        BenchmarkError: A limit of this machine is too low.
    """
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if files < connections + SPARE_FILES:
        raise BenchmarkError(
            f"the hard limit of open files must be at least {connections + SPARE_FILES} for {connections} connections, "
            f"got {files}; raise it with ulimit -Hn, or LimitNOFILE in systemd"
        )
    low, high = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    if (
        ports := high - low + 1
    ) < 2 * connections:  # two waves of connections, and a closed one keeps its port for a minute
        raise BenchmarkError(
            f"the range of local ports must have at least {2 * connections} ports for 2 x {connections} connections, "
            f"got {ports}; raise net.ipv4.ip_local_port_range"
        )


def hold(peer: str, size: Size) -> Sample:
    """Hold subscribers of a channel that receives one event a second."""
    return held(peer, size, Subscribers)


def hold_idle(peer: str, size: Size) -> Sample:
    """Hold streams that only send keep-alives."""
    return held(peer, size, lambda server: Clients(server, "/idle", PING))


def held(peer: str, size: Size, connect: Callable[[Server], Clients]) -> Sample:
    check_limits(size.hold)
    with serving(peer, size.ping) as server:
        with connected(connect(server), 20):  # warm-up
            pass
        wait_until_closed(server, 0)
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
        seconds = wait_until_closed(server, files)
        left, kept = server.streams(), server.blocks() - blocks
        wait_idle(memory, size.hold_rest)
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
    """Connect clients and wait until each response has started; close them at the end."""
    with closing(clients):
        while len(clients.sockets) < number:
            clients.add(min(BATCH, number - len(clients.sockets)))
            clients.run(lambda: len(clients.heard) == len(clients.sockets), TIMEOUT_S)
            if memory is not None:
                memory.sample()
        if isinstance(clients, Subscribers):
            clients.settle()
        yield clients


def holding(clients: Clients, seconds: int, memory: Memory) -> tuple[dict[str, float | None], dict[str, list[float]]]:
    """Hold the connections, and return the figures and series of this time."""
    clients.restart()
    expected = seconds * len(clients.sockets)
    server_cpu, client_cpu, began = clients.server.cpu(), cpu_of_this_process(), time.perf_counter()
    if isinstance(clients, Subscribers):
        clients.publish(seconds, 1)
    while (elapsed := time.perf_counter() - began) < seconds:
        clients.run(never, min(1.0, seconds - elapsed))
        memory.sample()
    if isinstance(clients, Subscribers):
        clients.run(lambda: clients.received >= expected, TIMEOUT_S)
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


def wait_until_closed(server: Server, files: int) -> float | None:
    """Wait until the server has closed all connections and has no streams or subscribers.

    Args:
        server: The server.
        files: Its number of file descriptors before the connections; 0 checks only streams and subscribers.

    Returns:
        The seconds that it took; None after `TIMEOUT_S`.
    """
    began = time.perf_counter()
    while time.perf_counter() - began < TIMEOUT_S:
        # One more descriptor: the request for /streams itself.
        if not any(server.streams().values()) and (not files or server.files() <= files + 1):
            return time.perf_counter() - began
        time.sleep(0.05)
    return None


def wait_idle(memory: Memory, seconds: float) -> None:
    """Leave the server idle, so that it can free memory with a delay."""
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline:
        time.sleep(min(0.5, seconds))
        memory.sample()
