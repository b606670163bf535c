"""`pdctl tune`: policy and split for the engines that are there, by recorded traffic."""

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
    simulated,
    splits,
    told_source,
)
from pdctl.console import err, out, print_json
from pdsim.virtual.figures import Slo, over_seeds, ratio
from pdsim.virtual.fleet import Setup
from pdsim.virtual.judge import Case
from pdsim.virtual.plan import Trial
from pdsim.virtual.tune import tune as find

TRIED = ("consistent_hash", "cache_aware", "kv_aware", "llmd_pd_guide", "pd_cost")


def tune(
    trace: Annotated[
        str, typer.Argument(help="A recording (pd-router --record-dir), a trace's file, or synthetic:SHAPE.")
    ],
    split: Annotated[str, typer.Option(help="Prefill and decode engines as they are now.")] = "8:8",
    policy: Annotated[str, typer.Option(help="The router's policy as it is now.")] = "consistent_hash",
    speed: Annotated[float, typer.Option(min=0.001, help="How many times quicker than recorded.")] = 1.0,
    part: Part = "0:1",
    rate: Rate = 20.0,
    requests: Requests = 2000,
    slo_ttft: SloTtft = 2.0,
    slo_itl: SloItl = 0.025,
    gpu: Gpu = "h200",
    kv_tokens: KvTokens = 0,
    link_gbps: LinkGbps = 0.0,
    text: Text = False,
    seeds: Seeds = 3,
    jobs: Jobs = 1,
    json: Json = False,
) -> None:
    """Propose a policy and a split of as many engines, with the gain to expect. All figures are simulated."""
    known_policy(policy)
    source = told_source(trace, parts(part), False, rate, requests)
    prefill, decode = splits(split)[0]
    current = Setup(
        prefill=prefill, decode=decode, prefill_policy=policy, speed=speed, gpu=gpu, kv_tokens=kv_tokens, text=text,
        link=bytes_a_second(link_gbps),
    )  # fmt: skip
    slo = Slo(slo_ttft, slo_itl)

    def tried(setup: Setup) -> Trial:
        figures = simulated([Case(setup, source, seed, slo) for seed in range(seeds)], jobs)
        trial = Trial(setup, figures)
        err.print(
            f"tried {setup.prefill}:{setup.decode} {setup.prefill_policy}: {trial.mean('good_share'):.1%} good, "
            f"mean TTFT {trial.mean('ttft_mean'):.3f} s", soft_wrap=True,
        )  # fmt: skip
        return trial

    now, best = find(current, TRIED, tried)
    told = {
        "simulated": True,
        "trace": trace,
        "seeds": seeds,
        "now": _told(now),
        "best": _told(best),
        "ratios": {
            name: interval(ratio(best.figures, now.figures, name)) for name in ("ttft_mean", "ttft_p99", "itl_mean")
        },
    }
    if json:
        print_json(told)
    else:
        _show(told)


def _told(trial: Trial) -> dict[str, Any]:
    figures = over_seeds(trial.figures)
    return {
        "split": f"{trial.setup.prefill}:{trial.setup.decode}",
        "policy": trial.setup.prefill_policy,
        "figures": {name: interval(one) for name, one in figures.items()},
    }


def _show(told: dict[str, Any]) -> None:
    out.print(f"[bold]SIMULATED[/]: {told['trace']}; ± are 95 % intervals over {told['seeds']} seeds", soft_wrap=True)
    table = figures_table("", "engines", "policy")
    for name in ("now", "best"):
        one = told[name]
        table.add_row(name, one["split"], one["policy"], *cells(one["figures"]))
    out.print(table)
    now, best = told["now"], told["best"]
    if (now["split"], now["policy"]) == (best["split"], best["policy"]):
        out.print("nothing better was found: stay as you are")
        return
    changes = {"mean TTFT": "ttft_mean", "p99 TTFT": "ttft_p99", "mean ITL": "itl_mean"}
    said = ", ".join(f"{name} {(told['ratios'][key]['mean'] - 1) * 100:+.0f} %" for name, key in changes.items())
    good = " -> ".join(f"{one['figures']['good_share']['mean']:.1%}" for one in (now, best))
    prefill, decode = best["split"].split(":")
    out.print(
        f"change to --policy {best['policy']} with {prefill} prefill and {decode} decode engines: {said}; "
        f"good requests {good}",
        soft_wrap=True,
    )
