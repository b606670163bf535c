"""Options that say what load is made, shared by bench, compare and sweep."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from pdctl.bench.arrivals import Ramp
from pdctl.bench.measure import Client
from pdctl.bench.slo import Slo
from pdctl.bench.trace import Trace
from pdctl.bench.workload import Spelling, Workload
from pdctl.errors import ExitCode, PdctlError
from pdctl.runs.setting import Place

CONCURRENCY = 16

NumPrompts = Annotated[int, typer.Argument(min=1, help="Prompts in all.")]
Concurrency = Annotated[
    int | None,
    typer.Argument(min=1, help="Prompts (conversations) at once.", show_default="16; without bound by --rate, --trace"),
]
InputLen = Annotated[int, typer.Option(min=1, help="Tokens of each prompt, or that a user adds in each turn.")]
OutputLen = Annotated[int, typer.Option(min=1, help="Tokens that each request generates.")]
Rate = Annotated[
    float | None,
    typer.Option(min=0.001, help="Requests a second, whether earlier ones have ended or not.", show_default=False),
]
Burstiness = Annotated[
    float, typer.Option(min=0.001, help="Shape of the gaps' gamma distribution: 1 Poisson, less burstier, inf even.")
]
RampText = Annotated[
    str | None,
    typer.Option("--ramp", help="A rate that grows: linear:2:20 or exponential:2:20 (requests a second).",
                 show_default=False),
]  # fmt: skip
TraceFile = Annotated[
    Path | None,
    typer.Option("--trace", help="Send a Mooncake trace (JSON lines): its times, lengths and shared prefixes.",
                 show_default=False),
]  # fmt: skip
TraceSpeed = Annotated[float, typer.Option(min=0.001, help="How much faster than recorded the trace is sent.")]
LongestInput = Annotated[
    int | None, typer.Option(min=1, help="Leave out the trace's requests with more prompt tokens.", show_default=False)
]
Turns = Annotated[int, typer.Option(min=1, help="Turns of each conversation; each repeats those before it.")]
SharedPrefix = Annotated[int, typer.Option(min=0, help="Tokens that all prompts begin with.")]
Think = Annotated[float, typer.Option(min=0, help="Seconds between an answer and the next turn.")]
Abort = Annotated[float, typer.Option(min=0, max=1, help="Share of requests whose client leaves at a random token.")]
Warmup = Annotated[int, typer.Option(min=0, help="Requests sent before and not counted.")]
Repeats = Annotated[int, typer.Option(min=1, help="How often the load is sent; from 2 on there are intervals.")]
Processes = Annotated[int, typer.Option(min=1, help="Client processes.")]
Slos = Annotated[
    list[str] | None,
    typer.Option("--slo", help="Objective of a request in ms, such as ttft:300 or itl:30 (its p99); repeat for more.",
                 show_default=False),
]  # fmt: skip
Seed = Annotated[int, typer.Option(help="Seed of prompts, arrivals and aborts.")]
KeepCaches = Annotated[
    bool, typer.Option("--keep-caches", help="Do not empty the deployment's prefix caches before each repeat.")
]
Label = Annotated[str | None, typer.Option(help="Name of the run in the store.", show_default="the command's")]


class Prompts(StrEnum):
    """How prompts are written."""

    AUTO = "auto"
    TEXT = "text"
    IDS = "ids"


Spelled = Annotated[
    Prompts, typer.Option("--prompts", help="Prompts as text or token ids; auto: text for simulated engines.")
]


def workload_of(
    place: Place, num_prompts: int, concurrency: int | None, *, input_len: int, output_len: int, rate: float | None,
    burstiness: float, ramp: str | None, trace: Path | None, trace_speed: float, longest_input: int | None, turns: int,
    shared_prefix: int, think: float, abort: float, warmup: int, seed: int, prompts: Prompts,
) -> Workload:  # fmt: skip
    """Make the workload that the options describe.

    Raises:
        PdctlError: they contradict each other.
    """
    open_loop = rate is not None or ramp is not None or trace is not None
    if sum(given is not None for given in (rate, ramp, trace)) > 1:
        raise PdctlError("--rate, --ramp and --trace each say when requests come", "give one of them", ExitCode.USAGE)
    if trace is not None and (turns > 1 or shared_prefix):
        raise PdctlError("a trace has its own prompts", "leave --turns and --shared-prefix out", ExitCode.USAGE)
    if shared_prefix and shared_prefix >= input_len:
        raise PdctlError(
            f"a shared prefix of {shared_prefix} tokens leaves nothing of {input_len}",
            "make --input-len longer; it counts the shared prefix",
            ExitCode.USAGE,
        )
    # the simulated model's tokenizer is here; of another model it is not known which text makes how many tokens
    spelling: Spelling = (
        "ids" if prompts is Prompts.IDS or (prompts is Prompts.AUTO and not place.simulated) else "text"
    )
    return Workload(
        data="trace" if trace else "conversations" if turns > 1 else "random",
        num_prompts=num_prompts,
        input_len=input_len,
        output_len=output_len,
        concurrency=concurrency or (None if open_loop else CONCURRENCY),
        rate=rate,
        burstiness=burstiness,
        ramp=_ramp(ramp) if ramp else None,
        seed=seed,
        spelling=spelling,
        turns=turns,
        shared_prefix=shared_prefix,
        think_seconds=think,
        abort_share=abort,
        warmup=warmup,
        trace=trace.name if trace else None,
        trace_sha256=Trace.read(trace).sha256 if trace else None,
        trace_speed=trace_speed,
        longest_input=longest_input,
    )


def _ramp(text: str) -> Ramp:
    strategy, _, rates = text.partition(":")
    start, _, end = rates.partition(":")
    try:
        if strategy not in ("linear", "exponential") or float(start) <= 0 or float(end) <= 0:
            raise ValueError
    except ValueError:
        raise PdctlError(
            f"{text!r} is no ramp", "write linear:2:20 or exponential:2:20 (requests a second)", ExitCode.USAGE
        ) from None
    return Ramp(float(start), float(end), "linear" if strategy == "linear" else "exponential")


def slos_of(texts: list[str] | None) -> list[Slo]:
    """Read the objectives."""
    return [Slo.read(text) for text in texts or ()]


def client_of(processes: int, trace: Path | None, keep_caches: bool = False) -> Client:
    """Give how the load is made."""
    return Client(processes, trace.resolve() if trace else None, reset_caches=not keep_caches)
