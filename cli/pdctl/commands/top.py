"""`pdctl top`: what each engine and the router do at the moment."""

import time
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from pdctl.commands.options import Context, Format, Name, Namespace, Output
from pdctl.console import bytes_text, out, print_data
from pdctl.errors import PdctlError
from pdctl.rates import EngineRow, RouterRow, engine_row, pinned_by_url, router_row
from pdctl.targets import Target, find
from pdctl.targets.pages import Page


def top(
    name: Name = None,
    namespace: Namespace = None,
    context: Context = None,
    interval: Annotated[float, typer.Option(min=0.2, help="Seconds between two looks.")] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="Look twice, print, end.")] = False,
    output: Output = Format.TABLE,
) -> None:
    """Show live what each engine has to do, TTFT and ITL, KV in use, pinned and read, and the router's rates."""
    target = find(name, namespace, context)
    try:
        if once or output is not Format.TABLE or not out.is_terminal:
            before = _look(target)
            time.sleep(interval)
            view = _view(target, before, _look(target))
            if output is Format.TABLE:
                out.print(_screen(target, view))
            else:
                print_data(_data(view), output.value)
            return
        _watch(target, interval)
    finally:
        target.close()


@dataclass(frozen=True, slots=True)
class _Look:
    at: float
    engines: dict[str, Page]
    routers: dict[str, Page]
    urls: dict[str, str]  # of engines, by name


@dataclass(frozen=True, slots=True)
class _View:
    engines: dict[str, EngineRow]
    routers: dict[str, RouterRow]
    silent: list[str]


def _look(target: Target) -> _Look:
    told = target.pages("/metrics", None)
    engines = {name: Page(text) for name, role, text in told if role != "router" and text is not None}
    routers = {name: Page(text) for name, role, text in told if role == "router" and text is not None}
    return _Look(time.monotonic(), engines, routers, target.urls())


def _view(target: Target, before: _Look, after: _Look) -> _View:
    seconds = after.at - before.at
    pinned = pinned_by_url(after.routers)
    engines = {
        name: engine_row(before.engines[name], page, seconds, pinned.get(after.urls.get(name, ""), 0.0))
        for name, page in after.engines.items() if name in before.engines
    }  # fmt: skip
    routers = {
        name: router_row(before.routers[name], page, seconds)
        for name, page in after.routers.items() if name in before.routers
    }  # fmt: skip
    return _View(engines, routers, sorted(set(after.urls) - set(after.engines)))


def _watch(target: Target, interval: float) -> None:
    before = _look(target)
    with Live(Text("looking …", "dim"), console=out, refresh_per_second=4) as live:
        while True:
            time.sleep(interval)
            try:
                after = _look(target)
            except PdctlError as error:
                live.update(Text(f"{error.cause}; looking again", "yellow"))
                continue
            live.update(_screen(target, _view(target, before, after)))
            before = after


def _data(view: _View) -> dict[str, Any]:
    return {
        "engines": {name: asdict(row) for name, row in view.engines.items()},
        "routers": {name: asdict(row) for name, row in view.routers.items()},
        "silent": view.silent,
    }


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1000:.1f}"


def _screen(target: Target, view: _View) -> RenderableType:
    head = Text.assemble(
        (target.name, "bold"), f"  {target.model}", ("  (simulated)" if target.simulated else "", "yellow")
    )
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("ENGINE")
    for title in (
        "RUNNING",
        "WAITING",
        "KV USED",
        "PINNED tok",
        "IN tok/s",
        "OUT tok/s",
        "TTFT ms",
        "ITL ms",
        "KV READ/s",
    ):
        table.add_column(title, justify="right", no_wrap=True)
    for name, row in view.engines.items():
        table.add_row(
            name, f"{row.running:.0f}", f"{row.waiting:.0f}", f"{row.kv:.1%}",
            f"{row.pinned:.0f}" if row.pinned else "", f"{row.prompt_rate:.0f}", f"{row.output_rate:.0f}",
            _milliseconds(row.ttft), _milliseconds(row.itl),
            bytes_text(row.kv_rate) if row.kv_rate else "",
        )  # fmt: skip
    routers = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    routers.add_column("ROUTER")
    for title in ("REQUESTS/s", "ERRORS/s", "RETRIES/s", "UNDER WAY", "QUEUED", "TTFT ms", "HANDOFF ms"):
        routers.add_column(title, justify="right", no_wrap=True)
    for name, told in view.routers.items():
        routers.add_row(
            name, f"{told.requests:.1f}", f"{told.errors:.1f}", f"{told.retries:.1f}", f"{told.running:.0f}",
            f"{told.queued:.0f}", _milliseconds(told.ttft), _milliseconds(told.handoff),
        )  # fmt: skip
    silent = [Text(f"{name} does not answer", "red") for name in view.silent]
    return Group(head, routers, table, *silent)
