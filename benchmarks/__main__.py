"""Measures asgi_sse beside its peers, each as a real uvicorn process on one core, the client on the other.

python -m benchmarks                  # prints all of it
python -m benchmarks gen idle         # some of it
python -m benchmarks report           # all in one run, as benchmarks/RESULTS.md with plots
python -m benchmarks report --quick   # to try it: seconds each, and figures that say nothing
python -m benchmarks report --from benchmarks/results.json   # tables and plots of a run that was saved
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
from .hold import look_for_room
from .machine import machine, versions
from .measures import MEASURES, measured
from .results import BenchmarkError, Results
from .server import CORES
from .sizes import FULL, QUICK
from .tables import wrapped

HERE = Path(__file__).parent
BUSY = 0.5  # load average above which somebody else works here, too


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"report, and of {', '.join(MEASURES)}; default: all")
    known = list(dict.fromkeys(peer for one in MEASURES.values() for peer in one.peers if " " not in peer))
    parser.add_argument(
        "--peers", nargs="+", choices=known, metavar="PEER", help=f"of {', '.join(known)}; default: all"
    )
    parser.add_argument("--quick", action="store_true", help="small, to see that it works; the figures say nothing")
    parser.add_argument(
        "--from", dest="saved", type=Path, metavar="JSON", help="report a run that was saved, without one"
    )
    parser.add_argument(
        "--into",
        type=Path,
        metavar="DIRECTORY",
        help="of the report; default: benchmarks, or a new one if it is not of all",
    )
    options = parser.parse_args(arguments)
    wants_report = "report" in options.names
    names = [name for name in options.names if name != "report"] or list(MEASURES)
    if unknown := set(names) - set(MEASURES):
        parser.error(f"there is no {', '.join(sorted(unknown))}; there are report, {', '.join(MEASURES)}")
    if (options.saved or options.into) and not wants_report:
        parser.error("--from and --into are of a report: python -m benchmarks report …")
    if wants_report:
        plots.library()  # or say now that it is missing, not behind a run
    if options.saved:
        results = Results.load(options.saved)
    else:
        command = shlex.join(["python", "-m", "benchmarks", *arguments])
        results = run(names, options.peers, command, quick=options.quick, say=not wants_report)
    if wants_report:
        # The page is of a whole run: what is only a part of one does not take its place.
        whole = options.saved or not (options.quick or options.peers or len(names) < len(MEASURES))
        into = options.into or (HERE if whole else Path(tempfile.mkdtemp(prefix="benchmarks-")))
        print(write(results, into))
    return 1 if any(outcome.failures for outcome in results.measures.values()) else 0


def run(names: Sequence[str], peers: Sequence[str] | None, command: str, *, quick: bool, say: bool) -> Results:
    """Measure, and print each outcome when it is there, or else how it goes."""
    size = QUICK if quick else FULL
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # the servers inherit it
    if {"hold", "hold-idle"} & set(names):
        look_for_room(size.hold)
    results = Results(
        command=command,
        began=dt.datetime.now(dt.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        seconds=0,
        machine=machine(),
        versions=versions(),
        size=size._asdict(),
    )
    if os.getloadavg()[0] > BUSY and not quick:
        print(f"the load is {os.getloadavg()[0]:.2f}: others work here, and the figures will show it", file=sys.stderr)
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
    """The JSON first: whatever becomes of the rest, the run is not lost."""
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
