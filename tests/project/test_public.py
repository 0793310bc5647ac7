"""The public surface: the names that the reference documents, and what importing the package loads."""

import inspect
import re
import subprocess
import sys
from importlib import import_module

import pytest
from serving import ROOT

import asgi_sse

REFERENCE = ROOT / "docs" / "pages" / "reference"
PAGES = [ROOT / "README.md", ROOT / "MIGRATING.md", *sorted((ROOT / "docs" / "pages").rglob("*.md"))]

# Every public name, by the module to import it from. A change here needs an entry in CHANGELOG and MIGRATING.
SURFACE = {
    "asgi_sse": {
        "Access", "Broker", "BrokerError", "BrokerStatistics", "CORS", "Channel", "CompressionError", "DrainReport",
        "EventDecoder", "EventSourceResponse", "HTTPError", "InvalidEventError", "JSONServerSentEvent", "Observer",
        "RegistryStatistics", "Request", "Run", "SSEError", "SSEMiddleware", "SendTimeoutError", "ServerSentEvent",
        "Stream", "StreamClosedError", "StreamRegistry", "Subscription", "create_app",
    },
    "asgi_sse.broker": {"Access", "Broker", "BrokerStatistics", "Channel", "Run", "Subscription", "publish"},
    "asgi_sse.testing": {
        "OpenStream", "RunningApp", "StreamingASGITransport", "VirtualTimeLoop", "assert_event", "open_stream",
        "running", "virtual_time",
    },
    "asgi_sse.testing.pytest_plugin": set(),
    "asgi_sse.adapters.sse_starlette": {
        "AppStatus", "EventSourceEndpoint", "EventSourceResponse", "JSONServerSentEvent", "SendTimeoutError",
        "ServerSentEvent", "ensure_bytes",
    },
    "asgi_sse.adapters.django": {"EventSourceResponse", "endpoint"},
    "asgi_sse.adapters.quart": {"EventSourceResponse"},
    "asgi_sse.adapters.litestar": {"EventSourceResponse", "mount"},
    "asgi_sse.metrics.prometheus": {"Collector", "MetricsEndpoint"},
    "asgi_sse.telemetry": {"Instrumentation", "instrument"},
    "asgi_sse.cli.hub": {"create_hub"},
}  # fmt: skip


@pytest.mark.parametrize(
    ("module", "name"), [(module, name) for module, names in SURFACE.items() for name in sorted(names)]
)
def test_public_name_can_be_imported_and_is_documented(module: str, name: str) -> None:
    assert inspect.getdoc(getattr(import_module(module), name))


@pytest.mark.parametrize("module", ["asgi_sse", "asgi_sse.broker", "asgi_sse.testing"])
def test_all_lists_the_public_names(module: str) -> None:
    assert set(import_module(module).__all__) == SURFACE[module]


def test_root_exports_nothing_else() -> None:
    public = {name for name, value in vars(asgi_sse).items() if inspect.isclass(value) or inspect.isfunction(value)}
    assert public == SURFACE["asgi_sse"]


@pytest.mark.skipif(not REFERENCE.exists(), reason="the source tree is not beside the tests")
def test_reference_documents_exactly_the_public_surface() -> None:
    documented = set()
    for page in REFERENCE.glob("*.md"):
        documented |= set(re.findall(r"^::: (asgi_sse[\w.]+)$", page.read_text(), re.MULTILINE))
    paths = {f"{module}.{name}" for module, names in SURFACE.items() for name in names}
    paths |= {module for module, names in SURFACE.items() if not names}
    assert documented <= paths
    assert {path.rpartition(".")[2] for path in paths} == {path.rpartition(".")[2] for path in documented}


@pytest.mark.skipif(not REFERENCE.exists(), reason="the source tree is not beside the tests")
def test_pages_import_only_public_names() -> None:
    imported = re.compile(r"^ *from (asgi_sse[\w.]*) import \(?([\w, \n]+)", re.MULTILINE)
    for page in PAGES:
        for module, names in imported.findall(page.read_text()):
            taken = set(re.findall(r"\w+", names.split("\n\n")[0]))
            assert module in SURFACE, f"{page}: {module}"
            first_line = set(re.findall(r"\w+", names.splitlines()[0])) or taken
            assert first_line <= SURFACE[module], f"{page}: {sorted(first_line - SURFACE[module])} of {module}"


def test_import_loads_nothing_optional() -> None:
    code = "import asgi_sse, sys; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    optional = {"trio", "uvicorn", "hypercorn", "psutil", "starlette", "django", "quart", "litestar", "httpx", "redis"}
    assert not optional & set(loaded)
