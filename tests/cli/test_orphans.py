"""What pdctl starts for itself does not outlive it, whenever it is killed."""

import subprocess
import sys
from pathlib import Path

import psutil

from support.processes import until

KILLED_WHILE_IT_STARTS = """
import os, pathlib, subprocess, sys, time
from pdctl.supervisor import die_with_parent

parent, bind = os.getpid(), die_with_parent()

def slowly() -> None:
    pathlib.Path(sys.argv[1]).write_text(str(os.getpid()))
    while os.getppid() == parent:
        time.sleep(0.01)
    bind()

subprocess.Popen(["sleep", "600"], preexec_fn=slowly)
"""


def test_a_process_whose_parent_is_killed_while_it_starts_ends_too(tmp_path: Path) -> None:
    told = tmp_path / "pid"
    with subprocess.Popen([sys.executable, "-c", KILLED_WHILE_IT_STARTS, str(told)]) as parent:
        until(lambda: told.exists() and told.read_text(), 20, "it starts")
        parent.kill()
    child = int(told.read_text())
    until(lambda: not psutil.pid_exists(child), 20, "nobody is left")
