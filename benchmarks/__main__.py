"""Compare asgi_sse with its peers. Each runs in a real uvicorn process on one core, the client on another.

python -m benchmarks                  # run all benchmarks and print the tables
python -m benchmarks gen idle         # run two of them
python -m benchmarks report           # run all, and write benchmarks/RESULTS.md and its plots
python -m benchmarks report --quick   # try all in two minutes; the figures mean nothing
python -m benchmarks report --from benchmarks/results.json   # write the report of a saved run
"""

import argparse
import datetime as dt
import os
import resource
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from . import plots, report
from .hold import check_limits
from .machine import machine, versions
from .measures import MEASURES, measured
from .results import BenchmarkError, Results
from .server import CORES
from .sizes import FULL, QUICK
from .tables import wrapped

HERE = Path(__file__).parent
BUSY_LOAD = 0.5  # load average above which other programs disturb the figures


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"report, or benchmarks to run: {', '.join(MEASURES)}; default: all"
    )
    known = list(dict.fromkeys(peer for one in MEASURES.values() for peer in one.peers if " " not in peer))
    parser.add_argument(
        "--peers", nargs="+", choices=known, metavar="PEER", help=f"peers to measure: {', '.join(known)}; default: all"
    )
    parser.add_argument(
        "--quick", action="store_true", help="run small sizes to try the benchmarks; the figures mean nothing"
    )
    parser.add_argument(
        "--from", dest="saved", type=Path, metavar="JSON", help="report a saved run instead of running the benchmarks"
    )
    parser.add_argument(
        "--into",
        type=Path,
        metavar="FOLDER",
        help="folder of the report; default: benchmarks, or a new temporary folder for a partial run",
    )
    options = parser.parse_args(arguments)
    wants_report = "report" in options.names
    names = [name for name in options.names if name != "report"] or list(MEASURES)
    if unknown := set(names) - set(MEASURES):
        choices = ", ".join(["report", *MEASURES])
        parser.error(f"NAME must be report or a benchmark, got {', '.join(sorted(unknown))}; choose from {choices}")
    if (options.saved or options.into) and not wants_report:
        parser.error("--from and --into need the name report: python -m benchmarks report …")
    if wants_report:
        plots.library()  # fail before the run if matplotlib is missing, not after it
    if options.saved:
        results = Results.load(options.saved)
    else:
        command = shlex.join(["python", "-m", "benchmarks", *arguments])
        results = run(names, options.peers, command, quick=options.quick, say=not wants_report)
    if wants_report:
        # A partial run must not overwrite the page of a complete one.
        whole = options.saved or not (options.quick or options.peers or len(names) < len(MEASURES))
        into = options.into or (HERE if whole else Path(tempfile.mkdtemp(prefix="benchmarks-")))
        print(write(results, into))
    return 1 if any(outcome.failures for outcome in results.measures.values()) else 0


def run(names: Sequence[str], peers: Sequence[str] | None, command: str, *, quick: bool, say: bool) -> Results:
    """Run benchmarks.

    Args:
        names: The benchmarks.
        peers: The peers to measure; None: all.
        command: The command line, for the report.
        quick: Use small sizes.
        say: Print each outcome as soon as it is known, instead of only its duration.
    """
    size = QUICK if quick else FULL
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # the servers inherit the limit
    if {"hold", "hold-idle"} & set(names):
        check_limits(size.hold)
    results = Results(
        command=command,
        began=dt.datetime.now(dt.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        seconds=0,
        machine=machine(),
        versions=versions(),
        size=size._asdict(),
    )
    if os.getloadavg()[0] > BUSY_LOAD and not quick:
        print(f"the load average is {os.getloadavg()[0]:.2f}: other programs will disturb the figures", file=sys.stderr)
    if len(CORES) > 1:
        os.sched_setaffinity(0, CORES[1:2])
    began = time.perf_counter()
    if say:
        print(wrapped(report.where(results)))
    for name in MEASURES:
        if name not in names:
            continue
        outcome = results.measures[name] = measured(name, size, peers)
        if say:
            print("\n" + wrapped(report.section(name, outcome, size)), flush=True)
        else:
            print(f"{name}: {outcome.seconds:.1f} s", file=sys.stderr)
    results.seconds = time.perf_counter() - began
    return results


def write(results: Results, into: Path) -> Path:
    """Write a report and return its path.

    The JSON comes first, so that a failure in the page or the plots does not lose the run.
    """
    into.mkdir(parents=True, exist_ok=True)
    results.save(into / "results.json")
    page = into / "RESULTS.md"
    page.write_text(report.markdown(results, plots.draw(results, into / "plots")))
    return page


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except BenchmarkError as error:
        sys.exit(str(error))
