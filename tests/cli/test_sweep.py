"""Sweeps: what a curve says, and going on after a kill."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from pdctl.bench.sweep import Plan, Setting, findings, rate_not_served, stops_growing
from pdctl.runs import Run
from support import stored
from support.processes import until
from support.shell import Shell


@pytest.mark.parametrize(
    ("curve", "level"),
    [
        ([(1, 100), (2, 190), (4, 300), (8, 305), (16, 290)], 4),
        ([(1, 100), (2, 190), (4, 300)], None),
        ([(1, 100), (2, 101), (4, 200), (8, 203)], 4),  # a dip on the way is no end
        ([(1, 100)], None),
    ],
)
def test_throughput_is_saturated_where_it_stops_growing(curve: list[tuple[float, float]], level: float | None) -> None:
    assert stops_growing(curve) == level


def test_a_rate_is_saturated_where_it_is_not_served_any_more() -> None:
    assert rate_not_served([(1, 1.0), (2, 1.96), (4, 3.1), (8, 3.2)]) == 4
    assert rate_not_served([(1, 1.0)]) is None


def test_the_best_point_has_the_most_goodput_a_gpu(tmp_path: Path) -> None:
    run = stored.sweep(tmp_path / "s")
    plan = Plan("concurrency", (1, 4, 16), (Setting(1, 3), Setting(2, 2)), 1)
    found = findings(plan, run.points)
    assert [one.setting for one in found] == ["1p3d", "2p2d"]
    by_name = {point.name: point.results()[0]["request_goodput"] / 4 for point in run.points}
    for one in found:
        assert one.best_per_gpu == max(value for name, value in by_name.items() if name.startswith(one.setting))


def test_repeats_are_interleaved_and_only_what_is_missing_is_left() -> None:
    plan = Plan("rate", (1, 2), (Setting(policy="a"), Setting(policy="b")), 2)
    order = [(repeat, setting.name, [point.at for point in points]) for repeat, setting, points in plan.left({})]
    assert order == [(0, "a", [1, 2]), (0, "b", [1, 2]), (1, "a", [1, 2]), (1, "b", [1, 2])]
    left = plan.left({"a-r1": {0, 1}, "a-r2": {0, 1}, "b-r1": {0}})
    assert [(repeat, [point.name for point in points]) for repeat, _, points in left] == [
        (0, ["b-r2"]), (1, ["b-r1", "b-r2"]),
    ]  # fmt: skip
    assert Plan.read(json.loads(json.dumps(plan.told()))) == plan


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Shell]:
    made = Shell(tmp_path)
    yield made
    for process in made.processes():
        process.kill()


def test_a_killed_sweep_goes_on_where_it_was(shell: Shell) -> None:
    assert shell.run("deploy", "--local", "--prefill", "1", "--decode", "1", "--speed", "10", "-y").returncode == 0
    running = shell.start(
        "sweep", "40", "--concurrency", "1,2,4", "--input-len", "60", "--output-len", "40", "--label", "s"
    )
    runs = shell.state.parent / "data" / "pdctl" / "runs"
    until(lambda: list(runs.glob("*/points/c1/results/0.json")), 60, "the first point is measured")
    until(lambda: list(runs.glob("*/points/c2/requests.jsonl")), 60, "the second has begun")
    running.send_signal(signal.SIGKILL)
    running.communicate()
    (folder,) = runs.iterdir()
    assert Run(folder).state == "killed"
    measured = (folder / "points/c1/results/0.json").read_bytes()
    until(lambda: not [p for p in shell.processes() if "pdctl.bench.sender" in p.cmdline()], 10, "no client is left")

    again = shell.run("sweep", "--resume", "s", "--json")
    assert again.returncode == 0, again.stderr
    assert (folder / "points/c1/results/0.json").read_bytes() == measured, "what was measured is kept"
    told = json.loads(again.stdout)
    assert [point["name"] for point in told["points"]] == ["c1", "c2", "c4"]
    assert all(point["results"][0]["completed"] == 40 for point in told["points"])
    assert len(told["findings"]) == 1
    assert (folder / "report.html").exists()


def test_a_closed_terminal_in_the_middle_of_bench_leaves_what_was_measured(shell: Shell) -> None:
    assert shell.run("deploy", "--local", "--prefill", "1", "--decode", "1", "-y").returncode == 0
    running, window = shell.in_terminal("bench", "500", "4", "--input-len", "100", "--output-len", "20", "--label", "b")
    runs = shell.state.parent / "data" / "pdctl" / "runs"
    until(lambda: any(path.read_bytes().count(b"\n") > 8 for path in runs.glob("*/requests.jsonl")), 60, "some ended")
    os.close(window)
    assert running.wait(60) == 130
    told = shell.told("runs", "show", "b")
    assert told["state"] == "partial"
    assert 8 < told["results"][0]["completed"] < 500
