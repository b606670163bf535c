"""Helm as pdctl calls it: short calls that never wait for pods, each in a session of its own.

A Ctrl-C at the terminal does not reach Helm, so a release is never left half recorded by one; pdctl lets the call end
and then stops. Values go by file, and the environment has no HF_TOKEN.
"""

import asyncio
import contextlib
import difflib
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
import yaml

from pdctl.errors import ExitCode, PdctlError

OLDEST = (3, 18)
HISTORY = "5"
CALL_SECONDS = 300
STOP_SECONDS = 10.0
POLL_SECONDS = 0.2
PENDING = ("pending-install", "pending-upgrade", "pending-rollback", "unknown")


@dataclass(frozen=True, slots=True)
class Release:
    """One release of the deployment.

    Args:
        part: `engines` or `router`.
        values: files, later ones deciding.
        sets: `KEY=VALUE` as Helm's --set takes them, deciding over files.
    """

    part: str
    name: str
    chart: Path
    values: tuple[Path, ...] = ()
    sets: tuple[str, ...] = ()
    reuse: bool = False

    @property
    def arguments(self) -> list[str]:
        """How Helm is told the values."""
        told = ["--reset-then-reuse-values"] if self.reuse else []
        told += [part for path in self.values for part in ("--values", str(path))]
        return told + [part for one in self.sets for part in ("--set", one)]


@dataclass(frozen=True, slots=True)
class State:
    """What Helm has recorded of a release.

    Args:
        status: `deployed`, `failed`, `pending-upgrade`, …; empty when there is no such release.
    """

    status: str = ""
    revision: int = 0
    message: str = ""

    @property
    def exists(self) -> bool:
        """Whether there is such a release."""
        return bool(self.status)

    @property
    def stuck(self) -> bool:
        """Whether whoever changed it never came to an end."""
        return self.status in PENDING


class HelmError(PdctlError):
    """Helm did not do what it was asked for."""


@dataclass(slots=True)
class Helm:
    """Helm against one namespace of one context.

    Args:
        context: of the kubeconfig; empty: none, for rendering only.
        calls: what has been called and said, for the evidence.
    """

    program: str
    version: tuple[int, int]
    context: str = ""
    namespace: str = ""
    calls: list[str] = field(default_factory=list)

    @property
    def applies_on_server(self) -> bool:
        """Whether it is Helm 4 or newer."""
        return self.version >= (4, 0)

    async def call(self, *arguments: str) -> str:
        """Run Helm and give its standard output.

        Raises:
            HelmError: its exit status is not 0; what it said is the evidence.
        """
        command = [self.program, *arguments]
        if self.namespace:
            command += ["--namespace", self.namespace]
        if self.context:
            command += ["--kube-context", self.context]
        process, left = _started(command), threading.Event()
        # A thread's future, because asyncio.run cancels every task when it comes to its end. The thread ends Helm, too:
        # whoever waits here can be cancelled again at each await.
        talk = asyncio.get_running_loop().run_in_executor(None, _talk, process, left)
        try:
            out, err = await asyncio.wait_for(asyncio.shield(talk), CALL_SECONDS)
        except TimeoutError:
            left.set()
            await asyncio.shield(talk)
            raise HelmError(
                f"helm {arguments[0]} did not end within {CALL_SECONDS} s", "see that the Kubernetes API answers: "
                "pdctl doctor; then run the command again: it goes on where this run stopped",
            ) from None  # fmt: skip
        except asyncio.CancelledError:
            left.set()
            if not talk.done():
                print("waiting for helm to end", file=sys.stderr, flush=True)
            await asyncio.shield(talk)
            raise
        finally:
            left.set()
        said = err.decode(errors="replace")
        self.calls.append(f"$ helm {' '.join(arguments)}\n{said}(exit status {process.returncode})")
        if process.returncode:
            raise _failure(arguments, said)
        return out.decode(errors="replace")

    async def render(self, release: Release, *, capabilities: Sequence[str] = (), version: str = "") -> list[Any]:
        """Give a release's objects; hooks are left out.

        Raises:
            HelmError: the values cannot be used; exit code USAGE.
        """
        about = ["--kube-version", version] if version else []
        about += [part for one in capabilities for part in ("--api-versions", one)]
        namespace = [] if self.namespace else ["--namespace", "default"]
        told = await self.call(
            "template", release.name, str(release.chart), "--no-hooks", *namespace, *about, *release.arguments
        )
        return [one for one in yaml.load_all(told, yaml.CSafeLoader) if one]

    async def state(self, name: str) -> State:
        """Tell how a release is."""
        try:
            told = orjson.loads(await self.call("status", name, "--output", "json"))
        except HelmError as error:
            if any("not found" in line for line in [error.cause, *error.evidence]):
                return State()
            raise
        info = told.get("info") or {}
        return State(info.get("status", "unknown"), int(told.get("version", 0)), info.get("description", ""))

    async def values(self, name: str) -> Mapping[str, Any]:
        """Give the values that a release was made with, without the chart's own."""
        return orjson.loads(await self.call("get", "values", name, "--output", "json")) or {}

    async def manifest(self, name: str) -> list[Any]:
        """Give the objects of a release as it was installed."""
        told = await self.call("get", "manifest", name)
        return [one for one in yaml.load_all(told, yaml.CSafeLoader) if one]

    async def install(self, release: Release) -> None:
        """Install or upgrade; does not wait for pods."""
        # What somebody changed by hand (kubectl scale) is ours again: otherwise Helm 4 would stop at the conflict.
        server = ["--server-side=true", "--force-conflicts"] if self.applies_on_server else []
        await self.call(
            "upgrade", release.name, str(release.chart), "--install", "--history-max", HISTORY, *server,
            *release.arguments,
        )  # fmt: skip

    async def finish(self, name: str, state: State) -> None:
        """End what an earlier run left half done: what it was installing is installed whole, and no pod is killed."""
        server = ["--force-conflicts"] if self.applies_on_server else []
        await self.call("rollback", name, str(state.revision), *server)

    async def back(self, name: str, revision: int) -> None:
        """Go back to an earlier revision."""
        server = ["--force-conflicts"] if self.applies_on_server else []
        await self.call("rollback", name, str(revision), *server)

    async def uninstall(self, name: str) -> None:
        """Remove a release and, first, what its objects own; does not wait."""
        await self.call("uninstall", name, "--ignore-not-found", "--cascade", "foreground")


def _started(command: Sequence[str]) -> subprocess.Popen[bytes]:
    """Start a call; not by asyncio, whose subprocesses never end when cancelled while they start (CPython 3.11)."""
    environment = {name: value for name, value in os.environ.items() if name != "HF_TOKEN"}
    return subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        env=environment,
    )  # fmt: skip


def _talk(process: subprocess.Popen[bytes], left: threading.Event) -> tuple[bytes, bytes]:
    """Take what a call says; once it is left, let it end by itself, then ask it to, then make it."""
    numbers, deadline = [signal.SIGINT, signal.SIGKILL], math.inf
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.communicate(timeout=POLL_SECONDS)
        if left.is_set() and deadline == math.inf:
            deadline = time.monotonic() + STOP_SECONDS
        if time.monotonic() > deadline:
            if not numbers:
                return b"", b""  # what holds its output open is no longer of its session
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, numbers.pop(0))  # with it what gives it credentials, which holds its output open
            deadline = time.monotonic() + STOP_SECONDS


def _failure(arguments: Sequence[str], said: str) -> HelmError:
    verb, name = arguments[0], arguments[1] if len(arguments) > 1 else ""
    lines = [line.strip() for line in said.splitlines() if line.strip() and not line.startswith(("level=", "time="))]
    told = next(
        (line for line in reversed(lines) if line.startswith("Error:")), lines[-1] if lines else "no reason given"
    )
    told = told.removeprefix("Error:").strip()
    if "these values cannot be used" in said or "values don't meet the specifications" in said:
        wrong = [re.sub(r"\s+", " ", line) for line in lines if line.startswith("- ") or "additional propert" in line]
        wrong = [line + _meant(line, Path(arguments[2])) for line in wrong]
        return HelmError(
            f"the values of {name} cannot be used", "correct them in --set or in the file given by -f", ExitCode.USAGE,
            wrong or [told],
        )  # fmt: skip
    if verb == "template":
        return HelmError(f"{name} cannot be rendered: {told}", "correct the values", ExitCode.USAGE)
    if "forbidden" in told:
        step = "ask who runs the cluster for the right; pdctl doctor lists what is missing"
    elif "failed calling webhook" in told or "denied the request" in told:
        step = "see that the webhook's service runs, or what it wants; then deploy again"
    else:
        step = "deploy again: it goes on where this run stopped"
    return HelmError(f"helm {verb} {name} failed: {told}", step)


def _meant(line: str, chart: Path) -> str:
    """Name the key of a chart's values that is nearest to one that it does not know; empty when none is near."""
    found = re.search(r"(?:at '([^']*)': )?additional propert\w+ (.*) not allowed", line)
    if found is None or not (chart / "values.yaml").is_file():
        return ""
    known = yaml.load((chart / "values.yaml").read_text(), yaml.CSafeLoader)
    for part in (found[1] or "").strip("/").split("/"):
        known = known.get(part, {}) if part and isinstance(known, dict) else known
    near = [match for name in re.findall(r"'([^']+)'", found[2]) for match in difflib.get_close_matches(name, known, 1)]
    return f" (meant: {', '.join(near)}?)" if near else ""


async def find_helm() -> Helm:
    """Find Helm on PATH.

    Raises:
        PdctlError: there is none, or it is too old.
    """
    program = shutil.which("helm")
    if program is None:
        raise PdctlError(
            "the program helm is not on PATH", "install Helm 3.18 or newer: https://helm.sh/docs/intro/install/",
            ExitCode.PREFLIGHT,
        )  # fmt: skip
    told = await Helm(program, OLDEST).call("version", "--template", "{{.Version}}")
    found = re.search(r"v(\d+)\.(\d+)", told)
    if found is None or (int(found[1]), int(found[2])) < OLDEST:
        raise PdctlError(
            f"{program} is Helm {told.strip() or 'of an unknown version'}", "install Helm 3.18 or newer",
            ExitCode.PREFLIGHT,
        )  # fmt: skip
    return Helm(program, (int(found[1]), int(found[2])))
