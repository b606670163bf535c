"""The fairness sheet: what routers that took turns had in common, and every difference that was left."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pdctl.deployment import Member
from pdctl.routers.choice import Choice
from pdctl.runs.run import Run
from pdrouter.policies import READ_METRICS

RANDOM_PROMPTS = (
    "Prompts are random and share nothing: what a policy gains by sending prompts to engines that know their beginning "
    "cannot show here, only what it costs. Measure with --trace, --turns or --shared-prefix for that."
)
_BUSY = (
    "The machine was busy before this began: {load:.0f} processes wanted its {cores} cores. A router of several "
    "processes then waits for a core at each of them, so latencies are more about the machine than about routers. "
    "Processor time a request is not."
)
_COMMON = (
    "the engines: the same processes, started once, never restarted; decode engines answer on localhost too",
    "the client, its prompts, their order and seeds: each repeat has prompts of its own, the same for every router",
    "turns: each repeat has every router once, and another one begins each time",
    "a fresh start: each router is started before its turn, has learnt nothing, and ends after it",
    "warm-up requests, sent before each turn and not counted in latencies and throughput",
    "prefix caches, emptied before each turn",
    "one replica; addresses of engines given at start; no TLS anywhere; everything on one machine, not pinned to cores",
)
# Each line: what differs, then ours, vllm-router, llm-d.
_DIFFERENCES = (
    ("proxies between client and decode engine", "1", "1", "2: Envoy, then the sidecar beside the decode engine"),
    ("asked besides, for each request", "nobody",
     "nobody", "the endpoint picker over gRPC: head, body, and every piece of the answer"),
    ("who sends the prefill leg", "the router", "the router", "the decode engine's sidecar"),
    ("TLS as published", "none, or at the client's side", "none",
     "between Envoy and picker, and at the sidecar; switched off here, which spares llm-d its cost"),
    ("threads", "1 (--workers 1)", "one a core (its default)", "one a core in each process (defaults)"),
    ("log", "a line a request", "errors only, as in its own benchmarks",
     "Envoy: a line a request; picker: three (its default verbosity)"),
    ("health checks of engines", "every second", "every 60 s", "none: on Kubernetes readiness does that"),
    ("a leg that fails", "is tried on another engine while nothing was sent", "fails the request",
     "fails the request (the sidecar's default: no retry)"),
    ("JSON on its way", "client's bytes, some keys changed", "parsed and written anew",
     "parsed and written anew by the sidecar, for either leg"),
)  # fmt: skip
_COLUMN = {"ours": 1, "vllm-router": 2, "llm-d": 3}


@dataclass(frozen=True, slots=True)
class Sheet:
    """What a reader must know before believing a comparison.

    Args:
        common: what all routers had alike.
        titles: of the routers.
        rows: what differs, and how it was for each router.
        commands: every process of each router: its title, the process, its command line.
        notes: what the load cannot show.
    """

    common: Sequence[str]
    titles: list[str]
    rows: list[list[str]]
    commands: list[list[str]]
    notes: list[str]


def shown(command: Sequence[str]) -> str:
    """Write a command line without the folders of this machine."""
    return " ".join(Path(part).name if part.startswith("/") else part for part in command)


def processes(members: Sequence[Member]) -> dict[str, str]:
    """Give what a point writes down of its router's processes."""
    return {member.name: shown(member.command) for member in members}


def sheet(run: Run) -> Sheet | None:
    """Make the sheet of routers that took turns on this machine; nothing for other runs."""
    if "contenders" not in run.about or not run.points or run.points[0].about["fleet"].get("where") == "kubernetes":
        return None
    choices = [Choice(**one) for one in run.about["contenders"]][: len(run.points)]
    results = [point.whole_results()[:1] for point in run.points]
    versions = [told[0]["pdctl"]["router"]["version"] if told else "" for told in results]
    standing = [point.about.get("processes", {}) for point in run.points]
    rows = [
        ["version", *versions],
        ["processes", *(_counted(one) for one in standing)],
        *([what[0], *(what[_COLUMN[choice.router]] for choice in choices)] for what in _DIFFERENCES),
        ["reads engines' metrics", *map(_reads, choices)],
    ]
    workload, machine = run.workload, run.about["machine"]
    affinity = workload.data != "random" or workload.shared_prefix > 0
    notes = [] if affinity else [RANDOM_PROMPTS]
    if machine.get("load_at_start", 0) > (machine["cores"] or 1):
        notes.append(_BUSY.format(load=machine["load_at_start"], cores=machine["cores"]))
    return Sheet(
        _COMMON, [choice.title for choice in choices], rows,
        [[choice.title, name, command] for choice, one in zip(choices, standing, strict=True)
         for name, command in one.items()],
        notes,
    )  # fmt: skip


def _counted(names: dict[str, str]) -> str:
    kinds = Counter("sidecar" if name.startswith("sidecar-") else name for name in names)
    return ", ".join(f"{count} {kind}{'s' * (count > 1)}" for kind, count in kinds.items())


def _reads(choice: Choice) -> str:
    if choice.router == "llm-d":
        return "every 50 ms, those of decode engines through their sidecars"
    if choice.router == "ours" and choice.policy in READ_METRICS:
        return "every 250 ms"
    return "every 30 s (/load)" if choice.policy == "power_of_two" and choice.router == "vllm-router" else "no"
