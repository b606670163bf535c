"""One container of a fake node's pod: a process of this machine, forked from one that has loaded the programs already.

A program that listens gets the pod's address. What Kubernetes mounts (the service account's token, ConfigMaps, Secrets,
the names of Services in /etc/hosts) is put into a mount namespace of its own, so the router reads the very paths that
it reads in a real pod.
"""

import ctypes
import os
import pathlib
import sys
from dataclasses import dataclass

from pdctl.evals.evaluate import LM_EVAL
from pdctl.routers.programs import vllm_router

from .control_plane import die_with_parent

PRELOADED = ["cluster.fork_server", "pdsim.engine.vllm", "pdrouter.app"]
LISTENING = {"pd-router": ("--host", "--prometheus-host", "--admin-host")}
ENTRY_POINTS = {"pd-router": ["pd-router"]}
"""What an image starts when its container names no command, by the end of the image's name."""
INTERPRETERS = {"lm-eval": str(LM_EVAL.folder / "bin/python")}
"""Whose Python an image has, where it is not that of the tests."""

_CLONE_NEWNS, _MS_PRIVATE, _MS_REC, _MS_BIND = 0x00020000, 1 << 18, 1 << 14, 1 << 12
_MOUNTS = "/run/mounts"


@dataclass(frozen=True)
class Start:
    """What a process is started with.

    Args:
        files: mounted folders' files by their path in the container.
        hosts: the file that becomes /etc/hosts.
    """

    command: list[str]
    environment: dict[str, str]
    address: str
    files: dict[str, bytes]
    hosts: str


def run(start: Start, output: int) -> None:
    """Become the container; called in the forked process, with the descriptor for its output."""
    os.setsid()
    die_with_parent()
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # type: ignore[attr-defined]
    # Installed, if need be, with the settings of this machine, which the container has not.
    its_own = vllm_router(print) if start.command[0] == "vllm-router" else ""
    _mount(start)
    os.environ.clear()
    os.environ.update(start.environment)
    program, *arguments = [_moved(part, start.files) for part in start.command]
    if program == "vllm":
        from pdsim.engine import vllm

        vllm.main([f"--host={start.address}" if part == "--host=0.0.0.0" else part for part in arguments])
    elif program == "pd-router":
        from pdrouter import app

        sys.argv = [program, *arguments, *(f"{flag}={start.address}" for flag in LISTENING[program])]
        app.main()
    elif program == "vllm-router":
        os.execv(its_own, [program, *(part.replace("0.0.0.0", start.address) for part in arguments)])
    elif program == "python3" or program in INTERPRETERS.values():
        python = sys.executable if program == "python3" else program
        os.execv(python, [python, *arguments])
    else:
        print(f'exec: "{program}": executable file not found in $PATH')
        os._exit(127)


def _moved(text: str, files: dict[str, bytes]) -> str:
    """Name a mounted folder by where it is here."""
    for folder in {os.path.dirname(path) for path in files}:
        if not folder.startswith("/run/"):
            text = text.replace(folder + "/", _MOUNTS + folder + "/")
    return text


def _mount(start: Start) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNS) != 0:
        raise OSError(ctypes.get_errno(), "unshare")
    libc.mount(None, b"/", None, _MS_REC | _MS_PRIVATE, None)
    libc.mount(b"pod", b"/run", b"tmpfs", 0, b"size=16m")
    libc.mount(start.hosts.encode(), b"/etc/hosts", None, _MS_BIND, None)
    for path, content in start.files.items():
        there = pathlib.Path(path if path.startswith("/run/") else _MOUNTS + path)
        there.parent.mkdir(parents=True, exist_ok=True)
        told = there.name.endswith((".yaml", ".json"))
        there.write_bytes(_moved(content.decode(), start.files).encode() if told else content)
