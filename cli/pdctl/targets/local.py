"""A deployment as processes on this machine: simulated engines and the router under a supervisor."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import httpx
import psutil
from rich.text import Text

from pdctl import deployment
from pdctl.check import Check, Mark
from pdctl.deployment import Deployment, Member
from pdctl.environments import beside
from pdctl.errors import ExitCode, PdctlError
from pdctl.ports import HOST, Ports
from pdctl.routers.choice import Choice
from pdctl.routers.parts import own_command
from pdctl.routers.programs import Programs
from pdctl.routers.switching import switch
from pdctl.targets.pages import read_pairs
from pdctl.targets.target import Health, LogQuery, Routing
from pdsim.referee.places import free

PREFILL_PORT, DECODE_PORT, SIDE_PORT, ROUTER_PORT, METRICS_PORT = 8000, 8200, 5600, 10001, 29000
LEASE_SECONDS = 30
MOST_OF_A_ROLE = 100
STOP_SECONDS = 12.0
LOG_LINES = 12


@dataclass(frozen=True, slots=True)
class Wish:
    """What `deploy --local` was asked for."""

    name: str
    prefill: int
    decode: int
    model: str
    speed: float
    seed: int | None
    policy: str
    port: int | None


def _subnet() -> int:
    """Give the first x of 127.1.x.y that nobody uses."""
    used = set()
    for name in deployment.names():
        with contextlib.suppress(PdctlError):
            known = deployment.load(name)
            if known.supervised or known.running:
                used.add(known.subnet)
    for subnet in range(1, 255):
        if subnet not in used and free(f"127.1.{subnet}.1", PREFILL_PORT):
            return subnet
    raise PdctlError(
        "no loopback network 127.1.x is free", "run pdctl cleanup on an old deployment", ExitCode.PREFLIGHT
    )


def _check_free(name: str) -> None:
    folder = deployment.folder_of(name)
    with deployment.locked(name) as mine:
        taken = not mine
    if taken:
        raise PdctlError(
            f"a deployment named {name!r} already runs",
            f"look at it with pdctl status --name {name}, end it with pdctl cleanup --name {name}, "
            "or choose another --name",
            ExitCode.PREFLIGHT,
        )
    left = [member.name for member in deployment.load(name).running] if (folder / "deployment.json").exists() else []
    if left:
        raise PdctlError(
            f"processes of an earlier {name!r} are left whose supervisor died: {', '.join(left)}",
            f"run pdctl cleanup --name {name}",
            ExitCode.PREFLIGHT,
        )


def plan(wish: Wish) -> Deployment:
    """Work out the processes and addresses of a deployment; nothing is started.

    Raises:
        PdctlError: a port or name is taken, or a program missing.
    """
    _check_free(wish.name)
    engine = beside("pd-engine-sim")
    if wish.port is not None and not free(HOST, wish.port):
        raise PdctlError(f"port {wish.port} is taken by another program", "choose another --port", ExitCode.PREFLIGHT)
    ports = Ports()
    port, metrics = ports.take(wish.port or ROUTER_PORT), ports.take(METRICS_PORT)
    own_addresses = free("127.1.1.1", 0)
    made = Deployment(
        wish.name, _subnet() if own_addresses else 0, wish.model, wish.speed, wish.policy,
        f"http://{HOST}:{port}", f"http://{HOST}:{metrics}/metrics",
    )  # fmt: skip
    for role, count, first, engine_port in (
        ("prefill", wish.prefill, 1, PREFILL_PORT),
        ("decode", wish.decode, 1 + MOST_OF_A_ROLE, DECODE_PORT),
    ):
        for number in range(count):
            if own_addresses:
                host, http, side = f"127.1.{made.subnet}.{first + number}", engine_port, SIDE_PORT
            else:  # systems that have only 127.0.0.1, such as macOS
                host, http, side = HOST, ports.take(engine_port), ports.take(SIDE_PORT)
            command = [engine, "--role", role, "--host", host, "--port", str(http), "--side-channel-port", str(side)]
            command += ["--model", wish.model, "--speed", f"{wish.speed:g}"]
            # An engine's clock runs faster by its speed, a router's does not: leases last as long as the router thinks.
            command += ["--kv-lease-duration", f"{LEASE_SECONDS * wish.speed:g}"]
            if role == "decode":
                command += ["--localhost-port", str(ports.inner())]
            if wish.seed is not None:
                command += ["--seed", str(wish.seed + len(made.members))]
            made.members.append(Member(f"{role}-{number}", role, f"http://{host}:{http}", command))
    command = own_command(wish.policy, made.engines, port, metrics)
    made.members.append(Member("router", "router", made.router_url, command))
    return made


class LocalTarget:
    """A local deployment."""

    simulated = True

    def __init__(self, known: Deployment) -> None:
        self._deployment = known
        self.name = known.name
        self.flags = "" if known.name == "local" else f" --name {known.name}"
        self.router_url = known.router_url
        self.model = known.model

    @property
    def settings(self) -> dict[str, Any]:
        """How it was set up."""
        known = self._deployment
        return {
            "where": "local",
            "prefill": len(known.of_role("prefill")),
            "decode": len(known.of_role("decode")),
            "router": self.router.package,
            "policy": self.router.rule,
            "speed": known.speed,
        }

    @classmethod
    def find(cls, name: str) -> "LocalTarget":
        """Find a deployment.

        Raises:
            PdctlError: there is none of that name.
        """
        return cls(deployment.load(name))

    @property
    def router(self) -> Choice:
        """Which router stands before the engines."""
        return Choice(self._deployment.router, self._deployment.policy)

    def switch(self, router: Choice, programs: Programs, timeout: float, tell: Callable[[str], None]) -> None:
        """Let another router stand before the same engines, at the same address.

        Both have the port for a while (SO_REUSEPORT); the old one is told to end once the new one has answered.

        Raises:
            PdctlError: it cannot be, or does not serve in time; then the old one stays.
        """
        switch(self.name, router, programs, timeout, tell)
        self._deployment = deployment.load(self.name)

    def start(self, timeout: float, on_ready: Callable[[Member, float], None], bound: bool = False) -> None:
        """Start a planned deployment and wait until every part answers; one that is bound ends with this process.

        Raises:
            PdctlError: a part ended or did not answer in time, and everything has been stopped again; or the name has
                been taken since it was planned, and nothing was touched.
        """
        with deployment.locked(self.name, "deploy.lock") as mine:
            if not mine:
                raise PdctlError(
                    f"another pdctl is deploying {self.name!r}", "wait until it is done, or choose another --name",
                    ExitCode.PREFLIGHT,
                )  # fmt: skip
            _check_free(self.name)  # the plan may have stood at a question for long
            self._start(timeout, on_ready, bound)

    def _start(self, timeout: float, on_ready: Callable[[Member, float], None], bound: bool) -> None:
        known = self._deployment
        shutil.rmtree(known.folder / "logs", ignore_errors=True)
        known.wanted.unlink(missing_ok=True)
        (known.folder / "logs").mkdir(parents=True, exist_ok=True)
        known.save()
        with known.log("supervisor").open("ab") as log:
            supervisor = subprocess.Popen(
                [sys.executable, "-m", "pdctl.supervisor", known.name, *([str(os.getpid())] if bound else [])],
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        try:
            self._wait(supervisor, timeout, on_ready)
        except BaseException:
            if supervisor.poll() is None:
                supervisor.terminate()
                supervisor.wait()
            raise

    def _wait(
        self, supervisor: subprocess.Popen[bytes], timeout: float, on_ready: Callable[[Member, float], None]
    ) -> None:
        begin = time.monotonic()
        waiting = {member.name: member for member in self._deployment.members}
        with httpx.Client(timeout=2.0) as client:
            while waiting:
                if supervisor.poll() is not None:
                    raise self._failure("supervisor", f"the supervisor ended with status {supervisor.returncode}")
                self._deployment = deployment.load(self.name)
                for member in self._deployment.members:
                    if member.exit is not None:
                        raise self._failure(member.name, f"{member.name} ended while starting ({member.ended})")
                for member in list(waiting.values()):
                    with contextlib.suppress(httpx.HTTPError):
                        if client.get(member.ready_url).status_code == 200:
                            del waiting[member.name]
                            on_ready(member, time.monotonic() - begin)
                if waiting and time.monotonic() - begin > timeout:
                    name = next(iter(waiting))
                    raise self._failure(
                        name,
                        f"not ready within {timeout:g} s: {', '.join(waiting)}",
                        ExitCode.TIMEOUT,
                    )
                if waiting:
                    time.sleep(0.1)

    def _failure(self, member: str, cause: str, code: ExitCode = ExitCode.FAILURE) -> PdctlError:
        log = self._deployment.log(member)
        lines = log.read_text(errors="replace").splitlines()[-LOG_LINES:] if log.exists() else []
        return PdctlError(
            f"{cause}; everything has been stopped again",
            f"see the whole log: {log}",
            code,
            lines or [f"(nothing in {member}'s log)"],
        )

    def health(self) -> list[Health]:
        """Tell how each part is."""
        with httpx.Client(timeout=2.0) as client, ThreadPoolExecutor(16) as pool:
            return list(pool.map(lambda member: self._health(client, member), self._deployment.members))

    def _health(self, client: httpx.Client, member: Member) -> Health:
        uptime = None if member.created is None else time.time() - member.created
        if not member.alive:
            return Health(member.name, member.role, member.url, member.pid, member.ended, None)
        details: dict[str, Any] = {}
        try:
            answer = client.get(member.ready_url if member.role == "router" else member.url + "/sim/state")
            state = "finishing" if member.leaving else "ready" if answer.status_code == 200 else "not ready"
            if member.role != "router" or not member.ready:  # engines and pd-router tell about themselves
                details = answer.json()
        except (httpx.HTTPError, ValueError):
            state = "finishing" if member.leaving else "not answering"
        return Health(member.name, member.role, member.url, member.pid, state, uptime, details)

    def troubles(self) -> list[Text]:
        """A process's state says it all."""
        return []

    def routing(self) -> Routing:
        """Tell who served whom."""
        by_url = {member.url: member.name for member in self._deployment.members}
        try:
            page = httpx.get(self._deployment.metrics_url, timeout=5).text
        except httpx.HTTPError as error:
            raise PdctlError(
                f"the router's metrics at {self._deployment.metrics_url} cannot be read: {error}",
                f"look at pdctl status --name {self.name}",
            ) from error
        pairs, edges = read_pairs([page], by_url)
        # tickets name the side channel, which is on the engine's own address
        by_host = {
            (member.url.split("//")[1].split(":")[0], _side_port(member)): member.name
            for member in self._deployment.engines
        }
        transfers: dict[tuple[str, str], tuple[int, int]] = {}
        violations: list[dict[str, Any]] = []
        silent = []
        with httpx.Client(timeout=5.0) as client:
            for member in self._deployment.engines:
                try:
                    state = client.get(member.url + "/sim/state").json()
                    seen = client.get(member.url + "/sim/violations").json()
                except (httpx.HTTPError, ValueError):
                    silent.append(member.name)
                    continue
                violations += [{"engine": member.name} | entry for entry in seen]
                for edge in state["transfers"]:
                    remote = by_host.get((edge["host"], edge["port"]), f"{edge['host']}:{edge['port']}")
                    count, moved = transfers.get((remote, member.name), (0, 0))
                    transfers[remote, member.name] = (count + edge["transfers"], moved + edge["bytes"])
        return Routing(pairs, transfers, edges, violations, silent)

    @contextlib.contextmanager
    def reached(self, port: int = 0) -> Iterator[str]:
        """Give the router's own URL, which is on this machine already: nothing that is measured passes a door."""
        yield self._deployment.own_url or self.router_url

    def pages(self, path: str, member: str | None) -> list[tuple[str, str, str | None]]:
        """Give (member, role, answer) for a path of each engine, or of one role or member; None: no answer."""
        with httpx.Client(timeout=5.0) as client, ThreadPoolExecutor(16) as pool:

            def ask(one: Member) -> str | None:
                url = self._deployment.metrics_url if one.role == "router" else one.url + path
                try:
                    answer = client.get(url)
                except httpx.HTTPError:
                    return None
                return answer.text if answer.status_code == 200 else None

            asked = self._chosen(member)
            routers = [one for one in asked if one.role == "router" and path == "/metrics"]
            chosen = [one for one in asked if one.role != "router"] + routers[:1]  # one page for all its processes
            return [(one.name, one.role, told) for one, told in zip(chosen, pool.map(ask, chosen), strict=True)]

    def post(self, path: str) -> dict[str, int | None]:
        """Send each engine an empty POST; give the statuses of their answers by member, None where there is none."""
        with httpx.Client(timeout=30.0) as client, ThreadPoolExecutor(16) as pool:

            def ask(one: Member) -> int | None:
                try:
                    return client.post(one.url + path).status_code
                except httpx.HTTPError:
                    return None

            engines = self._deployment.engines
            return {one.name: told for one, told in zip(engines, pool.map(ask, engines), strict=True)}

    def urls(self) -> dict[str, str]:
        """Give the URL by which the router knows each engine, by member."""
        return {one.name: one.url for one in self._deployment.engines}

    def admin(self, path: str) -> list[Any]:
        """The local router has no admin port."""
        return []

    def checks(self) -> list[Check]:
        """Whether the supervisor runs, without which nobody notes how processes end."""
        if self._deployment.supervised:
            return [Check("supervisor", Mark.OK, f"runs, process {self._deployment.supervisor_pid}")]
        step = f"run pdctl cleanup{self.flags}, then deploy again"
        return [Check("supervisor", Mark.FAIL, "does not run", step)]

    rdma = None

    def close(self) -> None:
        """Nothing is held."""

    def _chosen(self, member: str | None) -> list[Member]:
        chosen = [one for one in self._deployment.members if member in (None, one.role, one.name)]
        if not chosen:
            names = ", ".join(one.name for one in self._deployment.members)
            raise PdctlError(f"{self.name} has no {member}", f"name a role, or one of {names}", ExitCode.USAGE)
        return chosen

    def logs(self, query: LogQuery) -> Iterator[tuple[str, str]]:
        """Give (member, line) pairs of the logs; with `follow` without end.

        Raises:
            PdctlError: processes here have no previous container, nor times of lines.
        """
        if query.previous or query.since is not None:
            raise PdctlError(
                "a process on this machine has one log, and its lines have no common time",
                "leave --previous and --since out; --tail and --grep work", ExitCode.USAGE,
            )  # fmt: skip
        files = {}
        for member in self._chosen(query.member):
            path = self._deployment.log(member.name)
            if not path.exists():
                continue
            file = files[member.name] = path.open(errors="replace")
            for line in file.readlines()[-query.tail :] if query.tail else file.readlines()[:0]:
                yield member.name, line.rstrip("\n")
        try:
            while query.follow:
                quiet = True
                for name, file in files.items():
                    for line in file.readlines():
                        quiet = False
                        yield name, line.rstrip("\n")
                if quiet:
                    time.sleep(0.2)
        finally:
            for file in files.values():
                file.close()

    def stop(self) -> list[str]:
        """Stop everything, also what a dead supervisor left; give the names of what could not be stopped."""
        known = self._deployment
        if known.supervised and known.supervisor_pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(known.supervisor_pid, signal.SIGTERM)
            deadline = time.monotonic() + STOP_SECONDS
            while known.supervised and time.monotonic() < deadline:
                time.sleep(0.05)
        for member in known.running:
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                psutil.Process(member.pid).kill()
        deadline = time.monotonic() + 5
        while known.running and time.monotonic() < deadline:
            time.sleep(0.05)
        left = [member.name for member in known.running]
        if known.supervised:
            left.append("supervisor")
        return left


def _side_port(member: Member) -> int:
    return int(member.command[member.command.index("--side-channel-port") + 1])
