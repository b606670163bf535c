"""`pdctl bench`: a load, the table, the JSON, a run in the store."""

import re
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import orjson
import typer

from pdctl.bench import caches, in_pod, vllm
from pdctl.bench.caches import CachesKeptError
from pdctl.bench.measure import Client, measure, warnings
from pdctl.bench.repeats import spread
from pdctl.bench.result import table
from pdctl.bench.workload import Workload
from pdctl.cluster.detached import GoneError
from pdctl.commands import loads
from pdctl.commands.loads import client_of, slos_of, workload_of
from pdctl.commands.options import Context, Json, Name, Namespace
from pdctl.commands.progress import counted
from pdctl.console import err, out, print_json
from pdctl.errors import ExitCode, PdctlError, check_writable, writing
from pdctl.runs import Run, Store
from pdctl.runs.setting import Place, command, machine, placed, versions
from pdctl.targets import KubernetesTarget, Target


class Generator(StrEnum):
    """Who makes the load."""

    PDCTL = "pdctl"
    VLLM = "vllm"


def bench(
    here: typer.Context,
    num_prompts: loads.NumPrompts = 100,
    concurrency: loads.Concurrency = None,
    input_len: loads.InputLen = 2000,
    output_len: loads.OutputLen = 2000,
    rate: loads.Rate = None,
    burstiness: loads.Burstiness = 1.0,
    ramp: loads.RampText = None,
    trace: loads.TraceFile = None,
    trace_speed: loads.TraceSpeed = 1.0,
    longest_input: loads.LongestInput = None,
    turns: loads.Turns = 1,
    shared_prefix: loads.SharedPrefix = 0,
    think: loads.Think = 0.0,
    abort: loads.Abort = 0.0,
    warmup: loads.Warmup = 0,
    repeats: loads.Repeats = 1,
    slo: loads.Slos = None,
    name: Name = None,
    namespace: Namespace = None,
    context: Context = None,
    url: Annotated[str | None, typer.Option(help="Any OpenAI server instead of a deployment.")] = None,
    model: Annotated[str | None, typer.Option(help="Served model name.", show_default="what the server serves")] = None,
    seed: loads.Seed = 0,
    prompts: loads.Spelled = loads.Prompts.AUTO,
    client: Annotated[
        Generator | None,
        typer.Option(
            help="Who makes the load; vllm: the real vllm bench serve: in a cluster within an engine's pod, where it "
            "goes on whatever becomes of the connection; here by PDCTL_VLLM or from PATH.",
            show_default="vllm before real engines in a cluster, else pdctl",
        ),
    ] = None,
    attach: Annotated[
        bool,
        typer.Option("--attach", help="Go back to what goes on in a cluster: the newest such run, or that of --label."),
    ] = False,
    tokenizer: Annotated[
        str | None, typer.Option(help="Tokenizer for --client vllm.", show_default="the served model's")
    ] = None,
    processes: loads.Processes = 1,
    keep_caches: loads.KeepCaches = False,
    label: loads.Label = None,
    output: Annotated[Path | None, typer.Option(help="Write the JSON there too.", show_default=False)] = None,
    json: Json = False,
) -> None:
    """Send prompts, so many at once or so many a second, and print what `vllm bench serve` prints.

    Exit status 1 when a request failed. Interrupted, it reports what it has; within a cluster it goes on, see --attach.
    """
    check_writable(output, "--output")
    if attach:
        _attach(label, output, json)
        return
    slos = slos_of(slo)
    # The deployment is reached until the command ends.
    place = here.with_resource(placed(url, name, namespace, context, model))
    workload = workload_of(
        place, num_prompts, concurrency, input_len=input_len, output_len=output_len, rate=rate, burstiness=burstiness,
        ramp=ramp, trace=trace, trace_speed=trace_speed, longest_input=longest_input, turns=turns,
        shared_prefix=shared_prefix, think=think, abort=abort, warmup=warmup, seed=seed, prompts=prompts,
    )  # fmt: skip
    away = isinstance(place.target, KubernetesTarget)
    client = client or (Generator.VLLM if away and not place.simulated else Generator.PDCTL)
    away = away and client is Generator.VLLM
    if client is Generator.VLLM:
        vllm.arguments(workload, place.url, place.model, tokenizer or place.model, seed)
        if not away:
            vllm.program()
    emptied = not keep_caches and place.target is not None and _emptied(place.target)
    run = Store().new("bench", label)
    run.begin(
        about("bench", place, workload, repeats)
        | {
            "slos": {one.metric: one.milliseconds for one in slos},
            "client": client.value,
            "processes": processes,
            "caches_reset": emptied,
        }
    )
    if away:
        assert isinstance(place.target, KubernetesTarget)
        _within(run, place.target, tokenizer)
        told = _finish(run, output, json)
        judge(told, place)
        return
    interrupted = False
    try:
        for repeat in range(repeats):
            once(run, workload, place, repeat, client_of(processes, trace, not emptied), client, tokenizer)
    except KeyboardInterrupt:
        interrupted = True
    except BaseException:
        run.end("failed")
        raise
    run.end("partial" if interrupted else "done")
    told = _finish(run, output, json)
    if interrupted:
        raise PdctlError(
            f"interrupted after {len(run.records())} of {num_prompts * repeats} requests; these figures are partial",
            f"they are kept as {run.name}; run the command again for a whole run",
            ExitCode.INTERRUPTED,
        )
    judge(told, place)


def _emptied(target: Target) -> bool:
    """Empty prefix caches, or say why they are as they are."""
    try:
        caches.reset(target)
    except CachesKeptError as error:
        err.print(f"[bold yellow]note[/]: {error.cause}; {error.next_step}", soft_wrap=True)
        return False
    return True


def _finish(run: Run, output: Path | None, json: bool) -> list[dict[str, Any]]:
    told = run.results()
    if output:
        with writing(output, "--output"):
            output.write_bytes(orjson.dumps(told[0] if len(told) == 1 else told))
    show(run, json)
    return told


def _within(run: Run, target: KubernetesTarget, tokenizer: str | None) -> None:
    """Start `vllm bench serve` in an engine's pod and follow it."""
    try:
        in_pod.start(run, target, tokenizer, say)
    except KeyboardInterrupt:
        if run.away:  # it may have been started
            raise _goes_on(run) from None
        run.end("failed")
        raise
    except BaseException:  # refused: nothing runs there
        run.end("failed")
        raise
    _follow(run, target)


def _follow(run: Run, target: KubernetesTarget) -> None:
    asked = run.workload.num_prompts * run.about["repeats"]
    with counted(run.name, asked, f"{run.workload.title()}, within {run.about['pod']}") as on_progress:
        try:
            in_pod.follow(run, target, on_progress, say)
        except KeyboardInterrupt:
            raise _goes_on(run) from None
        except (GoneError, vllm.FailedError):
            run.end("failed")
            raise
        except PdctlError as error:  # whatever it is, what runs there knows nothing of it
            error.next_step += f"; come back to {run.name}: pdctl bench --attach; end it: pdctl runs stop {run.name}"
            raise
    run.end("done")


def _goes_on(run: Run) -> PdctlError:
    return PdctlError(
        f"{run.name} goes on in {run.about['pod']}",
        f"come back to it: pdctl bench --attach; end it: pdctl runs stop {run.name}",
        ExitCode.INTERRUPTED,
    )


def _attach(label: str | None, output: Path | None, json: bool) -> None:
    """Follow a run that goes on in a cluster.

    Raises:
        PdctlError: there is none.
    """
    store = Store()
    there = [run for run in ([store.find(label)] if label else store.all()) if run.state == "detached"]
    there = there if label else [run for run in there if run.kind == "bench"]
    if not there:
        raise PdctlError(
            f"{label or 'no run'} goes on in a cluster without a command that follows it", "see pdctl runs ls"
        )
    run = there[-1]
    with KubernetesTarget(**run.about["deployment"]) as target:
        run.resume()
        _follow(run, target)
        told = _finish(run, output, json)
        judge(told, Place("", run.about["model"], target))


def say(text: str) -> None:
    """Say what the user need not read."""
    err.print(text, style="dim", soft_wrap=True)


def about(kind: str, place: Place, workload: Workload, repeats: int) -> dict[str, Any]:
    """Give what a run writes down when it begins."""
    return {
        "kind": kind,
        "command": command(),
        "versions": versions(),
        "machine": machine(),
        "workload": workload.told(),
        "repeats": repeats,
        **place.told(),
    }


def once(
    run: Run, workload: Workload, place: Place, repeat: int, client: Client, generator: Generator, tokenizer: str | None
) -> None:
    """Measure one repeat with its progress on the terminal."""
    repeats = run.about["repeats"]
    what = run.name if repeats == 1 else f"{run.name} {repeat + 1}/{repeats}"
    with counted(what, workload.num_prompts, f"{workload.title()}, against {place.url}") as on_progress:
        if generator is Generator.VLLM:
            vllm.measure(run, workload, place, repeat, tokenizer, on_progress)
        else:
            measure(run, workload, place, repeat, client, on_progress)


def show(run: Run, json: bool) -> None:
    """Print a run's tables, or its JSON, and where it is kept."""
    told = run.results()
    if json:
        print_json(told[0] if len(told) == 1 else told)
    else:
        what = "SIMULATED engines, modelled on H200" if run.simulated else "measured"
        partial = any(one["pdctl"].get("partial") for one in told)
        out.print(
            f"[bold]{what}[/]: {run.about['model']}, {run.workload.title()}{' — PARTIAL' * partial}", soft_wrap=True
        )
        for one in told[-1:]:
            print(table(one))
        if len(told) > 1:
            print(spread(told))
        for one in told[-1:]:
            for line in _ours(one):
                out.print(line, soft_wrap=True)
    err.print(f"run: {run.name}   pdctl report {run.name}", soft_wrap=True)
    for one in told:
        for warning in warnings(one):
            err.print(f"[bold yellow]warning[/]: {warning}", soft_wrap=True)


def _ours(told: dict[str, Any]) -> list[str]:
    """Say what vLLM's table has no line for."""
    ours, lines = told["pdctl"], []
    if ours.get("slos") and ours.get("slo_attainment") is not None:
        wished = ", ".join(f"{metric} ≤ {limit:g} ms" for metric, limit in ours["slos"].items())
        lines.append(f"{ours['slo_attainment']:.1%} of requests met {wished}")
    if ours.get("aborted"):
        lines.append(f"{ours['aborted']} requests were left by their client, as asked; they are in no figure above")
    if stretch := ours.get("stretch"):
        lines.append(f"simulated decode steps took {stretch:.3f} times their modelled length")
    return lines


def judge(told: list[dict[str, Any]], place: Place) -> None:
    """Fail when a request failed.

    Raises:
        PdctlError: at least one did.
    """
    failed = sum(one["failed"] for one in told)
    if not failed:
        return
    reasons: dict[str, int] = {}
    for one in told:
        for reason, count in one["pdctl"]["errors"].items():
            alike = re.sub(r"[0-9a-f]{8,}", "…", reason)
            reasons[alike] = reasons.get(alike, 0) + count
    evidence = [f"{count} x {reason}" for reason, count in sorted(reasons.items(), key=lambda item: -item[1])[:5]]
    flags = place.target.flags if place.target else None
    raise PdctlError(
        f"{failed} of {sum(one['completed'] for one in told) + failed} requests failed",
        "look at the server's log" if flags is None else f"look at pdctl status and pdctl logs{flags}",
        evidence=evidence,
    )
