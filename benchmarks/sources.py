"""Benchmarks of streams that each have their own source."""

import statistics
import time

from .clients import Clients, never
from .results import Sample
from .server import cpu_of_this_process, serving
from .sizes import Size

CHUNK = 262_144  # bytes of a read; a source that never waits fills it
MARK = b"data: "


def gen(peer: str, size: Size) -> Sample:
    with serving(peer) as server:
        clients = Clients(server, "/gen", MARK, chunk=CHUNK)
        clients.add()
        clients.run(never, 0.5)  # warm-up
        clients.restart()
        server_cpu, client_cpu = server.cpu(), cpu_of_this_process()
        seconds = clients.run(never, size.window)
        figures = {
            "k events/s": clients.received / seconds / 1000,
            "server CPU %": 100 * (server.cpu() - server_cpu) / seconds,
            "client CPU %": 100 * (cpu_of_this_process() - client_cpu) / seconds,
        }
        clients.close()
        return Sample(figures)


def gen200(peer: str, size: Size) -> Sample:
    with serving(peer) as server:
        clients = Clients(server, "/gen", MARK, chunk=CHUNK)
        clients.add(size.clients)
        clients.run(lambda: len(clients.first) == size.clients, size.patience)
        started = len(clients.first)
        clients.restart()
        client_cpu = cpu_of_this_process()
        seconds = clients.run(never, size.window)
        figures: dict[str, float | None] = {
            "k events/s": clients.received / seconds / 1000,
            "slowest / mean": min(clients.counts.values()) / statistics.mean(clients.counts.values())
            if clients.received
            else 0.0,
            "started": started,
            "client CPU %": 100 * (cpu_of_this_process() - client_cpu) / seconds,
        }
        began = time.perf_counter()
        newcomer = clients.add()
        clients.run(lambda: newcomer in clients.first, size.patience)
        figures["newcomer s"] = clients.first[newcomer] - began if newcomer in clients.first else None
        clients.close()
        return Sample(figures)


def idle(peer: str, size: Size) -> Sample:
    with serving(peer) as server:
        clients = Clients(server, "/idle", MARK)
        clients.add(20)  # warm-up
        clients.run(lambda: len(clients.first) == 20, 10)
        before = server.memory()
        clients.add(size.idle)
        clients.run(lambda: len(clients.first) == 20 + size.idle, 60)
        figures = {
            "KiB/connection": (server.memory() - before) / size.idle / 1024,
            "started": len(clients.first) - 20,
        }
        clients.close()
        return Sample(figures)
