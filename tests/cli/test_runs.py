"""Runs that are kept: found, shown, exported, removed; what a killed one had measured is there."""

import json
from pathlib import Path

import pytest

from pdctl.bench.measure import forget
from pdctl.errors import PdctlError
from pdctl.runs import Run, Store
from pdctl.runs.export import export
from pdctl.runs.setting import values_hash
from support import stored
from support.shell import Shell


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "runs")


def test_a_run_is_found_by_name_beginning_label_and_as_the_last(store: Store) -> None:
    first, second = store.new("bench", "baseline"), store.new("bench", None)
    for run in (first, second):
        run.begin(stored.about(stored.SMALL))
    assert store.find(first.name).folder == first.folder
    assert store.find("baseline").folder == first.folder
    assert store.find("last").folder == second.folder
    with pytest.raises(PdctlError, match="may be"):
        store.find(first.name[:8])
    with pytest.raises(PdctlError, match="there is no run 'other'"):
        store.find("other")


def test_two_runs_of_one_second_have_folders_of_their_own(store: Store) -> None:
    assert len({store.new("bench", "x").folder for _ in range(3)}) == 3


def test_a_label_cannot_lead_out_of_the_store(store: Store) -> None:
    with pytest.raises(PdctlError, match="cannot be a label"):
        store.new("bench", "../../etc")


def test_a_killed_runs_requests_become_partial_figures(store: Store) -> None:
    run = store.new("bench", None)
    stored.bench(run.folder, repeats=1)
    run.result_path(0).unlink()
    run.note(state="running", pid=2**22 - 1, pid_created=1.0)
    with (run.folder / "requests.jsonl").open("ab") as file:
        file.write(b'{"repeat": 0, "number": 99, "sta')  # cut short by the kill
    again = Run(run.folder)
    assert again.state == "killed"
    (told,) = again.results()
    assert (told["completed"], told["pdctl"]["partial"]) == (stored.SMALL.num_prompts, True)
    assert again.finished == set()


def test_figures_of_whole_repeats_are_not_mixed_with_partial_ones(store: Store) -> None:
    run = store.new("bench", None)
    stored.bench(run.folder, repeats=3)
    run.result_path(2).unlink()
    assert len(run.results()) == 3
    assert [one["pdctl"]["repeat"] for one in run.whole_results()] == [0, 1]


def test_an_export_has_what_vllms_plotting_reads(store: Store, tmp_path: Path) -> None:
    run = store.new("sweep", None)
    stored.sweep(run.folder)
    export(run, tmp_path / "out")
    summaries = list((tmp_path / "out").rglob("summary.json"))
    assert len(summaries) == 6
    rows = [row for path in summaries for row in json.loads(path.read_text())]
    # what `vllm bench sweep plot` and `plot_pareto` take by default
    for key in ("max_concurrency", "total_token_throughput", "output_throughput", "median_ttft_ms", "num_gpus"):
        assert all(isinstance(row[key], int | float) for row in rows), key
    assert {row["max_concurrency"] for row in rows} == {1, 4, 16}


def test_the_values_hash_changes_with_a_setting_and_not_with_their_order() -> None:
    assert values_hash({"a": 1, "b": 2}) == values_hash({"b": 2, "a": 1}) != values_hash({"a": 1, "b": 3})


def test_runs_are_listed_shown_and_removed_at_the_command_line(tmp_path: Path) -> None:
    shell = Shell(tmp_path)
    run = Store(tmp_path / "data" / "pdctl" / "runs").new("bench", "mine")
    stored.bench(run.folder)
    listed = shell.run("runs", "ls")
    assert run.name in listed.stdout
    assert "simulated" in listed.stdout
    shown = shell.run("runs", "show", "mine")
    assert "SIMULATED" in shown.stdout
    assert "Median TTFT (ms)" in shown.stdout
    assert shell.told("runs", "show", "mine")["workload"]["num_prompts"] == stored.SMALL.num_prompts
    kept = shell.run("runs", "rm", "mine")
    assert kept.returncode != 0
    assert run.folder.exists()
    assert shell.run("runs", "rm", "mine", "-y").returncode == 0
    assert not run.folder.exists()


@pytest.mark.parametrize("content", ["", "null", "{}"])
def test_a_run_that_cannot_be_read_is_listed_as_such_harms_no_other_and_can_be_removed(
    tmp_path: Path, content: str
) -> None:
    shell = Shell(tmp_path)
    store = Store(tmp_path / "data" / "pdctl" / "runs")
    good, bad = store.new("bench", "good"), store.new("bench", "zbad")
    stored.bench(good.folder)
    (bad.folder / "run.json").write_text(content)
    listed = shell.run("runs", "ls")
    assert listed.returncode == 0, listed.stderr
    assert good.name in listed.stdout
    assert "unreadable" in next(line for line in listed.stdout.splitlines() if bad.name in line)
    assert [run["state"] for run in shell.told("runs", "ls")] == ["done", "unreadable"]
    for words in (("report", "last"), ("runs", "show", "zbad")):
        answer = shell.run(*words)
        assert answer.returncode == 1
        assert f"{bad.folder}/run.json cannot be read" in answer.stderr
        assert "Traceback" not in answer.stderr
    attached = shell.run("bench", "--attach")
    assert "no run goes on in a cluster" in attached.stderr
    assert shell.run("runs", "rm", "zbad", "-y").returncode == 0
    assert not bad.folder.exists()
    assert good.folder.exists()


@pytest.mark.parametrize("name", ["results/0.json", "requests.jsonl"])
def test_a_run_with_a_broken_file_of_figures_is_listed_as_unreadable(tmp_path: Path, name: str) -> None:
    shell = Shell(tmp_path)
    run = Store(tmp_path / "data" / "pdctl" / "runs").new("bench", "mine")
    stored.bench(run.folder)
    (run.folder / name).write_text("{\n")
    listed = shell.run("runs", "ls")
    assert listed.returncode == 0, listed.stderr
    assert "unreadable" in listed.stdout
    assert f"{name} cannot be read" in shell.run("runs", "show", "mine").stderr


def test_a_repeat_is_forgotten_by_a_new_file_so_that_a_kill_loses_no_other(store: Store) -> None:
    run = store.new("bench", None)
    stored.bench(run.folder, repeats=2)
    path = run.folder / "requests.jsonl"
    before = path.with_name("before")
    before.hardlink_to(path)
    whole = path.read_bytes()
    forget(path, 1)
    assert {line["repeat"] for line in run.lines("requests.jsonl")} == {0}
    assert before.read_bytes() == whole
