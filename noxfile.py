"""What is checked, and how; ``.ci/run`` calls some of it."""

import shutil
import sys
from pathlib import Path

import nox

nox.options.default_venv_backend = "venv"
nox.options.error_on_missing_interpreters = False
nox.options.sessions = ["lint", "types", "tests", "coverage"]

PYTHONS = ["3.11", "3.12", "3.13"]
# The oldest that pyproject.toml allows, with servers that go with them.
MINIMUMS = [
    "anyio==4.8.0", "asgiref==3.8.0", "trio==0.27.0", "uvicorn==0.34.0", "hypercorn==0.17.3", "redis==5.2.0",
    "nats-py==2.9.0", "prometheus-client==0.20.0", "opentelemetry-api==1.30.0", "opentelemetry-sdk==1.30.0",
    "opentelemetry-instrumentation-asgi==0.51b0",
]  # fmt: skip
# Folders of tests/ whose tests run in this process, and those of the backends, which start servers.
IN_PROCESS = [f"tests/{name}" for name in (
    "protocol", "runtime", "stream", "routing", "broker", "middleware", "metrics", "test_telemetry.py",
)]  # fmt: skip
COVERED = [*IN_PROCESS, *(f"tests/{name}" for name in (
    "adapters", "testing", "cli", "hostile", "project/test_public.py", "project/test_logs.py",
))]  # fmt: skip
FRAMEWORKS = ["starlette", "fastapi", "litestar", "quart", "django", "falcon", "blacksheep"]
COMPRESSORS = {  # by Starlette and Django, whose versions exclude each other
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


def _run_full(session: nox.Session, variable: str, *paths: str) -> None:
    """Run tests at their full size, of which the test command runs a sample, and show their tables."""
    session.run("python", "-m", "pytest", "-rP", *paths, env={variable: "full"})


@nox.session(python=PYTHONS)
def tests(session: nox.Session) -> None:
    """All tests, on each Python."""
    session.install("-e", ".[test]")
    session.run("python", "-m", "pytest", *session.posargs)


@nox.session
def coverage(session: nox.Session) -> None:
    """The tests that run in this process, with the gate on branch coverage."""
    session.install("-e", ".[test]")
    session.run("python", "-m", "pytest", "-n4", "--dist=loadfile", "--cov=asgi_sse", *COVERED)


@nox.session
def lint(session: nox.Session) -> None:
    """Rules and format."""
    session.install("ruff>=0.12")
    session.run("ruff", "check", "--quiet", *FILES)
    session.run("ruff", "format", "--check", "--quiet", *FILES)


@nox.session
def types(session: nox.Session) -> None:
    """Types: everything strict, and the public names as another checker sees them."""
    session.install("-e", ".[lint]", "nox")
    session.run("mypy", "--no-error-summary")
    session.run("pyright")  # with the python that is first on the path


@nox.session
def minimums(session: nox.Session) -> None:
    """The oldest dependencies that are allowed."""
    session.install("-e", ".[test]")
    session.install(*MINIMUMS)
    # Their own warnings, not ours, with a Python that is younger than they.
    session.run("python", "-W", "ignore", "-m", "pytest", "-W", "default", *IN_PROCESS)


@nox.session
def wheel(session: nox.Session) -> None:
    """What the wheel installs is what is tested: the tests run without the tree beside them."""
    session.install("build", "pytest", "hypothesis", "trio", "asgi-lifespan", "uvicorn", "starlette")
    out = Path(session.create_tmp())
    shutil.rmtree(out / "dist", ignore_errors=True)
    session.run("python", "-m", "build", "--wheel", "--outdir", str(out / "dist"), silent=True)
    session.install(*map(str, (out / "dist").glob("*.whl")))
    session.run("python", "-P", "-c", "import asgi_sse; assert 'site-packages' in asgi_sse.__file__")
    shutil.copytree("tests", out / "tests", dirs_exist_ok=True)
    shutil.copy("conftest.py", out)
    shutil.copy("pyproject.toml", out)
    session.chdir(out)
    session.run(
        "python", "-m", "pytest", "tests/protocol", "tests/broker/runs"
    )  # enough to see that nothing is missing


@nox.session
def stress(session: nox.Session) -> None:
    """The tests of streams under stress, at their full size; the tests run a sample of each."""
    session.install("-e", ".[test]")
    session.run("python", "-m", "pytest", "-rP", "tests/stream/test_hostile_sources.py")
    for name in ("stress", "resume"):
        session.run(
            "python", "-m", "pytest", "-rP", f"tests/integration/test_{name}.py", env={"ASGI_SSE_STRESS": "full"}
        )


@nox.session(python="3.12")  # for which there is a wheel of atheris
def fuzz(session: nox.Session) -> None:
    """What is fuzzed, by coverage, half a minute each; `-- --seconds 600 decoder` does one of them for longer."""
    session.install("-e", ".[test]")
    session.install("atheris", success_codes=[0, 1], silent=True)  # where there is none, it says that it did nothing
    session.run("python", "tests/fuzz/run.py", *(session.posargs or ["--seconds", "30"]))


@nox.session
def hostile(session: nox.Session) -> None:
    """All attacks on every server; the tests run a sample."""
    session.install("-e", ".[test]")
    _run_full(session, "ASGI_SSE_HOSTILE", "tests/hostile")


@nox.session(python="3.11")  # for which there is a wheel of Redis 6.2
def faults(session: nox.Session) -> None:
    """Two nodes on each engine to which something happens; the tests run a sample."""
    session.install("-e", ".[test]")
    _run_full(session, "ASGI_SSE_FAULTS", "tests/integration/test_faults.py")


@nox.session(python="3.11")
def soak(session: nox.Session) -> None:
    """Two minutes of faults on each engine, at random."""
    session.install("-e", ".[test]")
    _run_full(session, "ASGI_SSE_SOAK", "tests/integration/test_soak.py")


@nox.session
def matrix(session: nox.Session) -> None:
    """The shutdown of every server, all rows; the tests run a sample."""
    session.install("-e", ".[test]", "sse-starlette>=3.0")
    _run_full(session, "ASGI_SSE_MATRIX", "tests/integration/test_matrix.py")


@nox.session
def frameworks(session: nox.Session) -> None:
    """`SSEMiddleware` around every framework; the tests run a sample."""
    session.install("-e", ".[test]", *FRAMEWORKS, "sentry-sdk", "opentelemetry-instrumentation-asgi")
    session.run(
        "python", "-m", "pytest", "-rP", "tests/integration/test_frameworks.py", env={"ASGI_SSE_FRAMEWORKS": "full"}
    )


@nox.session
@nox.parametrize("packages", list(COMPRESSORS.values()), ids=list(COMPRESSORS))
def compressors(session: nox.Session, packages: list[str]) -> None:
    """Every compressor, in the versions that differ; the tests run a sample."""
    session.install("-e", ".[test]", *packages)
    session.run(
        "python", "-m", "pytest", "-rP", "tests/integration/test_compressors.py", env={"ASGI_SSE_COMPRESSORS": "full"}
    )


@nox.session
def docs(session: nox.Session) -> None:
    """The site of the documentation, in build/site; a warning is an error."""
    session.install("-e", ".[docs,redis,nats]", *FRAMEWORKS[:5])  # whose adapters the reference reads
    session.run(
        "mkdocs", "build", "--strict", "--quiet", "--config-file", "docs/mkdocs.yml", env={"NO_MKDOCS_2_WARNING": "1"}
    )


@nox.session
def benchmarks(session: nox.Session) -> None:
    """Figures and ratios beside the peers, as a report: all tables and plots of one run."""
    session.install("-e", ".[bench]")
    session.run("python", "-m", "benchmarks", *(session.posargs or ["report"]))


if __name__ == "__main__":
    sys.exit("run it by nox: nox --list")
