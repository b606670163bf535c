"""`pdctl sweep`: a load at several levels, on several settings."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from pdctl import deployment
from pdctl.bench.measure import measure, worst
from pdctl.bench.sweep import Over, Plan, Setting, findings
from pdctl.bench.workload import Workload
from pdctl.commands import loads
from pdctl.commands.bench import about
from pdctl.commands.loads import client_of, slos_of, workload_of
from pdctl.commands.options import Context, Json, Name, Namespace
from pdctl.commands.progress import counted
from pdctl.commands.runs import points_table
from pdctl.compare.contender import standing
from pdctl.compare.live import fleet, place_of
from pdctl.console import err, out, print_json
from pdctl.errors import ExitCode, PdctlError
from pdctl.report.write import write
from pdctl.routers.choice import Choice
from pdctl.runs import Run, Store
from pdctl.runs.setting import Place, placed
from pdrouter.policies import POLICIES


def sweep(
    num_prompts: loads.NumPrompts = 100,
    concurrency: Annotated[
        str | None, typer.Option(help="Levels: prompts at once, such as 1,2,4,8,16,32.", show_default=False)
    ] = None,
    rate: Annotated[
        str | None, typer.Option(help="Levels: requests a second, such as 1,2,4,8.", show_default=False)
    ] = None,
    policies: Annotated[
        str | None, typer.Option(help="The router's policies to measure, on engines of its own.", show_default=False)
    ] = None,
    splits: Annotated[
        str | None,
        typer.Option(help="Prefill:decode engines to measure, such as 1:3,2:2, on this machine.", show_default=False),
    ] = None,
    speed: Annotated[
        float, typer.Option(min=0.01, help="How much faster than an H200 engines of its own run (simulated).")
    ] = 1.0,
    input_len: loads.InputLen = 2000,
    output_len: loads.OutputLen = 2000,
    burstiness: loads.Burstiness = 1.0,
    turns: loads.Turns = 1,
    shared_prefix: loads.SharedPrefix = 0,
    think: loads.Think = 0.0,
    warmup: loads.Warmup = 0,
    repeats: loads.Repeats = 1,
    slo: loads.Slos = None,
    name: Name = None,
    namespace: Namespace = None,
    context: Context = None,
    url: Annotated[str | None, typer.Option(help="Any OpenAI server instead of a deployment.")] = None,
    seed: loads.Seed = 0,
    processes: loads.Processes = 1,
    keep_caches: loads.KeepCaches = False,
    label: loads.Label = None,
    resume: Annotated[
        str | None, typer.Option(help="Go on with a sweep that was interrupted.", show_default=False)
    ] = None,
    json: Json = False,
) -> None:  # fmt: skip
    """Measure a load at several levels: where it saturates, and the best goodput a GPU.

    Interrupted, it keeps every point it has, and goes on with --resume.
    """
    if resume is not None:
        run = Store().find(resume)
        if run.kind != "sweep" or run.state in ("running", "done"):
            raise PdctlError(f"{run.name} is no interrupted sweep ({run.kind}, {run.state})", "see pdctl runs ls")
        ground = Ground(**run.about["ground"])
        plan, workload = Plan.read(run.about["plan"]), run.workload
        processes, keep_caches = run.about["processes"], not run.about["caches_reset"]
    else:
        plan = _plan(concurrency, rate, policies, splits, repeats)
        ground = Ground(name, namespace, context, url, speed, policies is not None or splits is not None)
        with ground.first() as place:
            workload = workload_of(
                place, num_prompts, None, input_len=input_len, output_len=output_len, rate=None, burstiness=burstiness,
                ramp=None, trace=None, trace_speed=1.0, longest_input=None, turns=turns, shared_prefix=shared_prefix,
                think=think, abort=0.0, warmup=warmup, seed=seed, prompts=loads.Prompts.AUTO,
            )  # fmt: skip
            run = Store().new("sweep", label)
            run.begin(
                about("sweep", place, workload, repeats)
                | {
                    "slos": {one.metric: one.milliseconds for one in slos_of(slo)},
                    "points": [point.name for point in plan.points],
                    "over": plan.over,
                    "plan": plan.told(),
                    "ground": ground.told(),
                    "processes": processes,
                    "caches_reset": not keep_caches,
                }
            )
    try:
        if resume is not None:
            run.resume()
        _measure(run, plan, ground, workload, processes, keep_caches)
    except KeyboardInterrupt:
        run.end("partial")
        raise PdctlError(
            f"interrupted; {sum(len(point.finished) for point in run.points)} of "
            f"{len(plan.points) * plan.repeats} points are kept",
            f"go on with pdctl sweep --resume {run.name}",
            ExitCode.INTERRUPTED,
        ) from None
    except BaseException:
        run.end("failed")
        raise
    run.end("done")
    _show(run, plan, json)
    failed = sum(told["failed"] for point in run.points for told in point.results())
    if failed:
        raise PdctlError(f"{failed} requests failed", f"see pdctl runs show {run.name}/POINT for the reasons")


def _plan(concurrency: str | None, rate: str | None, policies: str | None, splits: str | None, repeats: int) -> Plan:
    if (concurrency is None) == (rate is None):
        raise PdctlError(
            "a sweep goes over one of concurrency and rate",
            "as in pdctl sweep --concurrency 1,2,4,8,16",
            ExitCode.USAGE,
        )
    over: Over = "concurrency" if concurrency is not None else "rate"
    try:
        levels = sorted({float(part) for part in (concurrency or rate or "").split(",")})
        pairs: list[tuple[int | None, int | None]] = [(None, None)]
        if splits is not None:
            pairs = [(int(p), int(d)) for p, _, d in (part.partition(":") for part in splits.split(","))]
        if levels[0] <= 0 or any(part is not None and part < 1 for pair in pairs for part in pair):
            raise ValueError
    except ValueError:
        raise PdctlError(
            "levels are numbers and splits are pairs of numbers", "as in --concurrency 1,2,4,8 --splits 1:3,2:2",
            ExitCode.USAGE,
        ) from None  # fmt: skip
    names: list[str | None] = [None]
    if policies is not None or splits is not None:
        names = [*(policies or "consistent_hash").split(",")]
        if unknown := [one for one in names if one not in POLICIES]:
            raise PdctlError(
                f"there is no policy {unknown[0]!r}", f"choose among {', '.join(POLICIES)}", ExitCode.USAGE
            )
        pairs = [(4, 4)] if splits is None else pairs
    return Plan(over, tuple(levels), tuple(Setting(p, d, one) for p, d in pairs for one in names), repeats)


@dataclass(frozen=True, slots=True)
class Ground:
    """On what a sweep is made.

    Args:
        name: a deployment on this machine.
        namespace: one on Kubernetes.
        context: of the kubeconfig.
        url: any server instead.
        speed: of simulated engines of its own.
        own: whether each setting brings up engines and a router of its own.
    """

    name: str | None
    namespace: str | None
    context: str | None
    url: str | None
    speed: float
    own: bool

    def told(self) -> dict[str, Any]:
        """Give it as JSON."""
        return {
            "name": self.name,
            "namespace": self.namespace,
            "context": self.context,
            "url": self.url,
            "speed": self.speed,
            "own": self.own,
        }

    @contextmanager
    def first(self) -> Iterator[Place]:
        """Give what is known before anything is brought up."""
        if self.own:
            settings = {"where": "local", "speed": self.speed}
            model = "meta-llama/Llama-3.1-8B-Instruct"
            yield Place("", model, settings=settings, served={"simulated": True})
        else:
            with placed(self.url, self.name, self.namespace, self.context) as place:
                yield place

    @contextmanager
    def place(self, setting: Setting, logs: Path) -> Iterator[Place]:
        """Bring a setting up."""
        if not self.own:
            with self.first() as place:
                yield place
            return
        assert setting.prefill is not None
        assert setting.decode is not None
        assert setting.policy is not None
        contender = Choice("ours", setting.policy)
        with (
            fleet(None, setting.prefill, setting.decode, self.speed, _say) as target,
            standing(contender, deployment.load(target.name), logs, _say) as router,
        ):
            yield place_of(contender, target, router.url, router.version)


def _measure(run: Run, plan: Plan, ground: Ground, workload: Workload, processes: int, keep_caches: bool) -> None:
    folder = run.folder / "points"
    finished = {one.name: Run(folder / one.name).finished for one in plan.points if Run(folder / one.name).exists}
    for repeat, setting, points in plan.left(finished):
        with ground.place(setting, run.folder / "logs" / (setting.name or "router")) as place:
            for one in points:
                point, sent = Run(folder / one.name), one.workload(workload)
                if not point.exists:
                    own = {
                        "slos": run.about["slos"],
                        "title": f"{setting.title}, {one.over} {one.at:g}",
                        "setting": setting.title,
                        "at": one.at,
                        "client": "pdctl",
                        "caches_reset": not keep_caches,
                    }
                    point.begin(about("bench", place, sent, plan.repeats) | own)
                what = f"{one.name} {repeat + 1}/{plan.repeats}"
                with counted(what, sent.num_prompts, sent.title()) as on_progress:
                    measure(point, sent, place, repeat, client_of(processes, None, keep_caches), on_progress)
                if len(point.finished) == plan.repeats:
                    point.end("done")


def _say(text: str) -> None:
    err.print(text, style="dim", soft_wrap=True)


def _show(run: Run, plan: Plan, json: bool) -> None:
    found = findings(plan, run.points)
    if json:
        print_json({
            "name": run.name, "simulated": run.simulated, "over": plan.over,
            "points": [{"name": point.name, "results": point.results()} for point in run.points],
            "findings": [{"setting": one.setting, "saturation": one.saturation, "best": one.best,
                          "best_per_gpu": one.best_per_gpu, "unit": one.unit} for one in found],
        })  # fmt: skip
    else:
        what = "SIMULATED engines, modelled on H200" if run.simulated else "measured"
        out.print(f"[bold]{what}[/]: {run.about['model']}", soft_wrap=True)
        out.print(points_table(run))
        for one in found:
            where = (
                f"from {plan.over} {one.saturation:g} on" if one.saturation else f"not reached at {plan.levels[-1]:g}"
            )
            out.print(
                f"{one.setting}: saturation {where}; best: {one.best_per_gpu:.3g} {one.unit}, at {one.best}",
                soft_wrap=True,
            )
    for point in run.points:
        for warning in worst(point.results()):
            err.print(f"[bold yellow]warning[/]: {point.name}: {warning}", soft_wrap=True)
    write(run, run.folder / "report.html")
    err.print(f"run: {run.name}   report: {run.folder / 'report.html'}", soft_wrap=True)
