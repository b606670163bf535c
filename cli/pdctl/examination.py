"""What doctor judges of a deployment, wherever it lives: pure rules over what was gathered of it."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pdctl.check import Check, Mark
from pdctl.targets.pages import Page
from pdctl.targets.target import Health, Routing

TCP_BYTES = 3e9  # a second over TCP at best: what one 25 Gbit/s adapter carries
RDMA_BYTES = 4e9  # a second over RDMA at least: half of the slowest adapter in use, 100 Gbit/s, is more
FEW = 20  # transfers before their speed says anything
SMALL = 32e6  # bytes: transfers of less take as long over any network (vLLM over NVLink: 4 ms for 134 MB)
SLOW_HANDOFF = 5.0  # seconds: a NIXL handshake on first contact takes about that long
_AMISS = re.compile(
    r"(?i)(nixl|ucx|kv).{0,120}(error|fail|refus|incompat|mismatch|not available|timed? ?out|invalid)|"
    r"(error|fail).{0,60}(nixl|ucx|handshake|kv transfer)|Got invalid KVTransferParams"
)


@dataclass(frozen=True, slots=True)
class Facts:
    """What was gathered of a deployment.

    Args:
        flags: how commands name it, for fixes.
        versions: of vLLM by member.
        pages: metrics of the engines by member.
        workers: what each router that can be asked knows of engines, by URL.
        edges: what routers know of each way, with the last error; empty where none can be asked.
        lines: last log lines by member.
        rdma: the resource by which engines ask for RDMA, empty for TCP; None where KV stays on one machine.
        own: checks that only the place of the deployment can make.
    """

    flags: str
    health: Sequence[Health]
    routing: Routing | None
    versions: Mapping[str, str]
    pages: Mapping[str, Page]
    workers: Sequence[Mapping[str, Mapping[str, Any]]]
    edges: Sequence[Mapping[str, Any]] = ()
    lines: Mapping[str, Sequence[str]] = field(default_factory=dict)
    rdma: str | None = None
    own: Sequence[Check] = ()


def _names(names: Sequence[str], most: int = 4) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _engines(facts: Facts) -> list[Health]:
    return [part for part in facts.health if part.role in ("prefill", "decode")]


def _parts(facts: Facts) -> Check:
    down = [f"{part.name}: {part.reason or part.state}" for part in facts.health if part.state not in ("ready", "done")]
    if not down:
        return Check("parts", Mark.OK, f"all {len(facts.health)} are ready")
    return Check("parts", Mark.FAIL, _names(down), f"see why: pdctl status{facts.flags}, pdctl logs{facts.flags}")


def _restarts(facts: Facts) -> Check:
    often = [f"{part.name} {part.restarts}×" for part in facts.health if part.restarts]
    if not often:
        return Check("restarts", Mark.OK, "none")
    return Check(
        "restarts", Mark.WARN, _names(often), f"see what the container before said: pdctl logs{facts.flags} --previous"
    )


def _reach(facts: Facts) -> Check:
    """Whether each router finds every engine well that is ready, and calls none that is not there."""
    routers = facts.workers
    if not routers:
        return Check("router → engines", Mark.UNKNOWN, "the router's admin port does not answer")
    urls = {part.url: part for part in _engines(facts) if part.url}
    told = []
    for url, part in urls.items():
        missing = sum(url not in known for known in routers)
        ill = sum(url in known and not known[url]["healthy"] for known in routers)
        for count, how in ((missing, "is not known to"), (ill, "does not answer")):
            if part.state == "ready" and count:
                told.append(f"{part.name} {how} {f'{count} of {len(routers)} routers' if len(routers) > 1 else 'it'}")
    stray = {url for known in routers for url, engine in known.items() if url not in urls and engine["healthy"]}
    if told:
        return Check(
            "router → engines", Mark.FAIL, _names(told),
            f"see its log: pdctl logs router{facts.flags}; a NetworkPolicy may keep it from the engines' ports",
        )  # fmt: skip
    if stray:
        return Check(
            "router → engines", Mark.WARN, f"it also calls {_names(sorted(stray))}", "see which release it looks for"
        )
    silent = sum(part.role == "router" and part.state == "ready" for part in facts.health) - len(routers)
    if silent > 0:
        return Check(
            "router → engines", Mark.WARN,
            f"{silent} of {silent + len(routers)} routers do not answer on their admin port",
            f"see their logs: pdctl logs router{facts.flags}",
        )  # fmt: skip
    who = f"all {len(routers)} routers find" if len(routers) > 1 else "it finds"
    return Check("router → engines", Mark.OK, f"{who} all {len(routers[0])} well")


def _versions(facts: Facts) -> Check:
    if not facts.versions:
        return Check("versions", Mark.UNKNOWN, "no engine tells its version")
    by: dict[str, list[str]] = {}
    for name, version in facts.versions.items():
        by.setdefault(version, []).append(name)
    if len(by) == 1:
        return Check("versions", Mark.OK, f"all engines are vLLM {next(iter(by))}")
    told = "; ".join(f"{version}: {_names(names)}" for version, names in sorted(by.items()))
    return Check(
        "versions", Mark.FAIL, f"engines differ, and refuse each other's KV cache: {told}",
        f"give all the same image: pdctl rollout{facts.flags} --image …",
    )  # fmt: skip


def _moving(facts: Facts) -> Check:
    if facts.routing is None:
        return Check("KV moves", Mark.UNKNOWN, "no router is ready")
    pairs = sum(count for (prefill, _), count in facts.routing.pairs.items() if prefill != "none")
    moved = sum(count for count, _ in facts.routing.transfers.values())
    if not pairs:
        return Check("KV moves", Mark.UNKNOWN, "no request was handed over yet; send some: pdctl bench 20 4")
    if not moved:
        return Check(
            "KV moves", Mark.FAIL,
            f"{pairs} prompts were handed over, and decode engines read no KV: they compute all again",
            f"look for NIXL in decode's log: pdctl logs decode{facts.flags} --grep -i nixl; port 5600 must be open "
            "between the roles",
        )  # fmt: skip
    return Check("KV moves", Mark.OK, f"{moved} transfers for {pairs} prompts handed over")


def _failures(facts: Facts) -> Check:
    told = []
    for name in ("nixl_num_failed_transfers", "nixl_num_failed_notifications", "nixl_num_kv_expired_reqs"):
        counted = {member: page.total(f"vllm:{name}_total") for member, page in facts.pages.items()}
        told += [
            f"{member} {count:.0f} × {name.removeprefix('nixl_num_')}" for member, count in counted.items() if count
        ]
    if not told:
        return Check("transfers", Mark.OK, "none failed, none expired")
    return Check(
        "transfers", Mark.WARN, _names(told),
        f"see over which ways: pdctl routing{facts.flags} --edges; decode computes such prompts itself",
    )  # fmt: skip


def _edges(facts: Facts) -> Check:
    closed = [one for one in facts.edges if one["closed"]]
    failed = [one for one in facts.edges if one["failures"] and not one["closed"]]
    if closed:
        told = [f"{one['prefill']} → {one['decode']}: {one.get('last_error') or 'failed'}" for one in closed]
        return Check(
            "ways", Mark.FAIL, f"{len(closed)} of {len(facts.edges)} are closed: {_names(told, 2)}",
            "the decode engine may remember a prefill engine that was restarted since: restart it "
            f"(pdctl rollout{facts.flags} --restart decode)",
        )  # fmt: skip
    if failed:
        told = [f"{one['prefill']} → {one['decode']}: {one['failures']} failures" for one in failed]
        return Check("ways", Mark.WARN, _names(told, 2), f"see pdctl routing{facts.flags} --edges")
    slow = [one for one in facts.edges if one["handoffs"] and one["seconds"] > SLOW_HANDOFF]
    if slow:
        told = [f"{one['prefill']} → {one['decode']}: {one['seconds']:.1f} s" for one in slow]
        return Check(
            "ways", Mark.WARN, f"slow from ticket to first byte: {_names(told, 2)}", "see decode's queue: pdctl top"
        )
    used = sum(1 for one in facts.edges if one["handoffs"])
    return Check("ways", Mark.OK, f"{used} of {len(facts.edges)} known were used, all are open")


def _stale(facts: Facts) -> Check:
    """Decode engines may know a prefill engine as it was before its restart; vLLM forgets that after an hour."""
    restarted = [part for part in facts.health if part.role == "prefill" and part.restarts]
    if not restarted:
        return Check("stale agents", Mark.OK, "no prefill engine was restarted in its pod")
    troubled = any(page.total("vllm:nixl_num_failed_transfers_total") for page in facts.pages.values())
    names = _names([part.name for part in restarted])
    if not troubled:
        return Check("stale agents", Mark.OK, f"{names} restarted, and no transfer failed since")
    return Check(
        "stale agents", Mark.FAIL,
        f"{names} restarted, and transfers fail: decode engines may still know the old process",
        f"restart the decode engines: pdctl rollout{facts.flags} --restart decode",
    )  # fmt: skip


def _speed(facts: Facts) -> Check:
    count = sum(page.total("vllm:nixl_xfer_time_seconds_count") for page in facts.pages.values())
    seconds = sum(page.total("vllm:nixl_xfer_time_seconds_sum") for page in facts.pages.values())
    moved = sum(page.total("vllm:nixl_bytes_transferred_sum") for page in facts.pages.values())
    if count < FEW or not seconds:
        return Check("speed of KV", Mark.UNKNOWN, f"only {count:.0f} transfers so far; send some: pdctl bench 50 4")
    if moved / count < SMALL:
        return Check(
            "speed of KV", Mark.UNKNOWN, f"transfers of {moved / count / 1e6:.1f} MB on average are too small to tell",
            "send longer prompts: pdctl bench 200 8 --input-len 4000; engines count from their start",
        )  # fmt: skip
    rate = moved / seconds
    told = f"{rate / 1e9:.1f} GB/s within a transfer, over {count:.0f}"
    if facts.rdma and rate < RDMA_BYTES:
        return Check(
            "speed of KV", Mark.WARN, f"{told}: {facts.rdma} is asked for, and this is what TCP does",
            "check UCX_TLS and UCX_NET_DEVICES; see UCX's choice with --set engines.env.UCX_LOG_LEVEL=info",
        )  # fmt: skip
    if facts.rdma == "" and rate < TCP_BYTES:
        return Check("speed of KV", Mark.OK, f"{told}, as TCP does; --network infiniband, roce or efa is faster")
    return Check("speed of KV", Mark.OK, told)


def _logs(facts: Facts) -> Check:
    found = {name: line for name, lines in facts.lines.items() for line in lines if _AMISS.search(line)}
    if not found:
        return Check(
            "logs", Mark.OK, f"nothing amiss about NIXL, UCX or KV in the last lines of {len(facts.lines)} engines"
        )
    name, line = next(iter(found.items()))
    return Check(
        "logs", Mark.WARN, f"{len(found)} engines tell of it, such as {name}: {line.strip()[:160]}",
        f"read on: pdctl logs {name}{facts.flags} --tail 200",
    )  # fmt: skip


def _protocol(facts: Facts) -> Check | None:
    if facts.routing is None or not facts.routing.violations:
        return None
    rules = sorted({str(one["rule"]) for one in facts.routing.violations})
    return Check(
        "protocol", Mark.FAIL, f"{len(facts.routing.violations)} breaches seen by simulated engines: {_names(rules)}",
        f"pdctl routing{facts.flags}",
    )  # fmt: skip


_RULES: tuple[Callable[[Facts], Check | None], ...] = (
    _parts, _restarts, _reach, _versions, _moving, _failures, _edges, _stale, _speed, _logs, _protocol,
)  # fmt: skip


def examine(facts: Facts) -> Iterator[Check]:
    """Make every check."""
    yield from facts.own
    for rule in _RULES:
        found = rule(facts)
        if found is not None:
            yield found
