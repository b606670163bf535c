"""`pdctl logs`: what the processes printed."""

from enum import StrEnum
from typing import Annotated

import typer
from rich.text import Text

from pdctl.commands.options import Name
from pdctl.console import out
from pdctl.targets import LocalTarget

COLOURS = ("cyan", "green", "magenta", "blue", "yellow", "bright_cyan", "bright_green", "bright_magenta")


class Role(StrEnum):
    """Whose logs."""

    PREFILL = "prefill"
    DECODE = "decode"
    ROUTER = "router"


def logs(
    name: Name = "local",
    role: Annotated[Role | None, typer.Option(help="Only of this role.", show_default="all")] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on as lines come.")] = False,
    tail: Annotated[int, typer.Option(min=0, help="Last lines of each process.")] = 20,
) -> None:
    """Show the logs of all processes, each line behind its process's name."""
    target = LocalTarget.find(name)
    colours: dict[str, str] = {}
    for member, line in target.logs(None if role is None else role.value, tail, follow):
        colour = colours.setdefault(member, COLOURS[len(colours) % len(COLOURS)])
        out.print(Text.assemble((f"{member:<10} ", colour), line), soft_wrap=True)
