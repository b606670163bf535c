"""llm-d's endpoint picker and P/D sidecars before engines of this machine, without Kubernetes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from pdctl.cluster.releases import sources
from pdctl.deployment import Member
from pdctl.errors import ExitCode, PdctlError
from pdctl.ports import HOST, Ports
from pdctl.routers import envoy
from pdctl.routers.programs import Programs, Say
from pdctl.routers.programs import envoy as envoy_program

PRESETS = "charts/llm-d-router/presets"
_DISCOVERY = "engines-of-this-machine"


def picker_config(preset: str, endpoints: Path) -> dict[str, Any]:
    """Give an endpoint picker's configuration: a preset, with the engines from a file in the place of Kubernetes."""
    told: dict[str, Any] = yaml.safe_load((sources() / PRESETS / f"{preset}.yaml").read_text(encoding="utf-8"))
    found = {"name": _DISCOVERY, "type": "file-discovery", "parameters": {"path": str(endpoints), "watchFile": True}}
    told["plugins"].append(found)
    told["dataLayer"] = told.get("dataLayer", {}) | {"discovery": {"pluginRef": _DISCOVERY}}
    return told


def endpoints(prefill: Sequence[Member], sidecars: Sequence[Member]) -> dict[str, Any]:
    """Give the file of engines: prefill engines themselves, the sidecars in the place of decode engines."""
    told = []
    for role, members in (("prefill", prefill), ("decode", sidecars)):
        for number, member in enumerate(members):
            host, _, port = member.url.removeprefix("http://").rpartition(":")
            name = f"{role}-{number}"
            told.append({"name": name, "address": host, "port": port, "labels": {"llm-d.ai/role": role}})
    return {"endpoints": told}


def _localhost_port(engine: Member) -> str:
    """Give the port by which an engine is found on localhost, the only host that a sidecar knows."""
    if "--localhost-port" not in engine.command:
        raise PdctlError(
            f"{engine.name} does not answer on localhost, where llm-d's sidecar looks for it",
            "the deployment was made by an older pdctl: run pdctl cleanup, then deploy again",
            ExitCode.PREFLIGHT,
        )
    return engine.command[engine.command.index("--localhost-port") + 1]


def stages(
    preset: str, engines: Sequence[Member], clients: Sequence[int], metrics: int, folder: Path, ports: Ports,
    programs: Programs, say: Say,
) -> tuple[list[list[Member]], str]:  # fmt: skip
    """Work out the processes: a sidecar a decode engine, the endpoint picker, Envoy.

    The endpoint picker and the sidecars listen on all addresses of the machine; they have no flag for that.

    Args:
        preset: which configuration the endpoint picker has.
        engines: those that are chosen from.
        clients: the ports at which Envoy takes requests.
        metrics: the endpoint picker's metrics port.
        folder: where their files go.
        ports: gives out more ports.
        programs: where the programs are.
        say: told what takes a while.

    Returns:
        The processes, Envoy in a stage of its own, and the address of its administration.

    Raises:
        PdctlError: a program is missing, or an engine cannot be reached by a sidecar.
    """
    picker, sidecar = programs.found()
    made = []
    for engine in (one for one in engines if one.role == "decode"):
        port = ports.inner()
        command = [sidecar, "--port", str(port), "--model-server-port", _localhost_port(engine)]
        command += ["--kv-connector", "nixlv2", "--secure-proxy=false"]
        url = f"http://{HOST}:{port}"
        made.append(Member(f"sidecar-{engine.name.rpartition('-')[2]}", "router", url, command, ready=f"{url}/health"))
    folder.mkdir(parents=True, exist_ok=True)
    listed, config = folder / "endpoints.yaml", folder / "picker.yaml"
    listed.write_text(yaml.safe_dump(endpoints([one for one in engines if one.role == "prefill"], made)))
    config.write_text(yaml.safe_dump(picker_config(preset, listed), sort_keys=False))
    grpc, health, admin = (ports.inner() for _ in range(3))
    command = [picker, "--config-file", str(config), "--pool-name", "pdctl", "--pool-namespace", "default"]
    command += ["--grpc-port", str(grpc), "--grpc-health-port", str(health), "--metrics-port", str(metrics)]
    command += ["--secure-serving=false", "--metrics-endpoint-auth=false", "--tracing=false"]
    page = f"http://{HOST}:{metrics}/metrics"
    made.append(Member("picker", "router", f"http://{HOST}:{grpc}", command, ready=page))
    written = envoy.write(envoy.gateway(clients, admin, grpc), folder / "envoy.json")
    front = f"http://{HOST}:{clients[0]}"
    admin_url = f"http://{HOST}:{admin}"
    command = envoy.command(envoy_program(say), written)
    return [made, [Member("envoy", "router", front, command, ready=f"{admin_url}/ready")]], admin_url
