"""A cluster whose owner is killed leaves no process, and nothing that the next one stumbles over."""

import os
import re
import signal
import subprocess
import sys

import psutil
import pytest

from support.processes import until

from .control_plane import ROOT
from .slots import fake_pods, is_held


def started() -> tuple["subprocess.Popen[str]", str]:
    """Start `make cluster` and give it with its folder."""
    process = subprocess.Popen(
        [sys.executable, "-m", "cluster"],
        env=os.environ | {"PYTHONPATH": str(ROOT / "tests")}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout
    said = ""
    while "KUBECONFIG" not in said:
        line = process.stdout.readline()
        assert line, f"it ended: {said}"
        said += line
    found = re.search(r"logs are in (\S+);", said)
    assert found
    return process, found[1]


def slot_of(folder: str) -> int:
    return int(folder.rpartition("-")[2])


def programs(folder: str) -> set[int]:
    """Give the processes that work in a folder."""
    found = set()
    for one in psutil.process_iter():
        try:
            if one.cwd() == folder:
                found.add(one.pid)
        except psutil.Error:
            continue
    return found


@pytest.mark.skipif(os.geteuid() != 0, reason="addresses of pods are made local by ip route, which needs root")
def test_a_killed_owner_leaves_no_process_and_the_next_cluster_comes_up_in_its_place() -> None:
    process, folder = started()
    assert process.stdout
    with process.stdout:
        assert len(programs(folder)) >= 6, "etcd, API server, controllers, scheduler, kwok, kubelet"
        process.kill()
        process.wait()
    until(lambda: not programs(folder), 60, "its programs end with it")
    again, there = started()
    assert again.stdout
    with again.stdout:
        assert there == folder or is_held(slot_of(folder)), "it is in its place, or somebody else is"
        again.send_signal(signal.SIGTERM)
        assert again.wait(60) == 0
    assert not programs(there)
    assert not os.path.exists(there)
    routes = subprocess.run(["ip", "route", "show", "table", "local"], capture_output=True, text=True, check=True)
    assert fake_pods(slot_of(there)) not in routes.stdout
