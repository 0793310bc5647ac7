"""The table of floors on the page of the architecture: a room imports from rooms above it alone."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import asgi_sse

PACKAGE = Path(asgi_sse.__file__).parent

PAGE = Path(__file__).parent.parent / "docs" / "pages" / "architecture.md"


def floors() -> dict[str, list[str]]:
    """The rooms of each floor, in the order of the table."""
    table: dict[str, list[str]] = {}
    _, _, rest = PAGE.read_text().partition("| floor | room | its job |\n|---|---|---|\n")
    for row in rest.partition("\n\n")[0].splitlines():
        floor, rooms = row.split("|")[1:3]
        if floor.strip():
            table[floor.strip()] = []
        list(table.values())[-1].extend(re.findall(r"`(\w+)(?:\.py|/)`", rooms))
    return table


FLOORS = floors()
ROOMS = [room for rooms in FLOORS.values() for room in rooms]
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
    assert sorted(ROOMS) == sorted({room_of(path) for path in FILES})


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_room_imports_from_those_above_it(path: Path) -> None:
    room = room_of(path)
    known = {f".{name}" for name in [*ROOMS[: ROOMS.index(room) + 1], "", "__version__"]}
    assert {name for name in imports(path) if name.startswith(".")} <= known


@pytest.mark.parametrize("path", [p for p in FILES if room_of(p) not in FLOORS["edges"]], ids=lambda p: p.stem)
def test_the_core_needs_anyio_and_asgiref_alone(path: Path) -> None:
    foreign = {name for name in imports(path) if not name.startswith(".")} - set(sys.stdlib_module_names)
    assert foreign <= {"anyio", "asgiref"} | OF_EXTRAS.get(path.stem, set())


@pytest.mark.parametrize(
    ("room", "module", "what", "package"),
    [
        ("metrics", "prometheus_client", "prometheus-client", "asgi-sse[metrics]"),
        ("telemetry", "opentelemetry", "opentelemetry-api", "asgi-sse[opentelemetry]"),
        ("adapters.starlette", "starlette", "Starlette", "starlette"),
        ("adapters.django", "django", "Django", "django"),
        ("adapters.quart", "quart", "Quart", "quart"),
        ("adapters.litestar", "litestar", "Litestar", "litestar"),
    ],
)
def test_a_room_whose_package_is_not_installed_says_what_to_install(
    room: str, module: str, what: str, package: str
) -> None:
    # In a process of its own: a module that is imported anew would be another one for the tests that follow.
    code = (
        f"import sys; sys.modules[{module!r}] = None\n"
        f"try: import asgi_sse.{room}\n"
        "except ModuleNotFoundError as exc: print(exc.name.partition('.')[0], exc, sep='\\n')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [module, f'{what} is not installed: pip install "{package}"']


def test_what_a_package_misses_itself_is_not_taken_for_it() -> None:
    code = "import sys; sys.modules['werkzeug'] = None\nimport asgi_sse.adapters.quart"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert re.match("ModuleNotFoundError: .*werkzeug", done.stderr.splitlines()[-1])


def test_a_file_of_the_user_s_that_is_called_as_a_package_is_not_taken_for_one_that_is_missing(tmp_path: Path) -> None:
    (tmp_path / "django.py").write_text("")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\nimport asgi_sse.adapters.django"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "'django' is not a package" in done.stderr.splitlines()[-1]


def test_the_client_of_an_engine_is_imported_where_it_is_asked_for() -> None:
    code = (
        "import sys, asgi_sse, asgi_sse.broker; asgi_sse.Broker(); "
        "print({'redis', 'nats', 'trio', 'prometheus_client', 'opentelemetry'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
