"""`pd-referee`: wiring and the screen."""

import asyncio
import datetime
import shlex
import signal
import sys
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import httpx
import orjson
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pdsim.referee import peers
from pdsim.referee.case import Case, Verdict
from pdsim.referee.cases import CASES, GROUPS
from pdsim.referee.court import Court, Finding
from pdsim.referee.engines import RefereeError
from pdsim.referee.places import Places
from pdsim.referee.router import LaunchedRouter, Router, RunningRouter
from pdsim.referee.scorecard import Scorecard

EPILOG = (
    "Exit status: 0 every case that applies was passed, 1 a case failed, 2 wrong usage, "
    "3 engines or the router could not be brought up, 130 Ctrl-C."
)
STYLES = {Verdict.PASS: "green", Verdict.FAIL: "bold red", Verdict.NOT_APPLICABLE: "dim"}
WIDE = 160

out = Console(highlight=False, width=None if sys.stdout.isatty() else WIDE)
err = Console(stderr=True, highlight=False, width=None if sys.stderr.isatty() else WIDE)
app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@dataclass(frozen=True, slots=True)
class Wish:
    """What the command line asked for."""

    peer: peers.Peer
    program: str
    url: str | None
    prefill: list[str]
    decode: list[str]
    label: str | None
    version: str | None
    cases: list[Case]


def chosen(names: Sequence[str], groups: Sequence[str]) -> list[Case]:
    """Give the cases that are to be tried; all when neither names nor groups are given."""
    for given, known, what in (
        (names, [case.name for case in CASES], "case"),
        (groups, [group.name for group in GROUPS], "group"),
    ):
        for name in given:
            if name not in known:
                raise typer.BadParameter(f"no {what} {name}; pd-referee --list shows all")
    return [case for case in CASES if (not names and not groups) or case.name in names or case.group in groups]


def listed() -> Table:
    """Give all cases as a table."""
    table = Table("group", "case", "what a good router does", box=None, pad_edge=False)
    for case in CASES:
        table.add_row(case.group, case.name + (" *" if case.own_only else ""), case.sentence)
    return table


def cases_markdown() -> str:
    """Give all cases for a page."""
    lines = ["| group | case | what a good router does |", "|---|---|---|"]
    for case in CASES:
        star = f" \\* It takes {case.own_only}." if case.own_only else ""
        lines.append(f"| {case.group} | `{case.name}` | {case.sentence}{star} |")
    return "\n".join(lines) + "\n"


async def judge(wish: Wish) -> Scorecard:
    """Try the cases.

    Raises:
        RefereeError: engines or the router could not be brought up.
    """
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    headers = {"accept-encoding": "identity", "user-agent": "pd-referee"}
    async with httpx.AsyncClient(timeout=60, limits=limits, trust_env=False, headers=headers) as client:
        places = Places()
        router: Router
        named = (wish.prefill, wish.decode) if wish.prefill or wish.decode else None
        if wish.url is not None:
            router = RunningRouter(wish.url, client)
        else:
            router = LaunchedRouter(wish.peer.template, wish.program, places, client)
        done = 0

        def told(finding: Finding) -> None:
            nonlocal done
            done += 1
            case = finding.case
            count = Text(f"{done:>3}/{len(wish.cases)} {finding.seconds:>5.1f} s ", style="dim")
            mark = Text(f"{finding.verdict.value:<15}", style=STYLES[finding.verdict])
            err.print(Text.assemble(count, mark, f"{case.group}/{case.name}: {finding.evidence}"), soft_wrap=True)

        court = Court(router, client, places, named, wish.peer.keyed)
        findings = await court.hear(wish.cases, told)
        return Scorecard(
            wish.label or wish.peer.name,
            wish.version or peers.version_of(wish.peer, wish.program),
            _called(wish),
            datetime.datetime.now(datetime.UTC).date().isoformat(),
            findings,
            court.metrics or "no metrics page",
        )


async def _until_terminated(work: Coroutine[None, None, Scorecard]) -> Scorecard:
    """Do the work; SIGTERM ends it as Ctrl-C does, so that no engine is left behind."""
    task = asyncio.ensure_future(work)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    try:
        return await task
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None


def _called(wish: Wish) -> str:
    """Give the call that makes such a scorecard again, and what it starts."""
    if wish.url is not None:
        engines = [f"--prefill {url}" for url in wish.prefill] + [f"--decode {url}" for url in wish.decode]
        return " ".join([f"pd-referee --url {wish.url}", *engines])
    if wish.peer.name in peers.PEERS:
        return f"pd-referee --router {wish.peer.name}\n# it starts: {wish.peer.template}"
    return f"pd-referee --command {shlex.quote(wish.peer.template)}"


def _peer(router: str | None, command: str | None, url: str | None, keyed: bool) -> peers.Peer:
    if sum(given is not None for given in (router, command, url)) != 1:
        raise typer.BadParameter("give one of --router, --command and --url")
    if router is not None:
        if router not in peers.PEERS:
            raise typer.BadParameter(f"no router {router} is known; known are {', '.join(peers.PEERS)}, or --command")
        return peers.PEERS[router]
    if command is not None:
        try:
            peers.check(command)
        except RefereeError as error:
            raise typer.BadParameter(str(error)) from None
        return peers.Peer("router", command, keyed=keyed)
    return peers.Peer("router", "", keyed=keyed)


@app.command(epilog=EPILOG)
def referee(
    router: Annotated[
        str | None, typer.Option("--router", help=f"A router that is known: {', '.join(peers.PEERS)}.")
    ] = None,
    command: Annotated[
        str | None,
        typer.Option(
            "--command",
            help="How to start another one, with the placeholders "
            + " ".join(f"{{{name}}}" for name in peers.PLACEHOLDERS)
            + ".",
        ),
    ] = None,
    url: Annotated[str | None, typer.Option("--url", help="A router that runs already; name its engines too.")] = None,
    prefill: Annotated[
        list[str] | None,
        typer.Option("--prefill", help="With --url: a prefill engine; repeat. One that does not run is started there."),
    ] = None,
    decode: Annotated[
        list[str] | None, typer.Option("--decode", help="With --url: a decode engine; repeat, likewise.")
    ] = None,
    program: Annotated[str | None, typer.Option("--program", help="Path of the router's program.")] = None,
    keyed: Annotated[
        bool,
        typer.Option(
            "--keyed/--not-keyed", help="Whether it chooses engines by a key of the request (--command, --url)."
        ),
    ] = True,
    label: Annotated[str | None, typer.Option("--label", help="Name on the scorecard.")] = None,
    of_version: Annotated[str | None, typer.Option("--of-version", help="Version on the scorecard.")] = None,
    case: Annotated[list[str] | None, typer.Option("--case", help="Only this case; repeat for more.")] = None,
    group: Annotated[list[str] | None, typer.Option("--group", help="Only this group; repeat for more.")] = None,
    json: Annotated[Path | None, typer.Option("--json", help="Write the scorecard as JSON here.")] = None,
    markdown: Annotated[Path | None, typer.Option("--markdown", help="Write the scorecard as Markdown here.")] = None,
    list_cases: Annotated[bool, typer.Option("--list", help="Show all cases and end.")] = False,
) -> None:
    """Judge a prefill/decode router in front of simulated engines: wire, batch, abort, failover, fairness, security."""
    if list_cases:
        out.print(listed())
        return
    peer = _peer(router, command, url, keyed)
    if (url is None) != (not prefill and not decode) or bool(prefill) != bool(decode):
        raise typer.BadParameter("--prefill and --decode go with --url, both at least once")
    path = program or (peers.found(peer.program) if peer.program else "")
    wish = Wish(peer, path, url, prefill or [], decode or [], label, of_version, chosen(case or [], group or []))
    card = asyncio.run(_until_terminated(judge(wish)))
    if json is not None:
        json.write_bytes(orjson.dumps(card.data(), option=orjson.OPT_INDENT_2) + b"\n")
    if markdown is not None:
        markdown.write_text(card.markdown(), encoding="utf-8")
    out.print(f"[bold]{card.router} {card.version}[/] (simulated engines): {card.summary}", soft_wrap=True)
    raise typer.Exit(0 if card.passed else 1)


def main() -> None:
    """Run; errors become one screen and an exit status."""
    try:
        app()
    except RefereeError as error:
        err.print(Text.assemble(("error: ", "bold red"), str(error)), soft_wrap=True)
        sys.exit(3)
    except (KeyboardInterrupt, BrokenPipeError):
        sys.exit(130)
