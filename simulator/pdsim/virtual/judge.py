"""Runs many setups over many seeds, in processes of their own."""

import gc
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path

from pdsim.virtual.figures import Slo, figures
from pdsim.virtual.fleet import Fleet, Setup
from pdsim.virtual.synthetic import SHAPES, Shape
from pdsim.virtual.traces import TraceError, read_trace
from pdsim.virtual.workload import Workload

SYNTHETIC = "synthetic:"


@dataclass(frozen=True)
class Source:
    """Where a workload is from.

    Args:
        name: a file, or `synthetic:` and a shape.
        part: from which share of its time to which, 0 to 1.
        limit: how many requests to read; None for all.
        sessions: whether requests name a session (`read_trace`).
        shape: how much there is of a synthetic shape.
    """

    name: str
    part: tuple[float, float] = (0.0, 1.0)
    limit: int | None = None
    sessions: bool = False
    shape: Shape = field(default_factory=Shape)


@lru_cache(maxsize=4)
def load(source: Source) -> Workload:
    """Give the workload.

    Raises:
        TraceError: there is no such trace or shape, or nothing in it.
    """
    if source.name.startswith(SYNTHETIC):
        make = SHAPES.get(source.name.removeprefix(SYNTHETIC))
        if make is None:
            raise TraceError(f"no synthetic shape {source.name!r}; there are: {', '.join(SHAPES)}")
        workload = make(source.shape)
    else:
        workload = read_trace(Path(source.name), source.limit, source.sessions)
    if workload.requests and source.part != (0.0, 1.0):
        workload = workload.part(*source.part)
    if not workload.requests:
        raise TraceError(f"{source.name}: no requests")
    return workload


@dataclass(frozen=True)
class Case:
    """One run: a setup, what is asked of it, and a seed."""

    setup: Setup
    source: Source
    seed: int
    slo: Slo = field(default_factory=Slo)


def run(case: Case) -> dict[str, float]:
    """Give the figures of a case. What is made up is made up anew for each seed."""
    source = case.source
    if source.name.startswith(SYNTHETIC):
        source = replace(source, shape=replace(source.shape, seed=case.seed))
    told = figures(Fleet(case.setup, load(source), case.seed).run(), case.slo)
    gc.collect()  # engines and router know each other, so that nothing else would soon free a fleet that has run
    return told


def judge(
    cases: Sequence[Case], processes: int, told: Callable[[int], None] = lambda _: None
) -> list[dict[str, float]]:  # fmt: skip
    """Give the figures of all cases, in their order, which do not depend on the number of processes.

    Args:
        cases: what to run.
        processes: how many at once; 1 runs them here.
        told: hears how many are done.
    """
    found = []
    for figure in _each(cases, processes):
        found.append(figure)
        told(len(found))
    return found


def _each(cases: Sequence[Case], processes: int) -> Iterator[dict[str, float]]:
    if processes <= 1 or len(cases) <= 1:
        yield from map(run, cases)
        return
    with ProcessPoolExecutor(min(processes, len(cases)), get_context("spawn")) as pool:
        yield from pool.map(run, cases)
