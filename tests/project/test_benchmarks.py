"""Tests of the benchmarks' report. No test depends on how fast anything is."""

import importlib
import json
import sys
import xml.etree.ElementTree as ET
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
if not (ROOT / "benchmarks").exists():
    pytest.skip("the repository is not next to the tests", allow_module_level=True)


def module(name: str) -> Any:
    """Import a module of the benchmarks at run time: some of them import packages without types."""
    return importlib.import_module(f"benchmarks.{name}")


command = module("__main__")
results = module("results")
sizes = module("sizes")
HELD = {
    "held": 100, "delivered %": 100.0, "p50 ms": 5.0, "p99 ms": 9.0, "max ms": 10.0, "us/delivery": 20.0,
    "server CPU %": 15.0, "client CPU %": 4.0, "base MiB": 37.0, "full MiB": 103.0, "end MiB": 103.5,
    "KiB/connection": 13.5, "slope B/s/connection": 1.5, "gone s": 0.2, "streams left": 0, "subscribers left": 0,
    "blocks left %": 0.0, "after MiB": 75.0, "again MiB": 103.0,
}  # fmt: skip


def pace_of(us: float, p50: float, p99: float) -> dict[str, float]:
    return {
        "us/delivery": us,
        "p50 ms": p50,
        "p99 ms": p99,
        "delivered %": 100.0,
        "server CPU %": 9.0,
        "client CPU %": 5.0,
    }


def gen_of(rate: float) -> Any:
    return results.Sample({"k events/s": rate, "server CPU %": 99.0, "client CPU %": 50.0})


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A saved run of four benchmarks."""
    gen, gen200, pace, hold = (results.Outcome() for _ in range(4))
    gen.add("raw", [gen_of(90.0), gen_of(100.0), gen_of(108.0)])
    gen.add("asgi_sse", [gen_of(600.0), gen_of(300.0), gen_of(660.0)])
    gen.left_out["fastapi"] = "fastapi is not installed"
    row = {"k events/s": 70.0, "slowest / mean": 0.0, "client CPU %": 50.0}
    gen200.add("sse_starlette", [results.Sample({**row, "started": 1, "newcomer s": None})])
    gen200.add("asgi_sse", [results.Sample({**row, "started": 200, "newcomer s": 0.01})])
    delays = {"delays ms": [0.5 + step / 10 for step in range(201)]}
    pace.add("raw", [results.Sample(pace_of(20.0, 5.0, 10.0), delays)])
    pace.add("asgi_sse", [results.Sample(pace_of(10.0, 4.0, 8.0), delays)])
    memory = {
        "memory MiB": [[0.0, 37.0], [1.0, 103.0], [61.0, 103.5], [63.0, 75.0], [65.0, 103.0]],
        "held s": [1.0, 61.0],
    }
    hold.add("asgi_sse", [results.Sample(HELD, memory)])
    run = results.Results(
        command="python -m benchmarks report",
        began="2025-01-02 03:04 UTC",
        seconds=754.0,
        machine={"CPU": "a model of a processor", "cores": "2"},
        versions={"asgi_sse": "0.1.0", "uvicorn": "0.34.0"},
        size=sizes.FULL._asdict(),
        measures={"gen": gen, "gen200": gen200, "pace": pace, "hold": hold},
    )
    path = tmp_path / "results.json"
    run.save(path)
    return path


def row_of(page: str, section: str, first: str) -> list[str]:
    """Return the cells of the first row of a section whose label is `first`."""
    text = page.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    lines = [line for line in text.splitlines() if line.startswith(f"| {first} ")]
    assert lines, f"section {section} must have a row {first}"
    return [cell.strip() for cell in lines[0].strip("|").split("|")][1:]


def markdown(saved: Path, plots: Any = ()) -> str:
    return str(module("report").markdown(results.Results.load(saved), plots))


def test_page_names_the_run_and_its_machine(saved: Path) -> None:
    page = markdown(saved)
    for fact in (
        "python -m benchmarks report",
        "2025-01-02 03:04 UTC",
        "12.6 minutes",
        "a model of a processor",
        "uvicorn 0.34.0",
    ):
        assert fact in page


def test_table_has_the_median_of_rounds_and_its_ratios(saved: Path) -> None:
    page = markdown(saved)
    assert row_of(page, "gen", "k events/s") == ["100", "600"]
    assert row_of(page, "gen", "*asgi_sse / peer*") == ["6.00 x", "-"]
    assert row_of(page, "gen", "*spread of rounds*") == ["20 %", "120 %"]
    assert row_of(page, "pace", "*asgi_sse / peer*") == ["0.50 x", "-"]
    assert row_of(page, "At a glance", "[`gen`](#gen): k events/s (more is better)")[:2] == ["600", "6.00 x"]
    assert row_of(page, "At a glance", "[`pace`](#pace): us/delivery (less is better)")[:2] == ["10", "0.50 x"]


def test_findings_describe_the_run(saved: Path) -> None:
    page = " ".join(markdown(saved).split())
    assert "Of 200 clients, only 1 (sse_starlette) received an event within 5 s" in page
    assert "With sse_starlette, the newcomer never received an event." in page
    assert (
        "Its memory went from 103 to 104 MiB (+0.50 MiB). Every client received all 60 events, after 5 ms (p50) and "
        "9 ms (p99)." in page
    )
    assert "Not measured: fastapi (fastapi is not installed)." in page
    assert "received an event within" not in " ".join(markdown_of_all_started(saved).split())


def markdown_of_all_started(saved: Path) -> str:
    run = json.loads(saved.read_text())
    run["measures"]["gen200"]["rows"]["sse_starlette"]["started"] = 200
    saved.write_text(json.dumps(run))
    return markdown(saved)


def test_share_below_100_percent_is_not_rounded_up(saved: Path) -> None:
    run = json.loads(saved.read_text())
    run["measures"]["hold"]["rows"]["asgi_sse"]["delivered %"] = 99.9999
    saved.write_text(json.dumps(run))
    page = markdown(saved)
    assert row_of(page, "hold", "delivered %") == ["99.99"]
    assert "It delivered 99.99 % of the events." in " ".join(page.split())


def test_report_of_a_saved_run_has_tables_and_plots(saved: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="plots need the dependency group bench, which the tests do not")
    into = tmp_path / "report"
    (into / "plots").mkdir(parents=True)
    (into / "plots" / "engine.svg").write_text("a plot of an earlier run")
    assert command.main(["report", "--from", str(saved), "--into", str(into)]) == 0
    page = (into / "RESULTS.md").read_text()
    drawn = {path.name for path in (into / "plots").iterdir()}
    assert drawn == {"rate.svg", "delivery.svg", "delays.svg", "distribution.svg", "hold.svg"}
    for name in drawn:
        assert f"](plots/{name})" in page
        text = "".join(ET.parse(into / "plots" / name).getroot().itertext())
        assert "asgi_sse" in text
    assert (into / "results.json").read_text() == saved.read_text()


def test_missing_matplotlib_is_reported_before_the_run(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for options in ([], ["--from", str(saved)]):
        with pytest.raises(results.BenchmarkError, match=r"install matplotlib: pip install -e \. --group bench"):
            command.main(["report", *options, "--into", str(tmp_path / "report")])
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot read"),
        ("{", "must be JSON"),
        ("[]", "must have format 1, got None"),
        ('{"format": 0}', "must have format 1, got 0"),
        ('{"format": 1, "measures": {}}', "must be a saved report"),
    ],
)
def test_loading_refuses_a_file_that_is_not_a_saved_run(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "results.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(results.BenchmarkError, match=message) as caught:
        results.Results.load(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gem"], "NAME must be report or a benchmark, got gem; choose from report, micro, gen"),
        (["gen", "--into", "x"], "--from and --into need the name report"),
    ],
)
def test_unknown_name_and_misplaced_option_are_errors(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        command.main(arguments)
    assert message in " ".join(capsys.readouterr().err.split())


def test_too_many_connections_for_the_machine_are_refused_before_the_run() -> None:
    with pytest.raises(results.BenchmarkError, match=r"hard limit of open files|local ports"):
        module("hold").check_limits(10_000_000)


def test_round_without_deliveries_is_ignored_in_plots() -> None:
    outcome = results.Outcome()
    row = {"p50 ms": 1.0}
    samples = [([1.0, 5.0], row), ([], {"p50 ms": None}), ([3.0, 9.0], row)]
    outcome.add("raw", [results.Sample(figures, {"delays ms": delays}) for delays, figures in samples])
    assert outcome.series["raw"]["delays ms"] == [2.0, 7.0]
    assert outcome.rows["raw"]["p50 ms"] == 1.0
    assert outcome.rounds["raw"] == 3


def test_slope_is_that_of_the_fitted_line() -> None:
    assert module("hold").slope([[0.0, 1.0], [1.0, 3.0], [2.0, 5.0]]) == 2.0
    assert module("hold").slope([[0.0, 7.0], [10.0, 7.0]]) == 0.0


def test_held_connections_receive_all_events_and_leave_nothing() -> None:
    """Run `hold` and `hold-idle` with real servers and few connections."""
    size = sizes.QUICK._replace(hold=40, hold_seconds=1, ping=0.1, hold_rest=0.1)
    with ThreadPoolExecutor() as pool:
        outcomes = list(
            pool.map(lambda name: module("measures").measured(name, size, ["asgi_sse"]), ["hold", "hold-idle"])
        )
    for outcome, column, least in zip(outcomes, ["delivered %", "fewest pings"], [100, 1], strict=True):
        assert outcome.failures == []
        row = outcome.rows["asgi_sse"]
        assert row["held"] == 40
        assert row[column] >= least
        assert (row["streams left"], row["subscribers left"]) == (0, 0)
        assert row["gone s"] is not None
        assert len(outcome.series["asgi_sse"]["memory MiB"]) >= 4
