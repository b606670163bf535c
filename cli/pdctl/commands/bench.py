"""`pdctl bench`: a load, the table, the JSON."""

import asyncio
import contextlib
import os
import platform
import re
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import httpx
import numpy as np
import orjson
import typer
import uvloop
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from pdctl.bench.client import Record
from pdctl.bench.load import Outcome, Workload, run
from pdctl.bench.prompts import random_ids, random_texts
from pdctl.bench.result import result, table
from pdctl.commands.options import Context, Json, Name, Namespace
from pdctl.console import err, out, print_json
from pdctl.errors import ExitCode, PdctlError
from pdctl.targets import Health, Target, find

STRETCH_LIMIT = 1.10
LAG_LIMIT_SECONDS = 0.010


def bench(
    num_prompts: Annotated[int, typer.Argument(min=1, help="Prompts in all.")] = 100,
    concurrency: Annotated[int, typer.Argument(min=1, help="Prompts at once.")] = 16,
    input_len: Annotated[int, typer.Option(min=1, help="Tokens of each prompt.")] = 2000,
    output_len: Annotated[int, typer.Option(min=1, help="Tokens that each request generates.")] = 2000,
    name: Name = None,
    namespace: Namespace = None,
    context: Context = None,
    url: Annotated[str | None, typer.Option(help="Any OpenAI server instead of a deployment.")] = None,
    model: Annotated[str | None, typer.Option(help="Served model name.", show_default="what the server serves")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the random prompts.")] = 0,
    output: Annotated[
        Path | None, typer.Option(help="Where the JSON goes.", show_default="a name as vllm bench gives it, here")
    ] = None,
    json: Json = False,
) -> None:
    """Send random prompts, so many at once, and print what `vllm bench serve` prints.

    Exit status 1 when a request failed.
    """
    with contextlib.ExitStack() as held:
        target = None if url else find(name, namespace, context)
        if target is not None:
            held.callback(target.close)
        base = url or (held.enter_context(target.reached()) if target is not None else "")
        _bench(
            base.rstrip("/").removesuffix("/v1"), target, num_prompts, concurrency, input_len, output_len, model, seed,
            output, json,
        )  # fmt: skip


def _bench(
    base: str, target: Target | None, num_prompts: int, concurrency: int, input_len: int, output_len: int,
    model: str | None, seed: int, output: Path | None, json: bool,
) -> None:  # fmt: skip
    served = model or _served(base)
    simulated = target is not None and target.simulated
    make = random_texts if simulated else random_ids
    workload = Workload(base, served, make(num_prompts, input_len, seed), output_len, concurrency)
    before = [] if target is None else target.health()
    outcome = Outcome()
    interrupted = False
    try:
        _run(workload, outcome)
    except KeyboardInterrupt:
        interrupted = True
    extra: dict[str, Any] = {
        "input_len": input_len,
        "output_len": output_len,
        "seed": seed,
        "partial": interrupted,
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "url": base,
        "errors": Counter(record.error for record in outcome.records if not record.ok),
    }
    told = result(workload, outcome, simulated=simulated, extra=extra)
    path = output or Path(
        f"openai-infqps-concurrency{concurrency}-{re.sub(r'[^A-Za-z0-9.]+', '-', served)}-{told['date']}.json"
    )
    path.write_bytes(orjson.dumps(told))
    if json:
        print_json(told)
    else:
        what = "SIMULATED engines, modelled on H200" if simulated else "measured"
        out.print(
            f"[bold]{what}[/]: {served}, {input_len} tokens in, {output_len} out{' — PARTIAL' * interrupted}",
            soft_wrap=True,
        )
        print(table(told))
    err.print(f"result: {path}", soft_wrap=True)
    _warn(before, [] if target is None else target.health(), outcome)
    if interrupted:
        raise PdctlError(
            f"interrupted after {len(outcome.records)} of {num_prompts} requests; these figures are partial",
            "run the command again for a whole run",
            ExitCode.INTERRUPTED,
        )
    if told["failed"]:
        reasons = [f"{count} x {reason}" for reason, count in extra["errors"].most_common(5)]
        raise PdctlError(f"{told['failed']} of {num_prompts} requests failed", _after_failure(target), evidence=reasons)


def _after_failure(target: Target | None) -> str:
    return "look at the server's log" if target is None else f"look at pdctl status and pdctl logs{target.flags}"


def _served(base: str) -> str:
    try:
        answer = httpx.get(base + "/v1/models", timeout=10)
        answer.raise_for_status()
        served: str = answer.json()["data"][0]["id"]
    except (httpx.HTTPError, ValueError, LookupError, TypeError) as error:
        raise PdctlError(
            f"{base}/v1/models does not tell a model: {error}",
            "check that the server runs, or name the model by --model",
        ) from error
    return served


def _run(workload: Workload, outcome: Outcome) -> None:
    total = len(workload.prompts)
    columns = (
        TextColumn("bench"),
        BarColumn(30),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[failed]}"),
    )
    with Progress(*columns, console=err, disable=not err.is_terminal, refresh_per_second=4) as progress:
        task = progress.add_task("bench", total=total, failed="")
        if not err.is_terminal:
            err.print(f"bench: {total} prompts, {workload.concurrency} at once, against {workload.url}", soft_wrap=True)

        def on_done(record: Record) -> None:
            failed = sum(not one.ok for one in outcome.records)
            progress.update(task, advance=1, failed=f"{failed} failed" if failed else "")

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(run(workload, outcome, on_done))


def _warn(before: list[Health], after: list[Health], outcome: Outcome) -> None:
    """Say it when this machine was too slow for what it simulated or measured."""
    stretch = _stretch(before, after)
    if stretch > STRETCH_LIMIT:
        err.print(
            f"[bold yellow]warning[/]: this machine was too slow: decode steps took {stretch:.2f} times their "
            "modelled length; use fewer engines, less load, or a lower --speed",
            soft_wrap=True,
        )
    elif stretch:
        err.print(f"simulated decode steps took {stretch:.3f} times their modelled length: the machine kept up")
    if outcome.lags and (lag := float(np.percentile(outcome.lags, 99))) > LAG_LIMIT_SECONDS:
        err.print(
            f"[bold yellow]warning[/]: the load generator itself was late by {lag * 1e3:.0f} ms (p99); "
            "first-token and inter-token times include that",
            soft_wrap=True,
        )


def _stretch(before: list[Health], after: list[Health]) -> float:
    """Give real over modelled time of the decode steps between two looks; 0 when there were none."""

    def total(parts: list[Health], key: str) -> float:
        return sum(float(part.details["clock"][key]) for part in parts if "clock" in part.details)

    modelled = total(after, "decode_modelled_seconds") - total(before, "decode_modelled_seconds")
    return (total(after, "decode_seconds") - total(before, "decode_seconds")) / modelled if modelled > 0 else 0.0
