"""Routers that take turns before the same engines: how each is started, and what it costs."""

import contextlib
import os
import re
import signal
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import httpx
import psutil

from pdctl.deployment import Deployment, Member
from pdctl.errors import ExitCode, PdctlError
from pdctl.routers import serving
from pdctl.routers.choice import Choice, read
from pdctl.routers.parts import Parts, parts
from pdctl.routers.programs import ENVOY, Programs, Say
from pdctl.supervisor import die_with_parent

START_SECONDS = 60.0
NO_PROGRAMS = Programs()
_BUILD = re.compile(r'^\w*info\{.*commit="(\w*)"', re.M)


def contenders(text: str) -> list[Choice]:
    """Read `ours,vllm-router:cache_aware,llm-d`.

    Raises:
        PdctlError: a name or policy is not known, or there are not two.
    """
    found = list(dict.fromkeys(read(part) for part in text.split(",")))
    if len(found) < 2:
        raise PdctlError(
            "a comparison needs two routers that differ", "as in --routers ours,vllm-router", ExitCode.USAGE
        )
    return found


@dataclass(slots=True)
class Standing:
    """A contender that serves.

    Args:
        url: where it answers.
        running: its processes.
        version: of its programs.
    """

    url: str
    running: list[tuple[Member, subprocess.Popen[bytes]]]
    version: str

    @property
    def members(self) -> list[Member]:
        """Its processes as they were asked for."""
        return [member for member, _ in self.running]

    def cost(self) -> dict[str, tuple[float, float]]:
        """Give processor seconds so far and resident MB of each kind of process, children included."""
        found: dict[str, tuple[float, float]] = defaultdict(lambda: (0.0, 0.0))
        for member, started in self.running:
            with contextlib.suppress(psutil.NoSuchProcess):
                process = psutil.Process(started.pid)
                for one in [process, *process.children(recursive=True)]:
                    times, memory = one.cpu_times(), one.memory_info().rss / 1e6
                    kind = _kind(member)
                    seconds, resident = found[kind]
                    found[kind] = (seconds + times.user + times.system, resident + memory)
        return dict(found)


def _kind(member: Member) -> str:
    return "sidecars" if member.name.startswith("sidecar-") else member.name


@contextmanager
def standing(
    choice: Choice, engines: Deployment, logs: Path, say: Say, programs: Programs = NO_PROGRAMS
) -> Iterator[Standing]:
    """Start a contender, wait until it serves through both roles, end it afterwards.

    Raises:
        PdctlError: it does not start or serve.
    """
    made = parts(choice, engines.engines, logs, programs, say)
    running: list[tuple[Member, subprocess.Popen[bytes]]] = []
    try:
        for stage in made.stages:
            running += [(member, _started(member, logs)) for member in stage]
            serving.wait(
                choice, made, stage, engines.model, len(engines.engines), START_SECONDS,
                partial(_check, choice, running, logs),
            )  # fmt: skip
        yield Standing(made.url, running, version_of(choice, made))
    finally:
        for _, process in running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _started(member: Member, logs: Path) -> subprocess.Popen[bytes]:
    logs.mkdir(parents=True, exist_ok=True)
    with (logs / f"{member.name}.log").open("ab") as file:
        return subprocess.Popen(
            member.command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
            preexec_fn=die_with_parent(),  # noqa: PLW1509 no thread of ours holds a lock here
        )  # fmt: skip


def _check(choice: Choice, running: list[tuple[Member, subprocess.Popen[bytes]]], logs: Path) -> None:
    for member, process in running:
        if process.poll() is not None:
            log = logs / f"{member.name}.log"
            raise PdctlError(
                f"{choice.title} does not serve: {member.name} ended", f"see the whole log: {log}",
                evidence=log.read_text(errors="replace").splitlines()[-8:],
            )  # fmt: skip


def version_of(choice: Choice, made: Parts) -> str:
    """Give the versions of a contender's programs, and whether ours is compiled."""
    if choice.router == "llm-d":
        told = _BUILD.search(httpx.get(made.metrics_url, timeout=10).text)
        return f"{told[1][:8] if told and told[1] else 'unknown'}, Envoy {ENVOY}"
    package, module = choice.package, "pdrouter" if choice.router == "ours" else "vllm_router"
    code = (
        "import importlib.metadata as m, importlib.util as u, pathlib as p; "
        f"compiled = any(p.Path(u.find_spec({module!r}).origin).parent.rglob('*.so')); "
        f"print(m.version({package!r}), compiled)"
    )
    python = Path(made.members[0].command[0]).parent / "python"
    answer = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=False)
    version, _, compiled = answer.stdout.strip().partition(" ")
    if choice.router == "ours":
        return f"{version or 'unknown'} ({'compiled' if compiled == 'True' else 'not compiled'})"
    return version or "unknown"
