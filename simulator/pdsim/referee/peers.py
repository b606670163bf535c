"""Routers that can be judged: how each is started, and which version it is."""

import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pdsim.referee.engines import RefereeError

PLACEHOLDERS = (
    "prefill_flags", "decode_flags", "prefill_urls", "decode_urls", "host", "port", "metrics_port", "lease_seconds",
    "stall_seconds", "program", "python", "manifest",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Peer:
    """A router and how to start it.

    Args:
        name: what the scorecard calls it.
        template: its command line with placeholders.
        program: what `{program}` stands for.
        package: the distribution whose version is its version.
        keyed: it chooses engines by a key of the request, as it is started here.
    """

    name: str
    template: str
    program: str = ""
    package: str = ""
    keyed: bool = True


PEERS = {
    peer.name: peer
    for peer in (
        Peer(
            "ours",
            "{program} --vllm-pd-disaggregation {prefill_flags} {decode_flags} --host {host} --port {port} "
            "--prometheus-host {host} --prometheus-port {metrics_port} --kv-lease-seconds {lease_seconds} "
            "--stall-timeout-secs {stall_seconds}",
            "pd-router",
            "pd-router",
        ),
        Peer(
            "vllm-router",
            "{program} --vllm-pd-disaggregation {prefill_flags} {decode_flags} --policy consistent_hash "
            "--intra-node-data-parallel-size 1 --host {host} --port {port} --prometheus-host {host} "
            "--prometheus-port {metrics_port} --log-level error",
            "vllm-router",
            "vllm-router",
        ),
        Peer(
            "smg",
            "{program} launch --pd-disaggregation --discovery-provider file --discovery-file {manifest} "
            "--policy consistent_hashing --host {host} --port {port} --prometheus-host {host} "
            "--prometheus-port {metrics_port} --log-level error",
            "smg",
            "smg",
            keyed=False,  # its key is a header of its own; without it consistent_hashing draws at random
        ),
        Peer(
            "toy",
            "{python} -m pdsim.referee.toy {prefill_flags} {decode_flags} --host {host} --port {port}",
            package="pd-simulator",
            keyed=False,
        ),
    )
}


def check(template: str) -> None:
    """Check that a template has what a router cannot do without.

    Raises:
        RefereeError: an unknown placeholder, or one that is needed is missing.
    """
    try:
        template.format_map(dict.fromkeys(PLACEHOLDERS, ""))
    except (KeyError, ValueError, IndexError) as error:
        raise RefereeError(
            f"the command has a placeholder that is not known: {error}; known are "
            + " ".join(f"{{{name}}}" for name in PLACEHOLDERS)
        ) from None
    needed: list[tuple[str, ...]] = [("{port}",)]
    if "{manifest}" not in template:
        needed += [("{prefill_flags}", "{prefill_urls}"), ("{decode_flags}", "{decode_urls}")]
    for names in needed:
        if not any(name in template for name in names):
            raise RefereeError(f"the command needs {' or '.join(names)}")


def found(program: str) -> str:
    """Find a program beside this Python or on PATH.

    Raises:
        RefereeError: it is not there.
    """
    beside = Path(sys.executable).parent / program
    path = str(beside) if beside.exists() else shutil.which(program)
    if path is None:
        raise RefereeError(f"the program {program} is not installed; install it or name it by --program PATH")
    return path


def version_of(peer: Peer, program: str) -> str:
    """Give a peer's version: its distribution's in this environment, or in the one that its program belongs to."""
    if not peer.package:
        return "unknown"
    python = Path(program).resolve().parent / "python" if program else Path()
    beside = Path(program).parent / "python" if program else Path()
    for interpreter in (beside, python):
        if program and interpreter.exists() and interpreter != Path(sys.executable):
            code = f"import importlib.metadata as m; print(m.version({peer.package!r}))"
            told = subprocess.run([str(interpreter), "-c", code], capture_output=True, text=True, check=False)
            if told.returncode == 0:
                return told.stdout.strip()
    try:
        return version(peer.package)
    except PackageNotFoundError:
        return "unknown"


def manifest(prefills: Sequence[str], decodes: Sequence[str]) -> dict[str, Any]:
    """Give the engines as smg's file discovery reads them; only so can it be told their KV connector."""
    workers = [
        {"id": url, "url": url, "worker_type": role, "kv_connector": "NixlConnector"}
        for role, urls in (("prefill", prefills), ("decode", decodes))
        for url in urls
    ]
    return {"version": 1, "workers": workers}


def command(template: str, values: Mapping[str, str]) -> list[str]:
    """Give a command line from its template."""
    return shlex.split(template.format_map(values))
