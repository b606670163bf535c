"""Routers measured in turn before the same engines."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

from pdctl import deployment
from pdctl.bench.measure import Client, Progress, measure
from pdctl.bench.workload import Workload
from pdctl.compare.contender import Standing, standing
from pdctl.compare.fairness import processes
from pdctl.deployment import Deployment
from pdctl.routers.choice import Choice
from pdctl.routers.programs import Programs, Say
from pdctl.runs.run import Run
from pdctl.runs.setting import Place
from pdctl.targets.local import LocalTarget, Wish, plan
from pdsim.referee.places import free


@contextmanager
def fleet(name: str | None, prefill: int, decode: int, speed: float, say: Say) -> Iterator[LocalTarget]:
    """Give the engines of a deployment; without a name bring some up and take them down afterwards."""
    if name is not None:
        yield LocalTarget.find(name)
        return
    made = f"compare-{os.getpid()}"
    # far from the default ports: another deployment may come up in the same seconds
    port = next(port for port in range(12000 + os.getpid() % 5000, 20000) if free("127.0.0.1", port))
    planned = plan(Wish(made, prefill, decode, "meta-llama/Llama-3.1-8B-Instruct", speed, 1, "round_robin", port))
    target = LocalTarget(planned)
    say(f"starting {prefill} prefill and {decode} decode engines (simulated)")
    try:
        target.start(180.0, lambda member, seconds: None, bound=True)
        yield LocalTarget.find(made)
    finally:
        target = LocalTarget.find(made)
        if not target.stop():
            deployment.remove(made)


def turns(contenders: list[Choice], repeats: int) -> list[tuple[int, Choice]]:
    """Give the order: each repeat has every contender once, and another one begins each time."""
    order = []
    for repeat in range(repeats):
        at = repeat % len(contenders)
        order += [(repeat, one) for one in contenders[at:] + contenders[:at]]
    return order


def place_of(contender: Choice, target: LocalTarget, url: str, version: str) -> Place:
    """Describe the engines behind a contender."""
    settings = target.settings | {"router": f"{contender.package} {version}", "policy": contender.rule}
    return Place(url, target.model, target, settings)


def compare(
    run: Run,
    about: Callable[[Choice, Place], dict[str, Any]],
    contenders: list[Choice],
    engines: Deployment,
    target: LocalTarget,
    workload: Workload,
    repeats: int,
    client: Client,
    programs: Programs,
    on_progress: Callable[[Choice, int], Progress],
    say: Say,
) -> None:
    """Measure every contender, repeat by repeat; what a killed run has measured already is not measured again.

    Args:
        run: the comparison; its points are the contenders.
        about: gives what a point writes down when it begins.
        contenders: who takes turns.
        engines: the deployment whose engines they stand before.
        target: the same, to look at.
        workload: what is sent; each repeat has other prompts, the same for all contenders.
        repeats: how often each is measured.
        client: how the load is made.
        programs: where llm-d's are.
        on_progress: gives what is told of a contender's progress in a repeat.
        say: told what takes a while.

    Raises:
        PdctlError: a contender does not serve.
        KeyboardInterrupt: interrupted; what was measured is kept.
    """
    for repeat, contender in turns(contenders, repeats):
        point = Run(run.folder / "points" / contender.name)
        if point.exists and repeat in point.finished:
            continue
        with standing(contender, engines, run.folder / "logs" / contender.name, say, programs) as router:
            place = place_of(contender, target, router.url, router.version)
            if not point.exists:
                point.begin(about(contender, place) | {"processes": processes(router.members)})
            measure(
                point, workload, place, repeat, replace(client, reset_caches=True), on_progress(contender, repeat),
                partial(_cost, router),
            )  # fmt: skip
        if len(point.finished) == repeats:
            point.end("done")


def _cost(router: Standing) -> Callable[[], dict[str, Any]]:
    """Give what tells the cost of a router from now on."""
    before = router.cost()

    def told() -> dict[str, Any]:
        parts = {
            kind: {"cpu_seconds": seconds - before.get(kind, (0.0, 0.0))[0], "resident_mb": resident}
            for kind, (seconds, resident) in router.cost().items()
        }
        sums = {key: sum(one[key] for one in parts.values()) for key in ("cpu_seconds", "resident_mb")}
        return {"router": sums | {"version": router.version, "parts": parts}}

    return told
