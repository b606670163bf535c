"""Work that goes on in a pod whatever becomes of the connection; here the pod is this machine."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from pdctl.bench import vllm
from pdctl.bench.in_pod import done_of
from pdctl.bench.workload import Workload
from pdctl.cluster import detached
from pdctl.cluster.api import ApiError, Unreachable
from pdctl.cluster.detached import Detached, Look, command
from pdctl.errors import PdctlError
from pdctl.runs import Run
from support import stored
from support.processes import until

PYTHON = [sys.executable, "-c"]


def execute(pod: str, container: str, asked: Sequence[str]) -> str:
    assert asked[0] == "python3"
    return subprocess.run([sys.executable, *asked[1:]], capture_output=True, text=True, check=True).stdout


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Detached]:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(detached, "LOOK_SECONDS", 0.05)
    made = Detached(execute, "pod", "vllm", f"test-{uuid.uuid4().hex[:8]}")
    yield made
    made.take()


def goes_on(work: Detached) -> bool:
    """Tell whether whoever looks now finds it at work."""
    try:
        work.look()
    except PdctlError:
        return False
    return True


@contextlib.contextmanager
def killed(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """See to it that a test that fails does not wait for what it started."""
    try:
        yield
    finally:
        process.kill()


def running(work: Detached) -> list[psutil.Process]:
    """Give what runs in the work's folder."""
    found = []
    for process in psutil.process_iter():
        try:
            if work.name in process.cwd():
                found.append(process)
        except psutil.Error:
            continue
    return found


def test_what_was_started_ends_by_itself_and_its_files_come_whole(work: Detached, tmp_path: Path) -> None:
    content = os.urandom(3 << 20)
    (tmp_path / "there").write_bytes(content)
    copy = f"import shutil; print('1/2 ['); shutil.copy({str(tmp_path / 'there')!r}, 'copy')"
    work.start([[*PYTHON, copy], [*PYTHON, "print('second')"], [*PYTHON, "import sys; sys.exit(3)"], ["never"]])
    work.start([["another start changes nothing"]])
    looks: list[Look] = []
    end = work.follow(looks.append)
    assert end.statuses == (0, 0, 3), "the first that fails is the last"
    assert b"".join(one.log for one in looks) == b"1/2 [\nsecond\n"
    work.fetch("copy", tmp_path / "here")
    assert (tmp_path / "here").read_bytes() == content
    assert Detached(execute, "pod", "vllm", work.name).look().log == b"1/2 [\nsecond\n", "who comes back sees all of it"


def test_a_broken_connection_is_made_again_and_said_once(work: Detached) -> None:
    said: list[str] = []
    broken = iter([False, True, True, True])

    def sometimes(pod: str, container: str, asked: Sequence[str]) -> str:
        if next(broken, False):
            raise Unreachable("https://cluster", "no route to host")
        return execute(pod, container, asked)

    work.execute, work.tell = sometimes, said.append
    work.start([[*PYTHON, "pass"]])
    assert work.follow(lambda look: None).statuses == (0,)
    assert len(said) == 2
    assert "no route to host" in said[0]
    assert "connected to pod again" in said[1]


def test_a_process_that_is_gone_and_a_pod_that_is_gone_are_said(work: Detached) -> None:
    work.start([[*PYTHON, "import time; time.sleep(600)"]])
    until(lambda: running(work), 20, "it runs")
    parents = {one.parent() for one in running(work)}
    for process in [*parents, *running(work)]:
        if process is not None:
            process.send_signal(signal.SIGKILL)
    with pytest.raises(PdctlError, match="its process has ended"):
        work.follow(lambda look: None)

    def gone(pod: str, container: str, asked: Sequence[str]) -> str:
        raise ApiError(404, "NotFound", 'pods "pod" not found', "exec")

    with pytest.raises(PdctlError, match="the pod is gone"):
        Detached(gone, "pod", "vllm", work.name).look()


def test_taking_it_away_ends_what_runs(work: Detached) -> None:
    work.start([[*PYTHON, "import time; time.sleep(600)"]])
    until(lambda: running(work), 20, "it runs")
    work.take()
    until(lambda: not running(work), 10, "nothing runs")
    with pytest.raises(PdctlError, match="was fetched or removed"):
        work.look()


def test_a_container_that_is_restarted_goes_on_where_it_was(work: Detached, tmp_path: Path) -> None:
    wait = "import pathlib, time\nwhile not pathlib.Path('go').exists(): time.sleep(0.02)"
    commands = [[*PYTHON, "print('first')"], [*PYTHON, wait], [*PYTHON, "print('last')"]]
    asked = [sys.executable, *command("stay", work.name, commands)[1:]]
    with subprocess.Popen(asked) as first, killed(first):
        until(lambda: goes_on(work) and work.look().statuses == (0,) and running(work), 20, "the second command runs")
        first.kill()
        for process in running(work):
            process.kill()
    until(lambda: not running(work), 20, "nothing runs")
    with subprocess.Popen(asked, stdout=subprocess.PIPE) as again, killed(again):
        until(lambda: goes_on(work), 20, "it runs again")
        (tmp_path / "pdctl" / work.name / "go").touch()
        end = work.follow(lambda look: None)
        assert end.statuses == (0, 0, 0)
        work.fetch("log", tmp_path / "log")
        assert (tmp_path / "log").read_text() == "first\nlast\n"
        work.take()
        again.communicate(timeout=20)
    assert again.returncode == 0, "whoever took the files ends it"


@pytest.mark.parametrize(
    ("ended", "tail", "done"),
    [
        (0, b"loading\n", 0),
        (0, "\r 5%|▌   | 10/200 [00:05<01:30, 2.1it/s]\r 6%|▌   | 12/200 [00:05<01:30, 2.1it/s]".encode(), 12),
        (2, b"\r| 7/200 [00:05<", 407),
        (1, b"Fetching 3/3 [00:00", 200),
    ],
)
def test_progress_is_read_from_the_bar_in_the_log(ended: int, tail: bytes, done: int) -> None:
    assert done_of(Workload(num_prompts=200, input_len=1, output_len=1), ended, tail) == done


def test_the_result_of_vllm_bench_serve_is_checked_and_its_failures_and_goodput_are_told(tmp_path: Path) -> None:
    workload = replace(stored.SMALL, num_prompts=3)
    run = Run(tmp_path / "run")
    run.begin(stored.about(workload, slos={"ttft": 300.0, "itl": 30.0}))
    told = {
        "completed": 2, "failed": 1, "duration": 2.0, "request_goodput": None, "start_times": [5.0, 5.1, 5.2],
        "ttfts": [0.1, 0.2, 0.0], "itls": [[0.01, 0.02], [0.01, 0.9], []], "latencies": [0.13, 1.1, 0.0],
        "input_lens": [50, 50, 50], "output_lens": [3, 3, 0], "generated_texts": ["", "", ""],
        "queue_times": [0.0, 0.0, 0.0], "errors": ["", "", "Traceback\naiohttp: refused"],
    }  # fmt: skip
    path = tmp_path / "result.json"
    path.write_text(json.dumps(told))
    vllm.keep(run, 0, path)
    kept = vllm.keep(run, 0, path)  # whoever was killed in between fetches it again
    assert kept["pdctl"]["errors"] == {"aiohttp: refused": 1}
    assert kept["request_goodput"] == 0.5, "the second one has a gap of 900 ms, the third one failed"
    assert kept["pdctl"]["slo_attainment"] == pytest.approx(1 / 3)
    assert [record.number for record in run.records()] == [0, 1, 2]
    path.write_text(json.dumps(told | {"completed": 1}))
    with pytest.raises(PdctlError, match="counts 2 of 3 requests"):
        vllm.keep(run, 0, path)
    path.write_text('{"completed": 2')
    with pytest.raises(PdctlError, match="cannot be read"):
        vllm.keep(run, 0, path)
