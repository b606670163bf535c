"""`pdctl doctor`: is everything as it should be, and if not, what to do."""

import re
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import typer
from rich.text import Text

from pdctl.check import Mark
from pdctl.cluster.screen import checks_table
from pdctl.commands.options import Context, Format, Name, Namespace, Output
from pdctl.console import err, out, print_data
from pdctl.errors import ExitCode, PdctlError
from pdctl.examination import Facts, examine
from pdctl.targets import LogQuery, Routing, Target, find
from pdctl.targets.pages import Page

LOG_LINES = 300
_VERSION = re.compile(r'"version"\s*:\s*"([^"]+)"')


def doctor(
    name: Name = None, namespace: Namespace = None, context: Context = None, output: Output = Format.TABLE
) -> None:
    """Check everything that can keep KV from moving or requests from being served; each with evidence and fix.

    Exit status 1 when a check fails.
    """
    target = find(name, namespace, context)
    try:
        checks, simulated = list(examine(_gather(target))), target.simulated
    finally:
        target.close()
    if output is Format.TABLE:
        out.print(Text.assemble((target.name, "bold"), ("  (simulated)" if simulated else "", "yellow")))
        out.print(checks_table(checks))
    else:
        told = [asdict(check) for check in checks]
        print_data({"name": target.name, "simulated": simulated, "checks": told}, output.value)
    failed = [check for check in checks if check.mark is Mark.FAIL]
    if failed:
        err.print(f"{len(failed)} of {len(checks)} checks failed")
        raise typer.Exit(ExitCode.FAILURE)


def _gather(target: Target) -> Facts:
    health = target.health()
    workers, edges = target.admin("/list_workers"), target.admin("/debug/edges")
    names = {part.url: part.name for part in health}
    try:
        routing: Routing | None = target.routing()
    except PdctlError:
        routing = None
    versions = {}
    for member, _, told in target.pages("/version", None):
        if told is not None and (found := _VERSION.search(told)):
            versions[member] = found[1]
    pages = {member: Page(told) for member, role, told in target.pages("/metrics", None) if told and role != "router"}
    lines: dict[str, list[str]] = {}
    for member, line in target.logs(LogQuery(tail=LOG_LINES)):
        if not member.startswith("router"):
            lines.setdefault(member, []).append(line)
    return Facts(
        target.flags, health, routing, versions, pages,
        [{one["url"]: one for one in told["workers"]} for told in workers],
        ways(edges, names, routing),
        lines, target.rdma, target.checks(),
    )  # fmt: skip


def ways(told: list[Any], names: dict[str, str], routing: Routing | None) -> list[dict[str, Any]]:
    """Give what is known of each way: from the routers' admin ports, else from their metrics, which tell no errors."""
    if told:
        merged = _merged(edge for router in told for edge in router["edges"])
        return [way | {end: names.get(way[end], way[end]) for end in ("prefill", "decode")} for way in merged]
    known = {} if routing is None else routing.edges
    return [
        {"prefill": prefill, "decode": decode, "failures": 0, **asdict(edge)}
        for (prefill, decode), edge in known.items()
    ]


def _merged(edges: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Put together what several routers know of a way; it counts as its worst."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for edge in edges:
        way = found.setdefault((edge["prefill"], edge["decode"]), edge)
        if way is edge:
            continue
        if edge["closed"] and not way["closed"]:
            way["last_error"] = edge["last_error"]  # of who has closed it
        way["handoffs"] += edge["handoffs"]
        way["closed"] |= edge["closed"]
        way["failures"] = max(way["failures"], edge["failures"])
        way["seconds"] = max(way["seconds"], edge["seconds"])
        way["last_error"] = way["last_error"] or edge["last_error"]
    return list(found.values())
