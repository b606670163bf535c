"""`pdctl routing`: who served whom, is KV really moving, was the protocol kept."""

import re
from typing import Annotated

import typer
from rich.table import Table

from pdctl.commands.options import Context, Format, Json, Name, Namespace, Output
from pdctl.console import bytes_text, err, out, print_data
from pdctl.errors import ExitCode
from pdctl.targets import LogQuery, Routing, Target, find

SHOWN_VIOLATIONS = 10
LINES_A_REQUEST = 3  # of a router's log: other lines come between those of requests
_FIELD = re.compile(r"(\w+)=(\S+)")


def routing(
    name: Name = None,
    namespace: Namespace = None,
    context: Context = None,
    edges: Annotated[
        bool, typer.Option("--edges", help="Show each way between two engines, and whether it is closed.")
    ] = False,
    recent: Annotated[
        int, typer.Option(min=0, metavar="N", help="Show the last N requests of each router instead: who served them.")
    ] = 0,
    output: Output = Format.TABLE,
    json: Json = False,
) -> None:
    """Show prompts and KV bytes by pair, and breaches of the handoff protocol. Exit status 1 when there are any."""
    target = find(name, namespace, context)
    try:
        if recent:
            served = _recent(target, recent)
            if json or output is not Format.TABLE:
                print_data({"name": target.name, "requests": served}, "json" if json else output.value)
            else:
                _show_recent(target, served)
            return
        told = target.routing()
        if json or output is not Format.TABLE:
            print_data(_data(target, told), "json" if json else output.value)
        elif edges:
            _show_edges(target, told)
        else:
            _show(target, told)
    finally:
        target.close()
    if told.violations or told.silent:
        raise typer.Exit(ExitCode.FAILURE)


def _recent(target: Target, count: int) -> list[dict[str, str]]:
    """Read each router's last requests from its log: what the line of a request says, engines by their names."""
    target.health()
    names = {url: name for name, url in target.urls().items()}
    found = []
    for member, line in target.logs(LogQuery("router", tail=count * LINES_A_REQUEST)):
        fields = dict(_FIELD.findall(line))
        if "request_id" in fields and "decode" in fields:
            for end in ("prefill", "decode"):
                fields[end] = names.get(fields.get(end, ""), fields.get(end, ""))
            found.append({"router": member, **fields})
    return found[-count:]


def _show_recent(target: Target, served: list[dict[str, str]]) -> None:
    out.print(f"[bold]{target.name}[/]  last requests, the newest below{_label(target)}")
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    columns = ("request_id", "status", "prefill", "decode", "prefill_ms", "decode_ttft_ms", "total_ms", "reason")
    for column in columns:
        table.add_column(column, justify="right" if column.endswith("_ms") else "left")
    for fields in served:
        table.add_row(*(fields.get(column, "") for column in columns))
    out.print(table)
    if not served:
        out.print("No request is in the routers' last lines.")


def _data(target: Target, told: Routing) -> dict[str, object]:
    return {
        "name": target.name,
        "simulated": target.simulated,
        "pairs": [{"prefill": p, "decode": d, "prompts": n} for (p, d), n in sorted(told.pairs.items())],
        "transfers": [
            {"prefill": p, "decode": d, "transfers": count, "bytes": moved}
            for (p, d), (count, moved) in sorted(told.transfers.items())
        ],
        "edges": [
            {"prefill": p, "decode": d, "handoffs": e.handoffs, "seconds": e.seconds, "closed": e.closed}
            for (p, d), e in sorted(told.edges.items())
        ],
        "violations": told.violations,
        "silent": told.silent,
    }


def _number(name: str) -> tuple[str, int, str]:
    role, _, number = name.rpartition("-")
    return (role, int(number) if number.isdigit() else -1, number)


def _label(target: Target) -> str:
    return "  [yellow](simulated)[/]" if target.simulated else ""


def _show_edges(target: Target, told: Routing) -> None:
    out.print(f"[bold]{target.name}[/]  ways between engines{_label(target)}")
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    for column in ("prefill", "decode"):
        table.add_column(column)
    for column in ("handoffs", "ticket to first byte"):
        table.add_column(column, justify="right")
    table.add_column("state")
    for (prefill, decode), edge in sorted(told.edges.items(), key=lambda one: (_number(one[0][0]), _number(one[0][1]))):
        state = "[red]closed[/]" if edge.closed else "[green]open[/]"
        table.add_row(prefill, decode, str(edge.handoffs), f"{edge.seconds * 1000:.0f} ms", state)
    out.print(table)
    if not told.edges:
        out.print("No KV was handed over yet.")


def _show(target: Target, told: Routing) -> None:
    prompts = sum(told.pairs.values())
    out.print(
        f"[bold]{target.name}[/]  prompts served by prefill (down) and decode (across){_label(target)}", soft_wrap=True
    )
    if told.pairs:
        prefills = sorted({prefill for prefill, _ in told.pairs}, key=_number)
        decodes = sorted({decode for _, decode in told.pairs}, key=_number)
        table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
        table.add_column("")
        for decode in [*decodes, "total"]:
            table.add_column(decode.removeprefix("decode-") if len(decodes) > 6 else decode, justify="right")
        for prefill in prefills:
            row = [told.pairs.get((prefill, decode), 0) for decode in decodes]
            shown = "one engine alone" if prefill == "none" else prefill
            table.add_row(shown, *(str(count or "·") for count in row), str(sum(row)))
        out.print(table)
    elif target.router.router != "ours":
        out.print(f"{target.router.title} does not tell whom it chose; what engines tell:")
    count = sum(transfers for transfers, _ in told.transfers.values())
    moved = sum(total for _, total in told.transfers.values())
    by = "decode engines" if any(prefill == "any" for prefill, _ in told.transfers) else "pairs"
    asked = f"{prompts} prompts, " if told.pairs or target.router.router == "ours" else ""
    out.print(f"{asked}{count} KV transfers over {len(told.transfers)} {by}, {bytes_text(moved)} of KV moved")
    if prompts and not count:
        err.print("[red]no KV moves[/]: decode engines compute all prompts themselves; see pdctl doctor")
    for engine in told.silent:
        err.print(f"[red]{engine} does not answer[/]; its transfers and violations are missing here")
    if not target.simulated:
        return  # real engines do not watch over the protocol
    colour = "red" if told.violations else "green"
    out.print(f"[{colour}]{len(told.violations)} protocol violations[/]")
    for entry in told.violations[:SHOWN_VIOLATIONS]:
        out.print(f"  {entry['engine']}: {entry['rule']} {entry['request_id']} {entry['fields']}", markup=False)
