"""`pdctl compare`: runs or evaluations side by side, or routers in turn before the same engines."""

import contextlib
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import orjson
import typer
from rich.table import Table

from pdctl import deployment
from pdctl.bench.measure import Progress as OnProgress
from pdctl.bench.measure import worst
from pdctl.bench.workload import Workload
from pdctl.commands import loads
from pdctl.commands.bench import about
from pdctl.commands.loads import client_of, slos_of, workload_of
from pdctl.commands.options import Context, Json, Namespace
from pdctl.commands.progress import counted
from pdctl.commands.router import LlmdEpp, LlmdSidecar
from pdctl.compare import in_cluster
from pdctl.compare.contender import contenders
from pdctl.compare.difference import Difference, check_alike
from pdctl.compare.live import compare as take_turns
from pdctl.compare.live import fleet
from pdctl.compare.told import Comparison, comparison, title
from pdctl.console import err, out, print_json
from pdctl.errors import ExitCode, PdctlError, check_writable, writing
from pdctl.evals import difference as scores
from pdctl.report.write import write
from pdctl.routers.choice import Choice
from pdctl.routers.programs import Programs
from pdctl.runs import Run, Store
from pdctl.runs.setting import Place
from pdctl.targets import KubernetesTarget, LocalTarget
from pdctl.targets.found import namespace_of


class Where(StrEnum):
    """Where engines are."""

    LOCAL = "local"
    CLUSTER = "cluster"


COLOURS = {"better": "green", "worse": "red"}


def compare(
    names: Annotated[
        list[str] | None,
        typer.Argument(help="Runs to compare with the first; with --routers: prompts and concurrency, such as 200 32.",
                       metavar="RUN RUN...", show_default=False),
    ] = None,
    routers: Annotated[
        str | None,
        typer.Option(help="Measure routers in turn: ours, vllm-router, llm-d, llm-d-pd-sample, llm-d-pd-guide, "
                     "llm-d-policies (ours with llm-d's policy); the first three perhaps with :POLICY.",
                     show_default=False),
    ] = None,
    llm_d_epp: LlmdEpp = None,
    llm_d_sidecar: LlmdSidecar = None,
    on: Annotated[
        Where, typer.Option(help="Where the engines are; local: simulated, on this machine; cluster: a deployment's.")
    ] = Where.LOCAL,
    namespace: Namespace = None,
    context: Context = None,
    name: Annotated[
        str | None,
        typer.Option("--name", help="A deployment whose engines are used.", show_default="engines of its own"),
    ] = None,
    prefill: Annotated[int, typer.Option(min=1, help="Prefill engines.")] = 8,
    decode: Annotated[int, typer.Option(min=1, help="Decode engines.")] = 8,
    speed: Annotated[float, typer.Option(min=0.01, help="How much faster than an H200 simulated engines run.")] = 1.0,
    input_len: loads.InputLen = 2000,
    output_len: loads.OutputLen = 2000,
    rate: loads.Rate = None,
    burstiness: loads.Burstiness = 1.0,
    trace: loads.TraceFile = None,
    trace_speed: loads.TraceSpeed = 1.0,
    longest_input: loads.LongestInput = None,
    turns: loads.Turns = 1,
    shared_prefix: loads.SharedPrefix = 0,
    think: loads.Think = 0.0,
    warmup: loads.Warmup = 8,
    repeats: loads.Repeats = 3,
    slo: loads.Slos = None,
    seed: loads.Seed = 0,
    processes: loads.Processes = 1,
    label: loads.Label = None,
    resume: Annotated[
        str | None, typer.Option(help="Go on with a comparison that was interrupted.", show_default=False)
    ] = None,
    report: Annotated[Path | None, typer.Option(help="Write the report there too.", show_default=False)] = None,
    json: Json = False,
) -> None:  # fmt: skip
    """Compare runs, or routers in turn before the same engines: changes with intervals, and whether they are noise.

    Loads that differ are refused.
    """
    if routers is None and resume is None:
        if report is not None:
            raise PdctlError("--report goes with --routers", "pdctl report RUN writes a run's page", ExitCode.USAGE)
        runs = [Store().find(one) for one in names or ()]
        if len(runs) > 1 and any(run.kind == "eval" for run in runs):
            _evaluations(runs, json)
            return
        if len(runs) == 1 and runs[0].kind == "compare":
            _show(comparison(runs[0].points, paired=True), json)
            return
        if len(runs) < 2:
            raise PdctlError(
                "a comparison needs two runs",
                "pdctl compare RUN RUN, or pdctl compare --routers ours,vllm-router 200 32",
                ExitCode.USAGE,
            )
        check_alike(runs)
        _show(comparison(runs), json)
        return
    check_writable(report, "--report")
    programs = Programs(llm_d_epp, llm_d_sidecar)
    if resume is not None:
        run = _resumed(resume)
        asked = run.about
        fleet_of, chosen = asked["wished_fleet"], [Choice(**one) for one in asked["contenders"]]
        workload, repeats = run.workload, asked["repeats"]
        trace = Path(asked["trace"]) if asked["trace"] else None
    else:
        assert routers is not None
        chosen = contenders(routers)
        fleet_of = {"name": name, "prefill": prefill, "decode": decode, "speed": speed}
        simulated = True
        if on is Where.CLUSTER:
            fleet_of, simulated = _deployed(namespace, context)
        elif any(one.router == "llm-d" for one in chosen):
            programs.found()  # before engines are started for nothing
        count, at_once = _numbers(names)
        workload = workload_of(
            Place("", "", served={"simulated": simulated}), count, at_once, input_len=input_len, output_len=output_len,
            rate=rate, burstiness=burstiness, ramp=None, trace=trace, trace_speed=trace_speed,
            longest_input=longest_input, turns=turns, shared_prefix=shared_prefix, think=think, abort=0.0,
            warmup=warmup, seed=seed, prompts=loads.Prompts.AUTO,
        )  # fmt: skip
        run = Store().new("compare", label)
    slos = {one.metric: one.milliseconds for one in slos_of(slo)} if resume is None else run.about["slos"]
    with _keeping(run), _engines(fleet_of) as target:
        if resume is None:
            place = Place(target.router_url, target.model, target, target.settings)
            run.begin(
                about("compare", place, workload, repeats)
                | {
                    "slos": slos,
                    "points": [one.name for one in chosen],
                    "contenders": [{"router": one.router, "policy": one.policy} for one in chosen],
                    "wished_fleet": fleet_of,
                    "trace": str(trace.resolve()) if trace else None,
                    "processes": processes,
                }
            )
        else:
            run.resume()
            processes = run.about["processes"]

        def about_point(contender: Choice, place: Place) -> dict[str, Any]:
            told = about("bench", place, workload, repeats)
            return told | {"slos": slos, "title": contender.title, "client": "pdctl", "caches_reset": True}

        with _Turns(run, workload, repeats) as progress:
            client = client_of(processes, trace)
            if isinstance(target, KubernetesTarget):
                in_cluster.compare(
                    run, about_point, chosen, lambda: KubernetesTarget(**fleet_of), workload, repeats, client,
                    programs, progress.begin, _say,
                )  # fmt: skip
            else:
                take_turns(
                    run, about_point, chosen, deployment.load(target.name), target, workload, repeats, client,
                    programs, progress.begin, _say,
                )  # fmt: skip
        run.end("done")
    _finish(run, report, json)


def _deployed(namespace: str | None, context: str | None) -> tuple[dict[str, Any], bool]:
    """Give which deployment on Kubernetes is meant, and whether its engines are simulated."""
    told: dict[str, Any] = {"namespace": namespace_of(namespace), "context": context}
    with KubernetesTarget(**told) as target:
        return told, target.simulated


@contextlib.contextmanager
def _engines(fleet_of: dict[str, Any]) -> Iterator[LocalTarget | KubernetesTarget]:
    """Give the engines that routers stand before."""
    if "namespace" in fleet_of:
        with KubernetesTarget(**fleet_of) as target:
            yield target
    else:
        with fleet(**fleet_of, say=_say) as local:
            yield local


def _evaluations(runs: list[Run], json: bool) -> None:
    """Compare the scores of evaluations with those of the first."""
    if strange := [run.name for run in runs if run.kind != "eval"]:
        raise PdctlError(f"{strange[0]} is no evaluation", "compare evaluations with each other", ExitCode.USAGE)
    scores.check_alike(runs)
    base = runs[0]
    found = [(other, scores.changes(base, other)) for other in runs[1:]]
    if json:
        print_json([scores.told(base, other, changes) for other, changes in found])
        return
    for other, changes in found:
        kinds = ["SIMULATED" if run.simulated else "measured" for run in (base, other)]
        models = [str(run.about["model"]) for run in (base, other)]
        out.print(f"\n[bold]{base.name}[/] ({kinds[0]}, {models[0]}) → [bold]{other.name}[/] ({kinds[1]}, {models[1]})",
                  soft_wrap=True)  # fmt: skip
        table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
        for column in ("TASK", "METRIC"):
            table.add_column(column)
        for column in ("BEFORE", "AFTER", "CHANGE ± STDERR", "ITEMS CHANGED"):
            table.add_column(column, justify="right", no_wrap=True)
        table.add_column("")
        for one in changes:
            metric = one.metric if one.filter == "none" else f"{one.metric}, {one.filter}"
            items = "" if one.samples is None else f"{one.changed} of {one.samples}"
            table.add_row(one.task, metric, f"{one.base:.4f}", f"{one.other:.4f}", one.told(), items,
                          _verdict(one.verdict or "no standard error"))  # fmt: skip
        out.print(table)


def _numbers(names: list[str] | None) -> tuple[int, int | None]:
    try:
        numbers = [int(one) for one in names or ()]
        if any(number < 1 for number in numbers) or len(numbers) > 2:
            raise ValueError
    except ValueError:
        raise PdctlError(
            f"{' '.join(names or ())!r} are not a number of prompts and a concurrency",
            "as in pdctl compare --routers ours,vllm-router 200 32",
            ExitCode.USAGE,
        ) from None
    return (numbers[0] if numbers else 200), (numbers[1] if len(numbers) > 1 else None)


def _resumed(name: str) -> Run:
    run = Store().find(name)
    if run.kind != "compare" or run.state in ("running", "done"):
        raise PdctlError(f"{run.name} is no interrupted comparison ({run.kind}, {run.state})", "see pdctl runs ls")
    return run


def _say(text: str) -> None:
    err.print(text, style="dim", soft_wrap=True)


@contextlib.contextmanager
def _keeping(run: Run) -> Iterator[None]:
    """Write down how it ended when it did not end well."""
    try:
        yield
    except KeyboardInterrupt:
        if not run.exists:
            raise
        run.end("partial")
        raise PdctlError(
            "interrupted; what was measured is kept",
            f"go on with pdctl compare --resume {run.name}, or see pdctl compare {run.name}",
            ExitCode.INTERRUPTED,
        ) from None
    except BaseException:
        if run.exists:
            run.end("failed")
        raise


class _Turns(contextlib.ExitStack):
    """Progress of one contender after the other."""

    def __init__(self, run: Run, workload: Workload, repeats: int) -> None:
        super().__init__()
        self._run, self._workload, self._repeats = run, workload, repeats

    def begin(self, contender: Choice, repeat: int) -> OnProgress:
        """End the progress before, begin another."""
        self.close()
        what = f"{contender.title} {repeat + 1}/{self._repeats}"
        return self.enter_context(counted(what, self._workload.num_prompts, self._workload.title()))


def _finish(run: Run, report: Path | None, json: bool) -> None:
    _show(comparison(run.points, paired=True), json)
    for point in run.points:
        for warning in worst(point.results()):
            err.print(f"[bold yellow]warning[/]: {point.name}: {warning}", soft_wrap=True)
    page = run.folder / "report.html"
    write(run, page)
    if report is not None:
        with writing(report, "--report"):
            write(run, report)
    err.print(f"run: {run.name}   report: {report or page}", soft_wrap=True)


def _show(told: Comparison, json: bool) -> None:
    if json:
        print_json(orjson.loads(orjson.dumps(told.told(), option=orjson.OPT_NON_STR_KEYS)))
        return
    kinds = {run.simulated for run in told.runs}
    what = "SIMULATED engines, modelled on H200" if kinds == {True} else "measured" if kinds == {False} else None
    out.print(f"[bold]{what or '[yellow]SIMULATED beside measured[/]'}[/]: {told.runs[0].workload.title()}",
              soft_wrap=True)  # fmt: skip
    names = {run.name: name_of(run) for run in told.runs}
    base = told.runs[0].name
    titles = {(effect.base, effect.other): effect.title for effect in told.effects}
    for run, found in zip(told.runs[1:], told.others, strict=True):
        _side_by_side(names[base], names[run.name], titles.get((base, run.name)), found)
    for effect in told.effects:
        if effect.base != base:  # those of the base were just shown
            _side_by_side(names[effect.base], names[effect.other], effect.title, effect.differences)
    if any(told.costs):
        _costs(told, names)
    if any(one.verdict == "one run each" for found in told.others for one in found):
        out.print("One run each cannot tell a difference from noise; measure with --repeats 3 or more.")


def _costs(told: Comparison, names: dict[str, str]) -> None:
    """Print what the routers themselves took, and what went wrong."""
    out.print("\n[bold]the routers themselves[/] (measured, not simulated)")
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("")
    for column in ("CPU ms a request", "resident MB", "failed", "breaches"):
        table.add_column(column, justify="right")
    for run, one in zip(told.runs, told.costs, strict=True):
        if one is not None:
            shown = (one.cpu_text(), f"{one.resident_mb:.0f}", str(one.failed), str(sum(one.violations.values())))
            table.add_row(names[run.name], *shown)
    out.print(table)


def _side_by_side(base: str, other: str, effect: str | None, found: list[Difference]) -> None:
    """Print two runs beside each other, and what alone differs between them."""
    out.print(f"\n[bold]{base}[/] → [bold]{other}[/]", soft_wrap=True)
    if effect:
        out.print(effect, style="dim", soft_wrap=True)
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("")
    for column in ("before", "after", "change (95 %)"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("")
    for one in found:
        row = (title(one.metric), f"{one.base:.2f}", f"{one.other:.2f}", one.told(), _verdict(one.verdict))
        table.add_row(*row)
    out.print(table)


def name_of(run: Run) -> str:
    """Give what tables call a run."""
    return str(run.about.get("title") or run.name)


def _verdict(verdict: str) -> str:
    return f"[{COLOURS.get(verdict, 'dim')}]{verdict}[/]"
