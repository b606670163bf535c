"""Routers measured in turn before the same engines."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from pdctl import deployment
from pdctl.bench.measure import Client, Progress, measure
from pdctl.bench.workload import Workload
from pdctl.compare.contender import Contender, Say, Standing, standing
from pdctl.deployment import Deployment
from pdctl.runs.run import Run
from pdctl.runs.setting import Place
from pdctl.targets.local import LocalTarget, Wish, plan


@contextmanager
def fleet(name: str | None, prefill: int, decode: int, speed: float, say: Say) -> Iterator[LocalTarget]:
    """Give the engines of a deployment; without a name bring some up and take them down afterwards."""
    if name is not None:
        yield LocalTarget.find(name)
        return
    made = f"compare-{os.getpid()}"
    planned = plan(Wish(made, prefill, decode, "meta-llama/Llama-3.1-8B-Instruct", speed, 1, "round_robin", None))
    target = LocalTarget(planned)
    say(f"starting {prefill} prefill and {decode} decode engines (simulated)")
    try:
        target.start(180.0, lambda member, seconds: None, bound=True)
        yield LocalTarget.find(made)
    finally:
        target = LocalTarget.find(made)
        if not target.stop():
            deployment.remove(made)


def turns(contenders: list[Contender], repeats: int) -> list[tuple[int, Contender]]:
    """Give the order: each repeat has every contender once, and another one begins each time."""
    order = []
    for repeat in range(repeats):
        at = repeat % len(contenders)
        order += [(repeat, one) for one in contenders[at:] + contenders[:at]]
    return order


def place_of(contender: Contender, target: LocalTarget, url: str, version: str) -> Place:
    """Describe the engines behind a contender."""
    settings = target.settings | {"router": f"{contender.package} {version}", "policy": contender.policy}
    return Place(url, target.model, target, settings)


def compare(
    run: Run,
    about: Callable[[Contender, Place], dict[str, Any]],
    contenders: list[Contender],
    engines: Deployment,
    target: LocalTarget,
    workload: Workload,
    repeats: int,
    client: Client,
    on_progress: Callable[[Contender, int], Progress],
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
        log = run.folder / f"{contender.name}.log"
        with standing(contender, engines, log, say) as router:
            place = place_of(contender, target, router.url, router.version)
            if not point.exists:
                point.begin(about(contender, place))
            measure(
                point, workload, place, repeat, replace(client, reset_caches=True), on_progress(contender, repeat),
                _cost(router),
            )  # fmt: skip
        if len(point.finished) == repeats:
            point.end("done")


def _cost(router: Standing) -> Callable[[], dict[str, Any]]:
    """Give what tells the cost of a router from now on."""
    before = router.cpu_seconds()
    return lambda: {
        "router": {
            "cpu_seconds": router.cpu_seconds() - before,
            "resident_mb": router.resident_mb(),
            "version": router.version,
        }
    }
