"""Routers that take turns before the same engines: how each is started, and what it costs."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import httpx
import psutil

from pdctl.deployment import Deployment
from pdctl.environments import Environment
from pdctl.errors import ExitCode, PdctlError
from pdctl.supervisor import die_with_parent
from pdctl.targets.local import free, program
from pdrouter.policies import POLICIES

VLLM_ROUTER = "0.1.17"
VLLM_ROUTER_POLICIES = ("random", "round_robin", "cache_aware", "power_of_two", "consistent_hash")
Say = Callable[[str], None]  # told what takes a while
OWN_PROGRAM = "PDCTL_ROUTER"
START_SECONDS = 60.0
PORT, METRICS_PORT = 11001, 29100
_ALIASES = {"ours": "ours:consistent_hash", "vllm-router": "vllm-router:consistent_hash",
            "llm-d-policies": "ours:llmd_pd_guide"}  # fmt: skip
_PROBE = {"prompt": "Is anybody there?", "max_tokens": 2, "temperature": 0}


@dataclass(frozen=True, slots=True)
class Contender:
    """A router with a policy.

    Args:
        router: ours, or vllm-router as the package index has it.
        policy: how it chooses engines.
    """

    router: Literal["ours", "vllm-router"]
    policy: str

    @property
    def name(self) -> str:
        """Its point's name."""
        return f"{self.router}-{self.policy}"

    @property
    def package(self) -> str:
        """Its distribution."""
        return "pd-router" if self.router == "ours" else self.router

    @property
    def title(self) -> str:
        """What reports call it."""
        return f"{self.package}, {self.policy}"

    def command(self, engines: Deployment, host: str, port: int, metrics_port: int, binary: str) -> list[str]:
        """Give its command line before a deployment's engines."""
        made = [binary, "--vllm-pd-disaggregation", "--host", host, "--port", str(port), "--policy", self.policy]
        made += ["--prometheus-host", host, "--prometheus-port", str(metrics_port)]
        made += [part for member in engines.engines for part in (f"--{member.role}", member.url)]
        if self.router == "vllm-router":  # one rank an engine, and no line a request, as its own benchmarks run it
            made += ["--intra-node-data-parallel-size", "1", "--log-level", "error"]
        return made

    def binary(self, say: Say) -> str:
        """Find its program; vllm-router is installed when it is not there."""
        if self.router == "ours":
            return os.environ.get(OWN_PROGRAM) or program("pd-router")
        environment = Environment(f"vllm-router-{VLLM_ROUTER}", (f"vllm-router=={VLLM_ROUTER}",))
        return environment.program("vllm-router", say)


def contenders(text: str) -> list[Contender]:
    """Read `ours,vllm-router:cache_aware`.

    Raises:
        PdctlError: a name or policy is not known.
    """
    found = []
    for part in text.split(","):
        router, _, policy = _ALIASES.get(part.strip(), part.strip()).partition(":")
        known = {"ours": tuple(POLICIES), "vllm-router": VLLM_ROUTER_POLICIES}.get(router)
        if known is None:
            raise PdctlError(
                f"there is no router {part!r}",
                "name ours, vllm-router or llm-d-policies, each perhaps with :POLICY",
                ExitCode.USAGE,
            )
        if policy not in known:
            raise PdctlError(
                f"{router} has no policy {policy!r}", f"its policies are {', '.join(known)}", ExitCode.USAGE
            )
        found.append(Contender("ours" if router == "ours" else "vllm-router", policy))
    if len(set(found)) < 2:
        raise PdctlError(
            "a comparison needs two routers that differ", "as in --routers ours,vllm-router", ExitCode.USAGE
        )
    return list(dict.fromkeys(found))


@dataclass(slots=True)
class Standing:
    """A contender that serves."""

    url: str
    process: psutil.Process
    version: str

    def cpu_seconds(self) -> float:
        """Give the processor time of it and its children so far."""
        total = 0.0
        for one in [self.process, *self.process.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                times = one.cpu_times()
                total += times.user + times.system
        return total

    def resident_mb(self) -> float:
        """Give the resident memory of it and its children."""
        family = [self.process, *self.process.children(recursive=True)]
        return sum(one.memory_info().rss for one in family) / 1e6


@contextmanager
def standing(contender: Contender, engines: Deployment, log: Path, say: Say) -> Iterator[Standing]:
    """Start a contender, wait until it serves through both roles, end it afterwards.

    Raises:
        PdctlError: it does not start or serve.
    """
    host = "127.0.0.1"
    port = next(port for port in range(PORT, PORT + 1000) if free(host, port))
    metrics_port = next(port for port in range(METRICS_PORT, METRICS_PORT + 1000) if free(host, port))
    binary = contender.binary(say)
    command = contender.command(engines, host, port, metrics_port, binary)
    with log.open("ab") as file:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
            preexec_fn=die_with_parent,  # noqa: PLW1509 no thread of ours holds a lock here
        )  # fmt: skip
    url = f"http://{host}:{port}"
    try:
        _wait(contender, process, url, engines.model, log)
        yield Standing(url, psutil.Process(process.pid), version_of(contender, binary))
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _wait(contender: Contender, process: subprocess.Popen[bytes], url: str, model: str, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    with httpx.Client(timeout=10) as client:
        while time.monotonic() < deadline and process.poll() is None:
            with contextlib.suppress(httpx.HTTPError):
                if client.post(url + "/v1/completions", json={"model": model} | _PROBE).status_code == 200:
                    return
            time.sleep(0.2)
    lines = log.read_text(errors="replace").splitlines()[-8:]
    raise PdctlError(
        f"{contender.title} does not serve within {START_SECONDS:g} s", f"see the whole log: {log}", evidence=lines
    )


def version_of(contender: Contender, binary: str) -> str:
    """Give the version of a contender's program, and whether ours is compiled."""
    package, module = contender.package, "pdrouter" if contender.router == "ours" else "vllm_router"
    code = (
        "import importlib.metadata as m, importlib.util as u, pathlib as p; "
        f"compiled = any(p.Path(u.find_spec({module!r}).origin).parent.rglob('*.so')); "
        f"print(m.version({package!r}), compiled)"
    )
    python = Path(binary).parent / "python"
    answer = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=False)
    version, _, compiled = answer.stdout.strip().partition(" ")
    if contender.router == "ours":
        return f"{version or 'unknown'} ({'compiled' if compiled == 'True' else 'not compiled'})"
    return version or "unknown"
