"""`python -m pdctl.supervisor NAME [PARENT]`: starts a local deployment's processes and notes how they end.

It runs in a session of its own and outlives the command that started it, unless that gave its process id as PARENT:
then it ends when that does, and leaves no files. SIGTERM stops all. Its children are killed when it dies.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from types import FrameType

import orjson
import psutil

from pdctl.deployment import Deployment, Member, load, locked, read, remove

GRACE_SECONDS = 5.0
NOT_RUN = 127  # exit status of what cannot be run, as shells have it
PR_SET_PDEATHSIG = 1


def die_with_parent() -> Callable[[], None]:
    """Give the `preexec_fn` by which the kernel kills a new process when this one is gone."""
    parent = os.getpid()

    def bind() -> None:
        with contextlib.suppress(OSError, AttributeError):  # only Linux has it
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # gone before the kernel knew
            os.kill(os.getpid(), signal.SIGKILL)

    return bind


def _start(deployment: Deployment, members: list[Member]) -> dict[str, subprocess.Popen[bytes]]:
    """Start processes; one whose program cannot be run has ended at once, and its log says why."""
    started = {}
    for member in members:
        with deployment.log(member.name).open("ab") as log:
            try:
                child = subprocess.Popen(
                    member.command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    preexec_fn=die_with_parent(),  # noqa: PLW1509 the supervisor has one thread
                )
            except OSError as error:
                log.write(f"{error}\n".encode())
                member.exit = NOT_RUN
                continue
        started[member.name] = child
        member.pid = child.pid
        with contextlib.suppress(psutil.NoSuchProcess):
            member.created = psutil.Process(child.pid).create_time()
    return started


def _change(known: Deployment, children: dict[str, subprocess.Popen[bytes]], wanted: Deployment) -> Deployment:
    """Start what is new in another deployment, tell what it does not have to end; give what there is then."""
    stays = {member.name for member in wanted.members}
    for member in known.members:
        if member.name not in stays and not member.leaving:
            member.leaving = True
            if member.exit is None:
                children[member.name].terminate()
    there = {member.name for member in known.members}
    new = [member for member in wanted.members if member.name not in there]
    children |= _start(known, new)
    wanted.supervisor_pid, wanted.supervisor_created = known.supervisor_pid, known.supervisor_created
    wanted.members = [*known.members, *new]
    return wanted


def _reap(deployment: Deployment, children: dict[str, subprocess.Popen[bytes]]) -> bool:
    """Note who has ended, and forget who was told to; True when anything changed."""
    changed = False
    for member in deployment.members:
        if member.exit is None and (status := children[member.name].poll()) is not None:
            member.exit = status
            changed = True
    for member in [one for one in deployment.members if one.leaving and one.exit is not None]:
        deployment.members.remove(member)
        children.pop(member.name, None)
        changed = True
    return changed


def _stop(children: dict[str, subprocess.Popen[bytes]]) -> None:
    for child in children.values():
        if child.poll() is None:
            child.terminate()
    deadline = time.monotonic() + GRACE_SECONDS
    for child in children.values():
        try:
            child.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


class _Stopped(Exception):  # noqa: N818 a signal, not an error
    pass


def main(name: str, parent: int | None = None) -> int:
    """Supervise until told to stop, or until the parent is gone where one is given."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise _Stopped

    with locked(name) as mine:
        if not mine:
            print(f"a supervisor of {name} already runs", file=sys.stderr)
            return 1
        deployment = load(name)
        deployment.supervisor_pid = os.getpid()
        deployment.supervisor_created = psutil.Process().create_time()
        deployment.started = time.time()
        children: dict[str, subprocess.Popen[bytes]] = {}
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, stop)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        try:
            children = _start(deployment, deployment.members)
            deployment.save()
            while True:
                time.sleep(0.2)
                if _reap(deployment, children):
                    deployment.save()
                if deployment.wanted.exists():
                    deployment = _change(deployment, children, read(orjson.loads(deployment.wanted.read_bytes())))
                    _reap(deployment, children)
                    deployment.save()
                    deployment.wanted.unlink()
                if parent is not None and os.getppid() != parent:
                    raise _Stopped
        except _Stopped:
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_IGN)
            _stop(children)
            _reap(deployment, children)
            deployment.save()
    if parent is not None and os.getppid() != parent:
        remove(name)  # nobody else will
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else None))
