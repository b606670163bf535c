"""Comparisons: what is compared, what is noise, and routers in turn before the same engines."""

import json
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from pdctl.compare.contender import contenders
from pdctl.compare.difference import check_alike, difference, unlike
from pdctl.compare.fairness import RANDOM_PROMPTS, sheet
from pdctl.compare.live import turns
from pdctl.compare.told import comparison, cost
from pdctl.errors import PdctlError
from pdctl.report.write import write
from pdctl.routers.choice import Choice
from pdctl.runs import Run
from support import llmd, stored
from support.processes import until
from support.shell import Shell


@pytest.mark.parametrize(
    ("metric", "other", "verdict"),
    [
        ("median_ttft_ms", [80.0, 82.0, 81.0], "better"),
        ("median_ttft_ms", [120.0, 122.0, 121.0], "worse"),
        ("output_throughput", [120.0, 122.0, 121.0], "better"),
        ("output_throughput", [80.0, 82.0, 81.0], "worse"),
        ("median_ttft_ms", [90.0, 113.0, 101.0], "within noise"),
        ("median_ttft_ms", [80.0], "one run each"),
    ],
)
def test_a_verdict_says_better_worse_or_noise(metric: str, other: list[float], verdict: str) -> None:
    assert difference(metric, [100.0, 102.0, 101.0], other, paired=False).verdict == verdict


def test_the_interval_is_welchs() -> None:
    # by hand: means 10 and 12, variances 1, n 3: standard error sqrt(2/3), 4 degrees of freedom, t = 2.7764
    found = difference("median_ttft_ms", [9.0, 10.0, 11.0], [11.0, 12.0, 13.0], paired=False)
    assert found.change == pytest.approx(0.2)
    assert (found.low, found.high) == pytest.approx(((2 - 2.7764 * (2 / 3) ** 0.5) / 10, (2 + 2.7764 * (2 / 3) ** 0.5) / 10), abs=1e-4)  # fmt: skip # noqa: E501


def test_what_disturbs_both_in_a_turn_does_not_hide_a_difference() -> None:
    base, other = [100.0, 150.0, 200.0], [95.0, 144.0, 194.0]
    assert difference("median_ttft_ms", base, other, paired=False).verdict == "within noise"
    assert difference("median_ttft_ms", base, other, paired=True).verdict == "better"


@pytest.mark.parametrize(
    "change", [{"num_prompts": 13}, {"concurrency": 8}, {"seed": 9}, {"rate": 2.0}, {"trace_sha256": "x"}]
)
def test_unlike_loads_are_refused_with_what_differs(tmp_path: Path, change: dict[str, object]) -> None:
    base = stored.bench(tmp_path / "a", repeats=1)
    other = stored.bench(tmp_path / "b", replace(stored.SMALL, **change), repeats=1)  # type: ignore[arg-type]
    with pytest.raises(PdctlError, match="had different loads") as refused:
        check_alike([base, other])
    assert next(iter(change)) in " ".join(refused.value.evidence)
    assert unlike(base, base) == []


def test_router_and_policy_are_told_apart(tmp_path: Path) -> None:
    told = comparison(stored.compare(tmp_path / "c").points, paired=True)
    titles = [effect.title for effect in told.effects]
    assert len(titles) == 2
    assert titles[0].startswith("router: ours instead of vllm-router (policy consistent_hash")
    assert titles[1].startswith("policy: least_tokens instead of consistent_hash (router ours")
    ttft = {effect.title[:6]: one for effect in told.effects for one in effect.differences if one.metric == "median_ttft_ms"}  # fmt: skip # noqa: E501
    assert ttft["policy"].verdict == "better"
    assert abs(ttft["router"].change) < 0.01


def test_a_comparison_says_what_differed_and_what_random_prompts_cannot_show(tmp_path: Path) -> None:
    run = stored.compare(tmp_path / "c")
    found = sheet(run)
    assert found is not None
    assert found.titles == ["vllm-router, consistent_hash", "pd-router, consistent_hash", "pd-router, least_tokens"]
    assert all(len(row) == 4 for row in found.rows)
    assert {row[0]: row[1:] for row in found.rows}["version"] == ["1", "1", "1"]
    assert found.notes == [RANDOM_PROMPTS]
    for kind in ("md", "html"):
        write(run, tmp_path / f"report.{kind}")
        assert RANDOM_PROMPTS in (tmp_path / f"report.{kind}").read_text()
    prefixes = replace(stored.SMALL, shared_prefix=20)
    run.note(workload=prefixes.told(), machine={"cores": 2, "load_at_start": 13.2})
    again = sheet(Run(run.folder))
    assert again is not None
    (busy,) = again.notes
    assert "13 processes wanted its 2 cores" in busy


def test_what_a_router_of_several_processes_costs_is_the_sum_of_them(tmp_path: Path) -> None:
    run = stored.bench(tmp_path / "b", repeats=2)
    for repeat in range(2):
        told = run.results()[repeat]
        parts = {
            "envoy": {"cpu_seconds": 0.012, "resident_mb": 70.0},
            "picker": {"cpu_seconds": 0.024, "resident_mb": 90.0},
        }
        told["pdctl"]["router"] |= {"parts": parts, "resident_mb": 160.0 + repeat}
        told["pdctl"]["violations"] = {"prefill_streams": 1}
        run.keep(repeat, told)
    found = cost(run)
    assert found is not None
    assert found.cpu_ms == pytest.approx({"envoy": 1.0, "picker": 2.0})
    assert found.cpu_text() == "3.000 (envoy 1.000, picker 2.000)"
    assert (found.resident_mb, found.violations, found.requests) == (161.0, {"prefill_streams": 2}, 24)


def test_each_repeat_has_every_contender_once_and_another_one_begins() -> None:
    three = contenders("ours,vllm-router,ours:random")
    order = turns(three, 3)
    first = {repeat: next(one for number, one in order if number == repeat) for repeat in range(3)}
    assert first == dict(enumerate(three))
    assert all([number for number, _ in order].count(repeat) == 3 for repeat in range(3))


def test_routers_and_policies_are_read_from_the_flag() -> None:
    assert contenders("ours, vllm-router:random,llm-d-policies") == [
        Choice("ours", "consistent_hash"), Choice("vllm-router", "random"), Choice("ours", "llmd_pd_guide"),
    ]  # fmt: skip
    for text in ("ours", "ours,nginx", "ours,llm-d:hope", "ours,vllm-router:pd_cost", "ours,ours:consistent_hash"):
        with pytest.raises(PdctlError):
            contenders(text)


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Shell]:
    made = Shell(tmp_path)
    yield made
    for process in made.processes():
        process.kill()


LIVE = ["--prefill", "1", "--decode", "1", "--speed", "20", "8", "4", "--input-len", "60", "--output-len", "8"]


def test_ours_and_the_real_vllm_router_are_measured_in_turn_and_nothing_is_left(shell: Shell) -> None:
    answer = shell.run(
        "compare", "--routers", "ours,vllm-router", *LIVE, "--repeats", "2", "--report", "report.html", timeout=240
    )
    assert answer.returncode == 0, answer.stderr
    assert "SIMULATED" in answer.stdout
    assert "Traceback" not in answer.stderr
    page = (shell.state.parent / "report.html").read_text()
    assert "Engines are SIMULATED" in page
    (folder,) = (shell.state.parent / "data" / "pdctl" / "runs").iterdir()
    points = Run(folder).points
    assert [point.name for point in points] == ["ours-consistent_hash", "vllm-router-consistent_hash"]
    for point in points:
        assert point.finished == {0, 1}
        for told in point.results():
            assert (told["completed"], told["failed"]) == (8, 0)
            assert told["pdctl"]["router"]["resident_mb"] > 10
            # every prompt was handed over by prefill: no decode engine served alone
            assert sum(one["transfers"] for one in told["pdctl"]["transfers"]) >= 8
    told = json.loads(shell.run("compare", folder.name, "--json").stdout)
    assert told["effects"][0]["title"].startswith("router: vllm-router 0.1.17")
    assert shell.processes() == []


@llmd.needed
def test_the_real_llm_d_stands_before_the_same_engines_and_breaks_no_rule(shell: Shell) -> None:
    answer = shell.run("compare", "--routers", "llm-d,llm-d-pd-sample", *LIVE, "--repeats", "1", timeout=240)
    assert answer.returncode == 0, answer.stderr
    (folder,) = (shell.state.parent / "data" / "pdctl" / "runs").iterdir()
    run = Run(folder)
    for point in run.points:
        (told,) = point.results()
        assert (told["completed"], told["failed"], told["pdctl"]["violations"]) == (8, 0, {})
        assert sum(one["transfers"] for one in told["pdctl"]["transfers"]) >= 8
        assert told["pdctl"]["router"]["parts"].keys() == {"sidecars", "picker", "envoy"}
    found = sheet(run)
    assert found is not None
    assert found.rows[1] == ["processes", *["1 envoy, 1 picker, 1 sidecar"] * 2]
    assert "/" not in "".join(command for _, _, command in found.commands).replace("http://", "")
    assert shell.processes() == []


def test_a_killed_comparison_leaves_nothing_running_and_goes_on(shell: Shell) -> None:
    running = shell.start("compare", "--routers", "ours,ours:random", *LIVE, "--repeats", "2", "--label", "k")
    runs = shell.state.parent / "data" / "pdctl" / "runs"
    until(lambda: list(runs.glob("*/points/*/results/0.json")), 90, "the first turn is measured")
    running.send_signal(signal.SIGKILL)
    running.communicate()
    until(lambda: shell.processes() == [], 30, "engines, router and client have ended by themselves")
    assert list(shell.state.glob("compare-*/deployment.json")) == []
    (folder,) = runs.iterdir()
    kept = {path: path.read_bytes() for path in folder.glob("points/*/results/*.json")}
    again = shell.run("compare", "--resume", "k", timeout=240)
    assert again.returncode == 0, again.stderr
    assert all(path.read_bytes() == content for path, content in kept.items()), "what was measured is kept"
    assert [point.finished for point in Run(folder).points] == [{0, 1}, {0, 1}]


def test_unlike_runs_are_refused_at_the_command_line(shell: Shell) -> None:
    runs = shell.state.parent / "data" / "pdctl" / "runs"
    stored.bench(runs / "20260101-000000-a", repeats=1)
    stored.bench(runs / "20260101-000001-b", replace(stored.SMALL, concurrency=9), repeats=1)
    answer = shell.run("compare", "a", "b")
    assert answer.returncode == 2
    assert "concurrency: 4 and 9" in answer.stderr
