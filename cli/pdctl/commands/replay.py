"""`pdctl replay`: what other policies, splits, sizes and loads would have made of a trace."""

from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import orjson
import typer

from pdctl.commands.options import Json
from pdctl.commands.virtual import (
    COLUMNS,
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
    numbers,
    parts,
    profile_of,
    simulated,
    splits,
    told_source,
)
from pdctl.console import err, out, print_json
from pdctl.errors import check_writable, writing
from pdctl.report.replayed import COMPARED, gathered, sentences
from pdctl.report.write import save
from pdctl.runs.setting import command
from pdrouter.policies import POLICIES
from pdsim.virtual.figures import Slo, over_seeds, ratio
from pdsim.virtual.fleet import Setup
from pdsim.virtual.judge import Case, Source


def replay(
    trace: Annotated[
        str, typer.Argument(help="A file (Mooncake or Bailian JSONL, BurstGPT or Azure CSV) or synthetic:SHAPE.")
    ],
    policy: Annotated[str, typer.Option(help="Policies, with commas, or `all`; PREFILL/DECODE for a pair of two.")] = (
        "llmd_pd_guide,pd_cost"
    ),
    split: Annotated[str, typer.Option(help="Prefill and decode engines, as 8:8,6:10.")] = "8:8",
    speed: Annotated[str, typer.Option(help="How many times quicker than recorded, as 1,4,6.")] = "1",
    baseline: Annotated[
        str | None, typer.Option(help="Policy to compare with.", show_default="the first of --policy")
    ] = None,
    seeds: Seeds = 3,
    part: Part = "0:1",
    sessions: Annotated[bool, typer.Option(help="Let requests name a session, taken from their content.")] = False,
    rate: Rate = 20.0,
    requests: Requests = 4000,
    kv_tokens: KvTokens = 0,
    gpu: Gpu = "h200",
    link_gbps: LinkGbps = 0.0,
    text: Text = False,
    slo_ttft: SloTtft = 2.0,
    slo_itl: SloItl = 0.025,
    jobs: Jobs = 1,
    report: Annotated[
        Path | None, typer.Option(help="Write a page there; .md is Markdown, else HTML.", show_default=False)
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Where all figures of all seeds go, as JSON.")] = None,
    json: Json = False,
) -> None:
    """Serve a trace by simulated fleets with other policies, splits and loads, and compare.

    All figures are simulated, in virtual time, by the timing model of the simulated engines.
    """
    check_writable(output, "--output")
    check_writable(report, "--report")
    names = list(POLICIES) if policy == "all" else [name.strip() for name in policy.split(",")]
    for name in {part for pair in [*names, *([baseline] if baseline else [])] for part in pair.split("/")}:
        known_policy(name)
    if baseline is not None and baseline not in names:
        names.insert(0, baseline)
    against = baseline or names[0]
    source = told_source(trace, parts(part), sessions, rate, requests)
    slo = Slo(slo_ttft, slo_itl)
    settings = list(product(splits(split), numbers(speed, "--speed"), names))
    cases = [
        Case(_setup(one, gpu, kv_tokens, text, link_gbps), source, seed, slo)
        for one in settings
        for seed in range(seeds)
    ]
    figures = simulated(cases, jobs)
    found = {one: figures[at * seeds : (at + 1) * seeds] for at, one in enumerate(settings)}
    told = _told(found, against, source, seeds, slo)
    if output is not None:
        runs = [{"split": f"{p}:{d}", "speed": s, "policy": n, "runs": runs} for ((p, d), s, n), runs in found.items()]
        with writing(output, "--output"):
            output.write_bytes(orjson.dumps(told | {"runs": runs}, option=orjson.OPT_INDENT_2))
    if report is not None:
        page = gathered(told, [*LABELS, *COLUMNS], _rows(told), _facts(gpu, kv_tokens, text, link_gbps), command())
        with writing(report, "--report"):
            save(page, report)
    if json:
        print_json(told)
        return
    _show(told, seeds)
    if report is not None:
        err.print(f"report: {report}", soft_wrap=True)


LABELS = ("engines", "speed", "policy")
Setting = tuple[tuple[int, int], float, str]


def _setup(one: Setting, gpu: str, kv_tokens: int, text: bool, link_gbps: float) -> Setup:
    (prefill, decode), speed, name = one
    first, _, second = name.partition("/")
    return Setup(
        prefill=prefill, decode=decode, prefill_policy=first, decode_policy=second, speed=speed, gpu=gpu,
        kv_tokens=kv_tokens, text=text, link=bytes_a_second(link_gbps),
    )  # fmt: skip


def _told(
    found: dict[Setting, list[dict[str, float]]], against: str, source: Source, seeds: int, slo: Slo
) -> dict[str, Any]:
    rows = []
    for (split, speed, name), runs in found.items():
        base = found[(split, speed, against)]
        row: dict[str, Any] = {"split": f"{split[0]}:{split[1]}", "speed": speed, "policy": name}
        row["figures"] = {key: interval(value) for key, value in over_seeds(runs).items()}
        if name != against:
            row["ratios"] = {key: interval(ratio(runs, base, key)) for key in COMPARED if all(b[key] for b in base)}
        rows.append(row)
    return {
        "simulated": True,
        "trace": source.name,
        "part": source.part,
        "seeds": seeds,
        "slo": {"ttft": slo.ttft, "itl": slo.itl},
        "baseline": against,
        "rows": rows,
    }


def _show(told: dict[str, Any], seeds: int) -> None:
    out.print(
        f"[bold]SIMULATED[/]: {told['trace']}, {seeds} seed{'s' * (seeds > 1)}; ± are 95 % intervals over seeds",
        soft_wrap=True,
    )
    table = figures_table(*LABELS)
    for row in _rows(told):
        table.add_row(*row)
    out.print(table)
    for text in sentences(told):
        out.print(text, soft_wrap=True)


def _rows(told: dict[str, Any]) -> list[list[str]]:
    return [[row["split"], f"{row['speed']:g}x", row["policy"], *cells(row["figures"])] for row in told["rows"]]


def _facts(gpu: str, kv_tokens: int, text: bool, link_gbps: float) -> list[tuple[str, str]]:
    profile = profile_of(gpu)
    link = f"ports of {link_gbps:g} Gbit/s" if link_gbps else "transfers as measured"
    prompts = "prompts as text" if text else "prompts as token ids"
    return [
        ("engines", f"timing profile {profile.name}, {kv_tokens or profile.kv_cache_tokens} KV tokens, {link}"),
        ("requests", prompts),
        ("versions", ", ".join(f"{name} {version(name)}" for name in ("pd-router", "pd-simulator"))),
    ]
