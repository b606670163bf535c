"""`pdctl plan`: how many prefill and decode engines a workload needs."""

from pathlib import Path
from typing import Annotated, Any

import typer

from pdctl.commands.options import Json
from pdctl.commands.virtual import (
    Gpu,
    Jobs,
    KvTokens,
    LinkGbps,
    Part,
    Rate,
    Requests,
    Seeds,
    SloItl,
    SloTtft,
    Text,
    bytes_a_second,
    cells,
    figures_table,
    interval,
    known_policy,
    parts,
    profile_of,
    simulated,
    told_source,
)
from pdctl.console import err, out, print_json
from pdctl.errors import PdctlError, check_writable, writing
from pdsim.virtual.figures import Slo, over_seeds
from pdsim.virtual.fleet import Setup
from pdsim.virtual.judge import Case
from pdsim.virtual.plan import Plan, Trial, make_plan

CHANGES = {
    "prefill": "one more prefill engine",
    "decode": "one more decode engine",
    "kv": "twice the KV cache",
    "link": "twice the network",
}


def plan(
    trace: Annotated[
        str, typer.Argument(help="A trace's file, or synthetic:SHAPE with --rate and lengths.")
    ] = "synthetic:uniform",
    slo_ttft: SloTtft = 2.0,
    slo_itl: SloItl = 0.025,
    share: Annotated[float, typer.Option(min=0.01, max=1, help="Share of requests that must meet both.")] = 0.95,
    rate: Rate = 20.0,
    input_len: Annotated[int, typer.Option(min=1, help="Tokens of a prompt of a synthetic shape.")] = 2000,
    output_len: Annotated[int, typer.Option(min=1, help="Tokens of an answer of a synthetic shape.")] = 300,
    requests: Requests = 2000,
    speed: Annotated[float, typer.Option(min=0.001, help="How many times quicker than in the trace.")] = 1.0,
    part: Part = "0:1",
    policy: Annotated[str, typer.Option(help="The router's policy.")] = "pd_cost",
    gpu: Gpu = "h200",
    kv_tokens: KvTokens = 0,
    link_gbps: LinkGbps = 0.0,
    text: Text = False,
    seeds: Seeds = 3,
    jobs: Jobs = 1,
    max_gpus: Annotated[int, typer.Option(min=2, help="No more engines than that.")] = 64,
    emit_values: Annotated[
        Path | None, typer.Option(help="Write the split as Helm values for charts/pd-engines.")
    ] = None,
    json: Json = False,
) -> None:
    """Find the fewest engines that serve a workload within promised times, by simulation.

    Says what to expect of them, where they saturate, and what to change first when more comes. All figures are
    simulated. Exit status 1 when --max-gpus is not enough.
    """
    check_writable(emit_values, "--emit-values")
    known_policy(policy)
    source = told_source(trace, parts(part), False, rate, requests, input_len, output_len)
    slo = Slo(slo_ttft, slo_itl)
    basis = Setup(
        prefill_policy=policy, speed=speed, gpu=gpu, kv_tokens=kv_tokens, text=text, link=bytes_a_second(link_gbps)
    )  # fmt: skip
    profile = profile_of(gpu)

    def tried(setup: Setup) -> Trial:
        figures = simulated([Case(setup, source, seed, slo) for seed in range(seeds)], jobs)
        err.print(
            f"tried {setup.prefill} + {setup.decode} at {setup.speed / speed:.2f} of the load: "
            f"{over_seeds(figures)['good_share'].mean:.1%} good", soft_wrap=True,
        )  # fmt: skip
        return Trial(setup, figures)

    found = make_plan(basis, source, slo, share, max_gpus, profile, tried)
    if found is None:
        within = f"{slo_ttft:g} s and {slo_itl * 1e3:g} ms"
        raise PdctlError(
            f"{max_gpus} engines do not serve {share:.0%} of the requests within {within}",
            "allow more by --max-gpus, promise less by --slo-ttft and --slo-itl, or look at pdctl replay for why",
        )
    if emit_values is not None:
        with writing(emit_values, "--emit-values"):
            _emit(emit_values, found, trace, slo, share)
    told = _told(found, trace, gpu, seeds, slo, share)
    if json:
        print_json(told)
    else:
        _show(told, found, emit_values)


def _told(found: Plan, trace: str, gpu: str, seeds: int, slo: Slo, share: float) -> dict[str, Any]:
    figures = over_seeds(found.best.figures)
    engines = found.best.setup.prefill + found.best.setup.decode
    return {
        "simulated": True,
        "trace": trace,
        "gpu": gpu,
        "seeds": seeds,
        "slo": {"ttft": slo.ttft, "itl": slo.itl, "share": share},
        "prefill": found.best.setup.prefill,
        "decode": found.best.setup.decode,
        "figures": {name: interval(one) for name, one in figures.items()},
        "output_rate_per_gpu": figures["output_rate"].mean / engines,
        "goodput_per_gpu": figures["goodput"].mean / engines,
        "saturates_at": found.saturates_at,
        "limit": found.limit,
        "changes": found.changes,
    }


def _show(told: dict[str, Any], found: Plan, emitted: Path | None) -> None:
    setup = found.best.setup
    out.print(
        f"[bold]SIMULATED[/]: {told['trace']} on {told['gpu']}: [bold]{setup.prefill} prefill + {setup.decode} decode "
        f"engines[/] ({setup.prefill_policy}); ± are 95 % intervals over {told['seeds']} seeds", soft_wrap=True,
    )  # fmt: skip
    table = figures_table()
    table.add_row(*cells(told["figures"]))
    out.print(table)
    figures = told["figures"]
    out.print(
        f"{figures['good_share']['mean']:.1%} of requests are good; {told['output_rate_per_gpu']:.0f} tokens/s and "
        f"{told['goodput_per_gpu']:.2f} good requests/s a GPU", soft_wrap=True,
    )  # fmt: skip
    out.print(f"saturates at {told['saturates_at']:.2f} times this load, by {found.limit}", soft_wrap=True)
    if found.changes:
        best = max(found.changes, key=lambda one: found.changes[one])
        gains = ", ".join(f"{CHANGES[one]} {share:.1%}" for one, share in found.changes.items())
        out.print(f"change first: {CHANGES[best]} (good requests at a fifth more than that: {gains})", soft_wrap=True)
    if emitted is not None:
        out.print(f"values: {emitted}", soft_wrap=True)


def _emit(path: Path, found: Plan, trace: str, slo: Slo, share: float) -> None:
    setup = found.best.setup
    path.write_text(
        f"# For charts/pd-engines, over values/llama31-8b.yaml.\n"
        f"# By pdctl plan (simulated): {trace} at {setup.speed:g}x,\n"
        f"# {share:.0%} of requests within {slo.ttft:g} s to the first token and {slo.itl * 1e3:g} ms between tokens.\n"
        f"prefill:\n  replicas: {setup.prefill}\ndecode:\n  replicas: {setup.decode}\n"
    )
