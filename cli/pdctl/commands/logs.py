"""`pdctl logs`: what the processes printed."""

import re
from typing import Annotated

import typer
from rich.text import Text

from pdctl.commands.options import Context, Name, Namespace
from pdctl.console import out
from pdctl.errors import ExitCode, PdctlError
from pdctl.targets import LogQuery, find

COLOURS = ("cyan", "green", "magenta", "blue", "yellow", "bright_cyan", "bright_green", "bright_magenta")
WIDTH = 14
_SPAN = re.compile(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s?)?")


def logs(
    member: Annotated[
        str | None, typer.Argument(help="prefill, decode, router, download, or one process or pod.", show_default="all")
    ] = None,
    name: Name = None,
    namespace: Namespace = None,
    context: Context = None,
    role: Annotated[str | None, typer.Option(help="Only of this role.", show_default="all")] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on as lines come, also of new pods.")] = False,
    tail: Annotated[int, typer.Option(min=0, help="Last lines of each process.")] = 20,
    previous: Annotated[
        bool, typer.Option("--previous", "-p", help="Of containers before their last restart.")
    ] = False,
    since: Annotated[str | None, typer.Option(help="Only of the last 30s, 5m, 2h.", show_default="all")] = None,
    grep: Annotated[str | None, typer.Option(help="Only lines in which this regular expression occurs.")] = None,
) -> None:
    """Show the logs of all processes or pods as one, each line behind its process's name."""
    wanted = _pattern(grep)
    query = LogQuery(member or role, tail, follow, previous, _seconds(since))
    target = find(name, namespace, context)
    colours: dict[str, str] = {}
    try:
        for whose, line in target.logs(query):
            if wanted is not None and not wanted.search(line):
                continue
            colour = colours.setdefault(whose, COLOURS[len(colours) % len(COLOURS)])
            out.print(Text.assemble((f"{whose:<{WIDTH}} ", colour), line), soft_wrap=True)
    finally:
        target.close()


def _pattern(text: str | None) -> re.Pattern[str] | None:
    try:
        return None if text is None else re.compile(text)
    except re.error as error:
        raise PdctlError(
            f"{text!r} is no regular expression: {error}",
            "put \\ before signs that are meant literally",
            ExitCode.USAGE,
        ) from None


def _seconds(text: str | None) -> float | None:
    if text is None:
        return None
    found = _SPAN.fullmatch(text)
    if found is None or not text:
        raise PdctlError(f"{text!r} is no time", "write 30s, 5m, 2h or 1h30m", ExitCode.USAGE)
    hours, minutes, rest = (int(part or 0) for part in found.groups())
    return hours * 3600.0 + minutes * 60 + rest
