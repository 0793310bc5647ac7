"""Fuzz the targets of fuzz_targets.py with atheris, each in a process of its own and for a bounded time.

    python tests/fuzz/run.py                         # all targets, ten seconds each
    python tests/fuzz/run.py --seconds 600 decoder   # one target for longer

Without atheris it prints a message and exits with 0. It leaves a failing input as ``crash-…`` in the folder that it
prints. To run that input again, pass the file after the target's name.
"""

import argparse
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]


def fuzz(name: str, arguments: list[str]) -> None:
    """Run one target. The process ends with it."""
    import atheris  # type: ignore[import-not-found,import-untyped,unused-ignore]

    with atheris.instrument_imports(include=["asgi_sse"], enable_loader_override=False):
        import fuzz_targets
    target = next(target for target in fuzz_targets.ALL if target.__name__ == name)

    def run(data: bytes) -> None:
        if len(data) > 1:
            target(data)

    atheris.Setup([sys.argv[0], *arguments], run)
    atheris.Fuzz()


def main() -> None:
    """Run the targets one after another, and exit with 1 if one failed."""
    parser = argparse.ArgumentParser(description="Fuzz asgi_sse with atheris.")
    parser.add_argument("target", nargs="?", help="default: all")
    parser.add_argument("input", nargs="?", help="a file to run the target on once")
    parser.add_argument("--seconds", type=int, default=10, help="per target; default: %(default)s")
    args = parser.parse_args()
    if find_spec("atheris") is None:
        sys.exit(print("atheris is not installed (it has wheels for some Pythons only): nothing was fuzzed"))
    if args.input is not None:
        fuzz(args.target, [args.input])
    import fuzz_targets

    names = [target.__name__ for target in fuzz_targets.ALL]
    if args.target is not None and args.target not in names:
        parser.error(f"target must be one of {', '.join(names)}, got {args.target!r}")
    failed = []
    for name in [args.target] if args.target else names:
        folder = tempfile.mkdtemp(prefix=f"fuzz-{name}-")
        options = [
            f"-max_total_time={args.seconds}",
            "-max_len=400",
            "-timeout=10",
            "-verbosity=0",
            "-print_final_stats=1",
        ]
        here = str(Path(__file__).parent)
        code = f"import sys; sys.path.insert(0, {here!r}); import run; run.fuzz({name!r}, {options!r})"
        done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)
        executed = [line for line in done.stderr.splitlines() if "number_of_executed_units" in line]
        print(f"{name:16} {'holds' if done.returncode == 0 else 'FAILED'}  {' '.join(executed)}", flush=True)
        if done.returncode != 0:
            failed.append(name)
            print(done.stdout[-3000:], done.stderr[-3000:], f"in {folder}", sep="\n")
    sys.exit(f"broken: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
