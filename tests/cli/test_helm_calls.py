"""Calls of Helm end, at whatever moment the command that made them comes to its own end."""

import asyncio
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pdctl.cluster import helm
from pdctl.cluster.helm import Helm, HelmError

BROKEN_OFF = """
import asyncio, sys
from pdctl.cluster.helm import Helm

async def main(program: str, steps: int) -> None:
    call = asyncio.ensure_future(Helm(program, (4, 0)).call("version"))
    for _ in range(steps):
        await asyncio.sleep(0)
    raise SystemExit(7)

asyncio.run(main(sys.argv[1], int(sys.argv[2])))
"""


INTERRUPTED = """
import asyncio, sys
from pdctl.cluster import helm

helm.STOP_SECONDS = 0.3

async def main(program: str) -> None:
    call = asyncio.ensure_future(helm.Helm(program, (4, 0)).call("upgrade"))
    await asyncio.sleep(0.5)
    while not call.done():  # as anyio cancels
        call.cancel()
        await asyncio.sleep(0)

asyncio.run(main(sys.argv[1]))
"""


def program(folder: Path, script: str) -> str:
    path = folder / "helm"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize("steps", range(1, 8))
def test_a_command_that_fails_beside_a_call_that_starts_comes_to_its_end(steps: int, tmp_path: Path) -> None:
    ended = tmp_path / "ended"
    stub = program(tmp_path, f"sleep 0.2; touch {ended}")
    done = subprocess.run([sys.executable, "-c", BROKEN_OFF, stub, str(steps)], timeout=30, check=False)
    assert done.returncode == 7
    assert ended.exists(), "Helm was broken off in its work"


def test_a_call_that_never_ends_is_told_and_nothing_of_it_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(helm, "CALL_SECONDS", 1)
    monkeypatch.setattr(helm, "STOP_SECONDS", 0.2)
    pid = tmp_path / "pid"
    stub = program(tmp_path, f"trap '' INT; sleep 100 & echo $! > {pid}; while :; do wait; done")
    began = time.monotonic()
    with pytest.raises(HelmError, match="helm status did not end within 1 s"):
        asyncio.run(Helm(stub, (4, 0)).call("status", "ms-llama31"))
    assert time.monotonic() - began < 30  # it would be 100 if what holds its output open lived on
    child = Path(f"/proc/{pid.read_text().strip()}/stat")
    assert not child.exists() or child.read_text().split()[2] == "Z"


def test_a_call_that_is_cancelled_again_and_again_is_ended_all_the_same(tmp_path: Path) -> None:
    told = tmp_path / "told"
    stub = program(tmp_path, f"trap 'echo asked >> {told}' INT; sleep 100 & while :; do wait; done")
    command = [sys.executable, "-c", INTERRUPTED, stub]
    done = subprocess.run(command, timeout=30, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "waiting for helm to end\n"
    assert told.read_text() == "asked\n"
