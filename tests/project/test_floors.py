"""The import rules of docs/pages/architecture.md: which package may import which, and no circle anywhere."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from serving import ROOT

import asgi_sse

PACKAGE = Path(asgi_sse.__file__).parent
PAGE = ROOT / "docs" / "pages" / "architecture.md"
if not PAGE.exists():
    pytest.skip("the source tree is not beside the tests", allow_module_level=True)

FILES = sorted(PACKAGE.rglob("*.py"))
MODULES = {".".join(("asgi_sse", *path.relative_to(PACKAGE).with_suffix("").parts)): path for path in FILES}
PACKAGES = {name.removesuffix(".__init__") for name in MODULES if name.endswith(".__init__")}
# Modules that may import a package from an extra. Every other one needs anyio and asgiref only.
EXTRAS = {
    "runtime/trio_loop.py": {"trio"},
    "broker/backends/redis.py": {"redis"},
    "broker/backends/redis_client.py": {"redis"},
    "broker/backends/nats.py": {"nats"},
    "broker/backends/jetstream.py": {"nats"},
    "broker/backends/nats_runs.py": {"nats"},
    "telemetry.py": {"opentelemetry"},
    "metrics/prometheus.py": {"prometheus_client"},
}
FREE = ("adapters", "cli", "testing")  # packages that exist to use somebody else's


def read_floors() -> dict[str, set[str]]:
    """Read the table of packages: each one, and the packages that it may import."""
    _, _, rest = PAGE.read_text().partition("| package | job | may import |\n|---|---|---|\n")
    table = {}
    for row in rest.partition("\n\n")[0].splitlines():
        package, _, allowed = row.strip("| ").split(" | ")
        table[package.strip("`").removesuffix("/").removesuffix(".py")] = set(re.findall(r"`(\w+)", allowed))
    return table


FLOORS = read_floors()


def top_of(module: str) -> str:
    """Name the top-level package that a module belongs to; "" for the root."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] not in {"__init__", "__main__"} else ""


def imports_of(name: str) -> Iterator[tuple[str, str]]:
    """List the modules that a module imports, with the name that it takes from each, under TYPE_CHECKING too."""
    parent = name.rpartition(".")[0].split(".")
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = parent[: len(parent) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{module}.{alias.name}"
                yield (inner, "") if inner in MODULES or inner in PACKAGES else (module, alias.name)


@pytest.mark.parametrize("name", MODULES)
def test_package_imports_only_from_its_floors(name: str) -> None:
    own = top_of(name)
    if not own:
        return  # the root re-exports, and __main__ calls the command
    taken = {top_of(module) for module, _ in imports_of(name) if module.partition(".")[0] == "asgi_sse"} - {"", own}
    assert taken <= FLOORS[own], f"{own}/ may import {sorted(FLOORS[own])}"


def test_every_package_has_a_floor() -> None:
    assert set(FLOORS) == {top_of(name) for name in MODULES} - {""}


def test_floors_have_no_circle() -> None:
    assert list(TopologicalSorter(FLOORS).static_order())


def test_modules_have_no_import_circle() -> None:
    graph = {name: {module for module, _ in imports_of(name) if module in MODULES} for name in MODULES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as exc:
        pytest.fail(" -> ".join(exc.args[1]))


@pytest.mark.parametrize("name", MODULES)
def test_no_underscore_name_crosses_a_package(name: str) -> None:
    own = name.rpartition(".")[0]
    for module, taken in imports_of(name):
        if module.startswith("asgi_sse.") and module.rpartition(".")[0] != own:
            private = [part for part in (*module.split("."), taken) if part.startswith("_") and part != "__version__"]
            assert not private, f"{name} imports {taken} of {module}"


@pytest.mark.parametrize("package", sorted(PACKAGES))
def test_init_files_only_re_export(package: str) -> None:
    body = ast.parse(MODULES[f"{package}.__init__"].read_text()).body
    assert ast.get_docstring(ast.Module(body, [])), "say what the package is for"
    for node in body[1:]:
        assigned = node.targets[0] if isinstance(node, ast.Assign) else None
        known = isinstance(assigned, ast.Name) and assigned.id in {"__all__", "__version__"}
        assert known or isinstance(node, ast.Import | ast.ImportFrom), ast.unparse(node)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_core_needs_only_anyio_and_asgiref(path: Path) -> None:
    relative = path.relative_to(PACKAGE)
    if relative.parts[0] in FREE:
        return
    name = ".".join(("asgi_sse", *relative.with_suffix("").parts))
    foreign = {module.partition(".")[0] for module, _ in imports_of(name)} - set(sys.stdlib_module_names)
    assert foreign <= {"asgi_sse", "anyio", "asgiref"} | EXTRAS.get(str(relative), set())


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_architecture_page_lists_every_module(path: Path) -> None:
    relative = path.relative_to(PACKAGE)
    if relative.name != "__init__.py":
        assert re.search(rf"^\| .*`{relative.name}`", PAGE.read_text(), re.MULTILINE)


@pytest.mark.parametrize(
    ("module", "missing", "title", "package"),
    [
        ("metrics.prometheus", "prometheus_client", "prometheus-client", "asgi-sse[metrics]"),
        ("telemetry", "opentelemetry", "opentelemetry-api", "asgi-sse[opentelemetry]"),
        ("adapters.sse_starlette", "starlette", "Starlette", "starlette"),
        ("adapters.django", "django", "Django", "django"),
        ("adapters.quart", "quart", "Quart", "quart"),
        ("adapters.litestar", "litestar", "Litestar", "litestar"),
    ],
)
def test_missing_package_error_says_what_to_install(module: str, missing: str, title: str, package: str) -> None:
    # In a process of its own, since importing a module again would replace it for later tests.
    code = (
        f"import sys; sys.modules[{missing!r}] = None\n"
        f"try: import asgi_sse.{module}\n"
        "except ModuleNotFoundError as exc: print(exc.name.partition('.')[0], exc, sep='\\n')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [missing, f'{title} is not installed: pip install "{package}"']


def test_missing_dependency_of_a_framework_is_reported_as_itself() -> None:
    code = "import sys; sys.modules['werkzeug'] = None\nimport asgi_sse.adapters.quart"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert re.match("ModuleNotFoundError: .*werkzeug", done.stderr.splitlines()[-1])


def test_user_file_named_like_a_framework_is_not_reported_as_missing(tmp_path: Path) -> None:
    (tmp_path / "django.py").write_text("")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\nimport asgi_sse.adapters.django"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "'django' is not a package" in done.stderr.splitlines()[-1]


def test_backend_clients_are_imported_only_where_used() -> None:
    code = (
        "import sys, asgi_sse, asgi_sse.broker; asgi_sse.Broker(); "
        "print({'redis', 'nats', 'trio', 'prometheus_client', 'opentelemetry'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
