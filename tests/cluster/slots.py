"""What a machine has only once, shared among the clusters on it: addresses, names, a folder for each, by a number.

A lock says that a slot's owner lives. What an owner that was killed left behind is removed by whoever starts next.
"""

import contextlib
import fcntl
import os
import pathlib
import shutil
import subprocess
import time
from collections.abc import Iterator

from .control_plane import ClusterError

SLOTS = 32
GROUPS = pathlib.Path("/sys/fs/cgroup")


def fake_pods(slot: int) -> str:
    """Give the addresses of a slot's fake pods."""
    return f"10.250.{slot * 4}.0/22"


def outer_link(slot: int) -> str:
    """Give the name of the interface that leads to real nodes; pods' and Services' routes go with it."""
    return f"pdctl{slot}"


def beyond(slot: int) -> str:
    """Give this machine's address at the other end of that interface, as real nodes see it."""
    return f"10.252.{slot}.254"


def ports(slot: int) -> range:
    """Give the ports of a slot's control plane.

    They are below those that connections are given (32768 on; ip_local_port_range): while the API server is away, a
    client that asks for it again and again would some day be given its very port, and be connected to itself.
    """
    return range(11100 + 8 * slot, 11108 + 8 * slot)


def _folder(slot: int) -> pathlib.Path:
    return pathlib.Path(f"/tmp/pdctl-cluster-{slot}")


def _claim(slot: int) -> int | None:
    """Give the lock's descriptor, or None when another process holds it."""
    file = os.open(f"/tmp/.pdctl-cluster-{slot}.lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        return None
    return file


def is_held(slot: int) -> bool:
    """Whether a process holds a slot."""
    file = _claim(slot)
    if file is not None:
        os.close(file)
    return file is None


@contextlib.contextmanager
def claimed_slot() -> Iterator[int]:
    """Claim a slot for as long as this process lives; clean the others that nobody holds.

    Raises:
        ClusterError: all are taken, or one cannot be cleaned.
    """
    with contextlib.ExitStack() as held:
        mine: int | None = None
        for slot in range(SLOTS):
            file = _claim(slot)
            if file is None:
                continue
            if _folder(slot).exists():
                remove_left_overs(slot)
            if mine is None:
                mine = slot
                held.callback(os.close, file)
            else:
                os.close(file)
        if mine is None:
            raise ClusterError(f"{SLOTS} clusters run on this machine already")
        yield mine


@contextlib.contextmanager
def folder_of(slot: int) -> Iterator[pathlib.Path]:
    """Give an empty folder of a short name; it and all else of the slot is removed afterwards."""
    folder = _folder(slot)
    folder.mkdir(mode=0o700)
    try:
        yield folder
    finally:
        remove_left_overs(slot)


def remove_left_overs(slot: int) -> None:
    """Remove what does not end with a cluster's processes: routes, links, control groups, the folder.

    A network namespace lives on for a minute where a connection was cut, and with it an interface that leads there.

    Raises:
        ClusterError: something is still in use.
    """
    for command in (f"link del {outer_link(slot)}", f"route del local {fake_pods(slot)} dev lo table local"):
        subprocess.run(["ip", *command.split()], capture_output=True, check=False)
    deadline = time.monotonic() + 60
    while left := list(GROUPS.glob(f"*/pdctl-{slot}-gpu-*")):
        for group in left:
            for inner, _, _ in os.walk(group, topdown=False):
                with contextlib.suppress(OSError):
                    os.rmdir(inner)
        if time.monotonic() > deadline:
            raise ClusterError(f"control groups are still in use: {left}")
        time.sleep(0.02)
    shutil.rmtree(_folder(slot), ignore_errors=True)
