"""The table of floors: a room imports from floors below its own alone."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import asgi_sse

PACKAGE = Path(asgi_sse.__file__).parent

FLOORS = [
    {"_types", "errors"},
    {"event", "_checks", "_eventloop"},
    {"decoder", "ring", "flusher", "inbox", "server", "source", "driver", "draining", "lifespan", "options", "tally"},
    {"log", "feed"},
    {"outbox"},
    {"stream", "shutdown", "compression"},
    {"observer", "heartbeat"},
    {"registry"},
    {"response"},
    {"routing", "healing", "cors"},
    {"passage", "broker"},
    {"middleware", "figures"},
    {"app"},
    {"adapters", "testing", "cli", "demo", "metrics", "telemetry", "pytest_plugin", "__main__"},
]
ALLOWED_EXTRA = {("cli", "demo"), ("cli", "metrics"), ("pytest_plugin", "testing"), ("__main__", "cli")}
OF_EXTRAS = {
    "on_trio": {"trio"},
    "redis": {"redis"},
    "redis_client": {"redis"},
    "nats": {"nats"},
    "jetstream": {"nats"},
    "nats_runs": {"nats"},
}


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]


def imports(path: Path) -> set[str]:
    """The rooms that a file imports, and the top names of what else it does."""
    names: set[str] = set()
    depth = len(path.relative_to(PACKAGE).parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level == 0:
                names.add(module.split(".")[0])
            elif node.level == depth:
                rooms = [module] if module else [alias.name for alias in node.names]
                names |= {"." + room.split(".")[0] for room in rooms}
    return names


def test_every_room_has_a_floor() -> None:
    assert {room_of(path) for path in FILES} == set().union(*FLOORS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down(path: Path) -> None:
    room = room_of(path)
    floor = next(number for number, rooms in enumerate(FLOORS) if room in rooms)
    below = set().union(*FLOORS[:floor])
    for name in imports(path):
        if name.startswith(".") and name[1:] not in below | {"", "__version__"}:
            assert (room, name[1:]) in ALLOWED_EXTRA or room == name[1:], f"{room} imports {name[1:]}"


@pytest.mark.parametrize("path", [p for p in FILES if room_of(p) not in FLOORS[-1]], ids=lambda p: p.stem)
def test_the_core_needs_anyio_and_asgiref_alone(path: Path) -> None:
    foreign = {name for name in imports(path) if not name.startswith(".")} - set(sys.stdlib_module_names)
    assert foreign <= {"anyio", "asgiref"} | OF_EXTRAS.get(path.stem, set())


def test_the_client_of_an_engine_is_imported_where_it_is_asked_for() -> None:
    code = (
        "import sys, asgi_sse, asgi_sse.broker; asgi_sse.Broker(); "
        "print({'redis', 'nats', 'trio', 'prometheus_client', 'opentelemetry'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
