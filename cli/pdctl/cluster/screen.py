"""What a person sees of pods: the table, the findings, lines where there is no terminal."""

import time
from collections.abc import Mapping

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from pdctl.check import Check, Mark
from pdctl.console import span
from pdctl.podstate import Finding, Phase, Pod, Snapshot

COLOURS = {
    Phase.READY: "green", Phase.DONE: "green", Phase.CRASHING: "red", Phase.FAILED: "red", Phase.STOPPING: "dim",
}  # fmt: skip
MARKS = {Mark.OK: "green", Mark.WARN: "yellow", Mark.FAIL: "bold red", Mark.UNKNOWN: "dim"}
SHOWN_PODS = 3
LAST_LINE = 60


def short(pod: Pod) -> str:
    """Give a pod's name without what all pods of its Deployment share: `decode-x7k2p`."""
    parts = pod.name.split("-")
    return f"{pod.role}-{parts[-1]}" if pod.role else pod.name


def pods_table(snapshot: Snapshot, last_lines: Mapping[str, str], *, now: float | None = None) -> Table:
    """Draw a row for each pod."""
    now = time.time() if now is None else now
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0), expand=False)
    for title in ("POD", "PHASE", "NODE", "REASON", "RESTARTS", "AGE", "LAST LINE"):
        right = title in ("RESTARTS", "AGE")
        wide = title == "LAST LINE"
        table.add_column(
            title, justify="right" if right else "left", no_wrap=True, overflow="ellipsis" if wide else "fold"
        )
    for pod in snapshot.pods:
        ready = pod.phase in (Phase.READY, Phase.DONE)
        line = "" if ready else last_lines.get(pod.name, "")
        table.add_row(
            short(pod), Text(pod.phase, COLOURS.get(pod.phase, "yellow")), pod.node or "-", pod.why,
            str(pod.restarts or ""), span(now - pod.created), Text(line[:LAST_LINE], "dim"),
        )  # fmt: skip
    return table


def counts(snapshot: Snapshot) -> str:
    """Say how far each workload is: `prefill 3/8  decode 8/8  router 0/1`."""
    told = []
    for one in sorted(snapshot.workloads, key=lambda one: ("prefill", "decode", "router").index(one.role)
                      if one.role in ("prefill", "decode", "router") else 9):  # fmt: skip
        old = f" (+{one.others} going)" if one.others else ""
        told.append(f"{one.role or one.name} {one.ready}/{one.wanted}{old}")
    return "  ".join(told)


def finding_lines(finding: Finding, snapshot: Snapshot) -> list[Text]:
    """Write a finding: class and whom it concerns, what is wrong, evidence, fix."""
    pods = {pod.name: pod for pod in snapshot.pods}
    names = [short(pods[name]) if name in pods else name for name in finding.pods]
    more = f" and {len(names) - SHOWN_PODS} more" if len(names) > SHOWN_PODS else ""
    total = len(snapshot.pods)
    many = f"{len(names)} of {total} pods" if len(names) > 1 and names[0] not in finding.pods else ""
    whom = ", ".join(names[:SHOWN_PODS]) + more
    lines = [
        Text.assemble((f"{finding.kind}: ", "bold red"), f"{many + ': ' if many else ''}{whom}"),
        Text(f"  {finding.message}"),
    ]
    lines += [Text(f"  | {line}", "dim") for line in finding.evidence]
    lines.append(Text.assemble(("  fix: ", "bold"), finding.fix))
    return lines


def live(
    snapshot: Snapshot, last_lines: Mapping[str, str], findings: tuple[Finding, ...], elapsed: float, note: str
) -> RenderableType:
    """Draw the screen of a deployment that is coming up."""
    head = Text.assemble((counts(snapshot), "bold"), f"   {span(elapsed)}", (f"   {note}" if note else "", "yellow"))
    troubles: list[Text] = []
    for finding in findings[:3]:
        troubles += [line for line in finding_lines(finding, snapshot) if not line.plain.startswith("  | ")]
    return Group(head, pods_table(snapshot, last_lines), *troubles)


def checks_table(checks: list[Check]) -> Table:
    """Draw checks, a fix below what is not well."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for check in checks:
        told = Text(check.told)
        if check.fix and check.mark is not Mark.OK:
            told.append(f"\nfix: {check.fix}", "bold")
        table.add_row(Text(check.mark, MARKS[check.mark]), check.name, told)
    return table
