"""A local deployment as it is written down: what was asked for, which processes it is made of, where its files are."""

import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from signal import Signals
from typing import Any

import orjson
import platformdirs
import psutil

from pdctl.errors import ExitCode, PdctlError
from pdctl.routers.choice import Router

NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?")


@dataclass(slots=True)
class Member:
    """One process of a deployment.

    Args:
        name: `prefill-0`, `decode-3`, `router`.
        role: `prefill`, `decode` or `router`.
        url: where it answers.
        command: how it is started.
        pid: process id, once started.
        created: the process's start time as the system tells it; with the pid it is unmistakable.
        exit: exit status once it has ended; negative: the signal.
        ready: what answers 200 once it serves; empty: `/health` of its URL, of pd-router `/ready`.
        leaving: whether it has been told to end, and finishes what it has.
    """

    name: str
    role: str
    url: str
    command: list[str]
    pid: int | None = None
    created: float | None = None
    exit: int | None = None
    ready: str = ""
    leaving: bool = False

    @property
    def ready_url(self) -> str:
        """What answers 200 once it serves."""
        return self.ready or self.url + ("/ready" if self.role == "router" else "/health")

    @property
    def alive(self) -> bool:
        """Whether the process still runs."""
        return is_running(self.pid, self.created)

    @property
    def ended(self) -> str:
        """How it ended."""
        if self.exit is None:
            return "gone"
        if self.exit < 0:
            with suppress(ValueError):
                return f"killed by {Signals(-self.exit).name}"
        return f"exit status {self.exit}"


@dataclass(slots=True)
class Deployment:
    """A local deployment.

    Args:
        name: what it is called.
        subnet: x of its addresses 127.1.x.y; 0: it has none.
        model: served model name.
        speed: how much faster than real time its engines run.
        policy: the router's.
        router_url: where clients find the router, whichever it is.
        metrics_url: the router's metrics.
        members: its processes.
        supervisor_pid: process id of its supervisor.
        supervisor_created: its supervisor's start time.
        started: when (Unix time).
        router: which router it is.
        own_url: where the router answers by itself, when something else takes its clients' connections.
        envoy_url: administration of the Envoy that takes clients' connections, where there is one.
    """

    name: str
    subnet: int
    model: str
    speed: float
    policy: str
    router_url: str
    metrics_url: str
    members: list[Member] = field(default_factory=list)
    supervisor_pid: int | None = None
    supervisor_created: float | None = None
    started: float = 0.0
    router: Router = "ours"
    own_url: str = ""
    envoy_url: str = ""

    @property
    def engines(self) -> list[Member]:
        """The engines, prefill first."""
        return [member for member in self.members if member.role != "router"]

    def of_role(self, role: str) -> list[Member]:
        """The members of a role."""
        return [member for member in self.members if member.role == role]

    @property
    def folder(self) -> Path:
        """Where its files are."""
        return folder_of(self.name)

    @property
    def supervised(self) -> bool:
        """Whether its supervisor runs."""
        return is_running(self.supervisor_pid, self.supervisor_created)

    @property
    def running(self) -> list[Member]:
        """The members that run."""
        return [member for member in self.members if member.alive]

    def log(self, member: str) -> Path:
        """Where a member's log is."""
        return self.folder / "logs" / f"{member}.log"

    def save(self, path: Path | None = None) -> None:
        """Write it down; readers see the old or the new state, never half of one."""
        path = path or self.folder / "deployment.json"
        new = path.with_suffix(".json.new")
        new.write_bytes(orjson.dumps(asdict(self), option=orjson.OPT_INDENT_2))
        os.replace(new, path)

    @property
    def wanted(self) -> Path:
        """Where it is written down as its supervisor shall make it."""
        return self.folder / "wanted.json"


def is_running(pid: int | None, created: float | None) -> bool:
    """Whether the process of that id and start time runs; a process with a recycled id is another one."""
    if pid is None or created is None:
        return False
    try:
        process = psutil.Process(pid)
        return abs(process.create_time() - created) < 1 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def state_folder() -> Path:
    """Give the folder of all deployments."""
    return Path(platformdirs.user_state_dir("pdctl"))


def folder_of(name: str) -> Path:
    """Give the folder of a deployment.

    Raises:
        PdctlError: the name is none.
    """
    if not NAME.fullmatch(name):
        raise PdctlError(
            f"{name!r} cannot be a deployment's name",
            "use up to 40 lower-case letters, digits and dashes",
            ExitCode.USAGE,
        )
    return state_folder() / name


def names() -> list[str]:
    """Give the names of the deployments that are written down."""
    found = state_folder().glob("*/deployment.json")
    return sorted(path.parent.name for path in found)


def load(name: str) -> Deployment:
    """Read a deployment.

    Raises:
        PdctlError: there is none of that name.
    """
    path = folder_of(name) / "deployment.json"
    try:
        return read(orjson.loads(path.read_bytes()))
    except FileNotFoundError:
        known = names()
        others = f"; deployed are: {', '.join(known)}" if known else ""
        raise PdctlError(
            f"nothing is deployed under the name {name!r}{others}",
            f"run pdctl deploy --local{'' if name == 'local' else f' --name {name}'}"
            + (", or name one of these with --name" if known else ""),
        ) from None
    except (ValueError, TypeError, KeyError) as error:
        raise PdctlError(
            f"{path} cannot be read: {error}",
            f"use the version of pdctl that wrote it, or end what it names, remove {path.parent} and deploy again",
        ) from error


def read(told: dict[str, Any]) -> Deployment:
    """Read a deployment from what was written down of it."""
    return Deployment(**told | {"members": [Member(**member) for member in told["members"]]})


def remove(name: str) -> None:
    """Remove a deployment's files."""
    shutil.rmtree(folder_of(name), ignore_errors=True)


@contextmanager
def locked(name: str, what: str = "lock") -> Iterator[bool]:
    """Hold a lock of a deployment, by default the one of a running supervisor; yields False when another has it."""
    folder = folder_of(name)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / what).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
