"""Routers that take turns before the engines of a deployment on Kubernetes."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from pdctl.bench.measure import Client, Progress, measure
from pdctl.bench.workload import Workload
from pdctl.compare.live import turns
from pdctl.routers.choice import Choice
from pdctl.routers.programs import Programs
from pdctl.runs.run import Run
from pdctl.runs.setting import Place
from pdctl.targets.kubernetes import KubernetesTarget

SWITCH_SECONDS = 300.0
Reach = Callable[[], KubernetesTarget]  # the deployment as it is now


def compare(
    run: Run,
    about: Callable[[Choice, Place], dict[str, Any]],
    contenders: list[Choice],
    reach: Reach,
    workload: Workload,
    repeats: int,
    client: Client,
    programs: Programs,
    on_progress: Callable[[Choice, int], Progress],
    say: Callable[[str], None],
) -> None:
    """Measure every contender, repeat by repeat, through a port-forward to its Service; then put the first one back.

    What a killed run has measured already is not measured again; the run remembers which router stood there before.

    Args:
        run: the comparison; its points are the contenders.
        about: gives what a point writes down when it begins.
        contenders: who takes turns.
        reach: looks at the deployment anew: another router has other pods and ports.
        workload: what is sent; each repeat has other prompts, the same for all contenders.
        repeats: how often each is measured.
        client: how the load is made.
        programs: settings of the routers' charts.
        on_progress: gives what is told of a contender's progress in a repeat.
        say: told what takes a while.

    Raises:
        PdctlError: a contender does not serve, or the engines cannot empty their caches.
        KeyboardInterrupt: interrupted; what was measured is kept.
    """
    if "router_before" not in run.about:
        with reach() as target:
            before = target.router
            run.note(router_before={"router": before.router, "policy": before.policy})
    try:
        for repeat, contender in turns(contenders, repeats):
            point = Run(run.folder / "points" / contender.name)
            if point.exists and repeat in point.finished:
                continue
            _stand(contender, reach, programs, say)
            with reach() as target, target.reached() as url:
                settings = target.settings | {"router": contender.package, "policy": contender.rule}
                place = Place(url, target.model, target, settings)
                if not point.exists:
                    point.begin(about(contender, place))
                progress = on_progress(contender, repeat)
                measure(point, workload, place, repeat, replace(client, reset_caches=True), progress)
            if len(point.finished) == repeats:
                point.end("done")
    finally:
        _stand(Choice(**run.about["router_before"]), reach, programs, say)


def _stand(wanted: Choice, reach: Reach, programs: Programs, say: Callable[[str], None]) -> None:
    with reach() as target:
        if target.router != wanted:
            say(f"{wanted.title} takes over from {target.router.title}")
            target.switch(wanted, programs, SWITCH_SECONDS, say)
