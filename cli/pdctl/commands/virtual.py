"""What the commands on the virtual fleet have in common: options, where requests are from, running."""

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from pdctl.console import err
from pdctl.errors import ExitCode, PdctlError
from pdrouter.policies import POLICIES
from pdsim.timing import Profile, load_profile
from pdsim.virtual.figures import Interval
from pdsim.virtual.judge import SYNTHETIC, Case, Source, judge, load
from pdsim.virtual.synthetic import SHAPES, Shape
from pdsim.virtual.traces import TraceError

Seeds = Annotated[int, typer.Option(min=1, help="How many seeds: arrivals and random choices of each differ.")]
Part = Annotated[str, typer.Option(help="Share of the trace's time, as 0.5:1.")]
Rate = Annotated[float, typer.Option(min=0.01, help="Requests a second of a synthetic shape.")]
Requests = Annotated[int, typer.Option(min=1, help="Requests of a synthetic shape.")]
KvTokens = Annotated[int, typer.Option(min=0, help="Tokens of each engine's KV cache; 0: as measured.")]
Gpu = Annotated[str, typer.Option(help="Timing profile: h200, h100 (derived), or a file of pdctl calibrate.")]
LinkGbps = Annotated[
    float, typer.Option(min=0, help="Gbit/s of each engine's network port, shared by its transfers; 0: as measured.")
]
Text = Annotated[bool, typer.Option(help="Prompts are text, which engines tokenize first.")]
SloTtft = Annotated[float, typer.Option(min=0, help="Seconds to the first token that are good.")]
SloItl = Annotated[float, typer.Option(min=0, help="Seconds between tokens, an answer's mean, that are good.")]
Jobs = Annotated[int, typer.Option(min=0, help="Processes at once; 0: one for each core.")]


def numbers(text: str, option: str) -> list[float]:
    """Read numbers with commas between them."""
    try:
        found = [float(one) for one in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) <= 0:
        raise PdctlError(f"{option} {text!r} is no list of positive numbers", f"write {option} 1,4,6", ExitCode.USAGE)
    return found


def splits(text: str) -> list[tuple[int, int]]:
    """Read P:D pairs with commas between them."""
    found = []
    for one in text.split(","):
        left, colon, right = one.partition(":")
        if not (colon and left.strip().isdigit() and right.strip().isdigit() and int(right)):
            raise PdctlError(
                f"--split {text!r} is no list of prefill:decode pairs", "write --split 8:8,6:10", ExitCode.USAGE
            )
        found.append((int(left), int(right)))
    return found


def parts(text: str) -> tuple[float, float]:
    """Read a share of a trace."""
    left, _, right = text.partition(":")
    try:
        begin, end = float(left), float(right)
    except ValueError:
        begin, end = 1.0, 0.0
    if not 0 <= begin < end <= 1:
        raise PdctlError(f"--part {text!r} is no share of a trace", "write --part 0:0.5", ExitCode.USAGE)
    return begin, end


def told_source(
    name: str, part: tuple[float, float], sessions: bool, rate: float, requests: int, input_tokens: int = 2000,
    output_tokens: int = 300,
) -> Source:  # fmt: skip
    """Give where requests are from, after a look at it."""
    shape = Shape(requests, rate, input_tokens, output_tokens)
    source = Source(name if name.startswith(SYNTHETIC) else str(Path(name)), part, None, sessions, shape)
    try:
        load(source)
    except TraceError as error:
        shapes = ", ".join(SYNTHETIC + one for one in SHAPES)
        raise PdctlError(str(error), f"give a trace's file, or one of {shapes}", ExitCode.USAGE) from error
    return source


def profile_of(gpu: str) -> Profile:
    """Give a timing profile."""
    try:
        return load_profile(gpu)
    except ValueError as error:
        raise PdctlError(str(error), "name one of these", ExitCode.USAGE) from error


def simulated(cases: list[Case], jobs: int) -> list[dict[str, float]]:
    """Run cases with a progress bar."""
    profile_of(cases[0].setup.gpu)
    columns = (TextColumn("simulating"), BarColumn(30), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, disable=not err.is_terminal, refresh_per_second=4, transient=True) as progress:
        task = progress.add_task("simulating", total=len(cases))
        return judge(cases, jobs or os.cpu_count() or 1, lambda done: progress.update(task, completed=done))


def known_policy(name: str) -> None:
    """Refuse a policy that the router does not have.

    Raises:
        PdctlError: it has none of that name.
    """
    if name not in POLICIES:
        raise PdctlError(f"no policy {name!r}", f"choose of: {', '.join(POLICIES)}", ExitCode.USAGE)


def bytes_a_second(gbps: float) -> float:
    """Give Gbit/s as bytes a second."""
    return gbps * 1e9 / 8


def interval(one: Interval) -> dict[str, float]:
    """Give a figure over seeds as JSON."""
    return {"mean": one.mean, "half": one.half}


COLUMNS = ("TTFT mean s", "p50 s", "p99 s", "ITL mean ms", "p99 ms", "good/s", "hit %", "moved TB")


def figures_table(*labels: str) -> Table:
    """Give a table without rows: columns for labels, then those of `cells`."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in labels:
        table.add_column(name)
    for name in COLUMNS:
        table.add_column(name, justify="right")
    return table


def cells(figures: dict[str, dict[str, float]]) -> list[str]:
    """Write the figures of a row, with intervals where there are several seeds."""

    def cell(name: str, scale: float, digits: int) -> str:
        one = figures[name]
        half = "" if one["half"] != one["half"] else f" ±{one['half'] * scale:.{digits}f}"
        return f"{one['mean'] * scale:.{digits}f}{half}"

    return [
        cell("ttft_mean", 1, 3), cell("ttft_p50", 1, 3), cell("ttft_p99", 1, 2), cell("itl_mean", 1e3, 2),
        cell("itl_p99", 1e3, 2), cell("goodput", 1, 2), cell("hit_share", 100, 1), cell("moved_bytes", 1e-12, 2),
    ]  # fmt: skip
