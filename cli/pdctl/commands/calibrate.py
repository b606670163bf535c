"""`pdctl calibrate`: measure an engine and fit a timing profile."""

import asyncio
import random
import statistics
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import httpx
import orjson
import typer
from rich.table import Table

from pdctl.commands.options import Json
from pdctl.commands.virtual import Gpu, profile_of
from pdctl.console import err, out, print_json
from pdctl.errors import PdctlError, check_writable, writing
from pdsim.timing.calibrate import Measured, fit

LENGTHS = (256, 1024, 2048, 4096, 8192, 16384)
BATCHES = ((1, 500), (16, 500), (64, 500), (1, 4000), (16, 4000), (48, 4000))
REPEATS = 3
SETTLED = 16  # tokens after which a batch is thought to be complete
TOKENS = 64


def calibrate(
    url: Annotated[str, typer.Argument(help="A vLLM engine without other load (not a router).")],
    output: Annotated[Path, typer.Option(help="Where the profile goes: --gpu FILE of replay, plan and tune.")] = Path(
        "profile.json"
    ),
    model: Annotated[str | None, typer.Option(help="Served model name.", show_default="what the server serves")] = None,
    gpu: Gpu = "h200",
    kv_tokens: Annotated[int, typer.Option(min=0, help="Tokens of its KV cache; 0: as --gpu.")] = 0,
    longest: Annotated[int, typer.Option(min=256, help="Longest prompt to send.")] = 16384,
    json: Json = False,
) -> None:
    """Measure prefill by length and times between tokens by batch, and fit the timing model to them.

    Transfers and frontends stay as in the profile named by --gpu. Takes a minute or two.
    """
    check_writable(output, "--output")
    basis = profile_of(gpu)
    base = url.rstrip("/").removesuffix("/v1")
    try:
        measured = asyncio.run(_measure(base, model, longest))
    except (httpx.HTTPError, httpx.InvalidURL, LookupError, ValueError) as error:
        raise PdctlError(
            f"{base} could not be measured: {error or type(error).__name__}",
            "check that a vLLM engine answers there and nothing else uses it",
        ) from error
    profile = fit(measured, basis, output.stem)
    coefficients = {name: value for name, value in asdict(profile).items() if name != "name"}
    if kv_tokens:
        coefficients["kv_cache_tokens"] = kv_tokens
    points = [{"name": one.name, "measured": one.seconds, "model": one.model(profile)} for one in measured]
    provenance = {"url": base, "date": time.strftime("%Y-%m-%d"), "basis": gpu, "points": points}
    told: dict[str, Any] = {"provenance": provenance, "model": coefficients}
    with writing(output, "--output"):
        output.write_bytes(orjson.dumps(told, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))
    if json:
        print_json(told)
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("point")
    for name in ("measured ms", "model ms", "error"):
        table.add_column(name, justify="right")
    for one in measured:
        fitted = one.model(profile)
        table.add_row(one.name, f"{one.seconds * 1e3:.2f}", f"{fitted * 1e3:.2f}", f"{fitted / one.seconds - 1:+.1%}")
    out.print(table)
    worst = max(abs(one.model(profile) / one.seconds - 1) for one in measured)
    out.print(f"largest error {worst:.1%}; profile: {output}", soft_wrap=True)


async def _measure(base: str, model: str | None, longest: int) -> list[Measured]:
    draw = random.Random(time.time_ns())  # other prompts each time: the prefix cache knows those of the last run
    found = []
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=base, timeout=300, limits=limits) as client:
        if model is None:
            answer = await client.get("/v1/models")
            answer.raise_for_status()
            model = str(answer.json()["data"][0]["id"])
        common = {"model": model, "temperature": 0, "ignore_eos": True}

        def ids(count: int) -> list[int]:
            return [draw.randrange(300, 8000) for _ in range(count)]

        async def whole(tokens: int) -> float:
            begin = time.perf_counter()
            answer = await client.post("/v1/completions", json=common | {"prompt": ids(tokens), "max_tokens": 1})
            answer.raise_for_status()
            return time.perf_counter() - begin

        async def gaps(tokens: int) -> list[float]:
            body = common | {"prompt": ids(tokens), "max_tokens": TOKENS, "stream": True}
            times = []
            async with client.stream("POST", "/v1/completions", json=body) as answer:
                answer.raise_for_status()
                async for line in answer.aiter_lines():
                    if line.startswith("data: {"):
                        times.append(time.perf_counter())
            return [after - before for before, after in zip(times[SETTLED:], times[SETTLED + 1 :], strict=False)]

        await whole(128)
        for length in LENGTHS:
            if length <= longest:
                seconds = statistics.median([await whole(length) for _ in range(REPEATS)])
                found.append(Measured(seconds, prompt=length))
                err.print(f"prefill of {length} tokens: {seconds * 1e3:.1f} ms")
        for batch, context in BATCHES:
            if context + TOKENS <= longest:
                told = await asyncio.gather(*(gaps(context) for _ in range(batch)))
                # Streams begin one after the other while prompts are computed; the last third has all of them.
                seconds = statistics.median(gap for one in told for gap in one[len(one) // 3 :])
                found.append(Measured(seconds, batch=batch, context=context + (TOKENS + SETTLED) // 2))
                err.print(f"{batch} answers behind {context} tokens: {seconds * 1e3:.2f} ms between tokens")
    return found
