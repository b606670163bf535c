"""The processes that make up a router before engines of this machine."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pdctl.deployment import Member
from pdctl.ports import HOST, Ports
from pdctl.routers import envoy, llmd
from pdctl.routers.choice import Choice
from pdctl.routers.programs import Programs, Say, own, vllm_router
from pdctl.routers.programs import envoy as envoy_program

DRAIN_SECONDS = 600  # more than any answer takes


@dataclass(frozen=True, slots=True)
class Parts:
    """A router as processes that are not started yet.

    Args:
        stages: the processes; each stage is started when the one before it serves, so that whoever takes clients'
            connections has somebody to pass them to.
        url: where the router answers by itself.
        metrics_url: its metrics.
        envoy_url: administration of the Envoy that takes its clients' connections; empty where there is none.
    """

    stages: list[list[Member]]
    url: str
    metrics_url: str
    envoy_url: str = ""

    @property
    def members(self) -> list[Member]:
        """All processes."""
        return [member for stage in self.stages for member in stage]


def parts(
    choice: Choice, engines: Sequence[Member], folder: Path, programs: Programs, say: Say, public: int | None = None
) -> Parts:
    """Work out a router's processes.

    Args:
        choice: which router.
        engines: what it chooses from.
        folder: where files for its programs go.
        programs: where llm-d's are.
        say: told what takes a while.
        public: a port that another router may still have, which this one takes too; without one it has a port of its
            own only.

    Raises:
        PdctlError: a program is missing.
    """
    ports = Ports()
    metrics = ports.inner()
    page = f"http://{HOST}:{metrics}/metrics"
    port = public if public is not None and choice.router == "ours" else ports.inner()
    url = f"http://{HOST}:{port}"
    if choice.router == "ours":
        command = own_command(choice.policy, engines, port, metrics)
        return Parts([[Member("router", "router", url, command)]], url, page)
    if choice.router == "llm-d":
        clients = [port] if public is None else [port, public]
        stages, admin = llmd.stages(choice.policy, engines, clients, metrics, folder, ports, programs, say)
        return Parts(stages, url, page, admin)
    made = [Member("vllm-router", "router", url, _vllm_router(choice.policy, engines, port, metrics, say),
                   ready=f"{url}/health")]  # fmt: skip
    if public is None:
        return Parts([made], url, page)
    admin_port = ports.inner()
    admin = f"http://{HOST}:{admin_port}"
    folder.mkdir(parents=True, exist_ok=True)
    config = envoy.write(envoy.door(public, admin_port, port), folder / "door.json")
    command = envoy.command(envoy_program(say), config)
    door = Member("door", "router", f"http://{HOST}:{public}", command, ready=f"{admin}/ready")
    return Parts([made, [door]], url, page, admin)


def _common(binary: str, policy: str, engines: Sequence[Member], port: int, metrics: int) -> list[str]:
    made = [binary, "--vllm-pd-disaggregation", "--host", HOST, "--port", str(port), "--policy", policy]
    made += ["--prometheus-host", HOST, "--prometheus-port", str(metrics)]
    return made + [part for member in engines for part in (f"--{member.role}", member.url)]


def own_command(policy: str, engines: Sequence[Member], port: int, metrics: int) -> list[str]:
    """Give the command line of pd-router; another router may have its ports too, and it ends when all is answered."""
    drained = ["--share-ports", "--drain-timeout-secs", str(DRAIN_SECONDS)]
    return _common(own(), policy, engines, port, metrics) + drained


def _vllm_router(policy: str, engines: Sequence[Member], port: int, metrics: int, say: Say) -> list[str]:
    # one rank an engine, and no line a request, as its own benchmarks run it
    alone = ["--intra-node-data-parallel-size", "1", "--log-level", "error"]
    return _common(vllm_router(say), policy, engines, port, metrics) + alone
