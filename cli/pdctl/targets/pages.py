"""What the metrics pages of routers and engines say of pairs, ways and transfers."""

from collections.abc import Iterable, Mapping

from prometheus_client.parser import text_string_to_metric_families

from pdctl.targets.target import Edge

Pair = tuple[str, str]

_OF_PAIRS = (
    "pd_router_pairs_total",
    "pd_router_edge_handoffs_total",
    "pd_router_edge_seconds",
    "pd_router_edge_closed",
)


def read_pairs(pages: Iterable[str], names: Mapping[str, str]) -> tuple[dict[Pair, int], dict[Pair, Edge]]:
    """Read prompts by pair and all ways from routers' pages; several routers are added up.

    Args:
        pages: one of each router.
        names: of engines, by URL.
    """
    pairs: dict[Pair, int] = {}
    edges: dict[Pair, Edge] = {}
    for page in pages:
        found: dict[str, dict[Pair, float]] = {name: {} for name in _OF_PAIRS}
        for family in text_string_to_metric_families(page):
            for sample in family.samples:
                if sample.name in found:
                    prefill, decode = (sample.labels[leg] for leg in ("prefill", "decode"))
                    found[sample.name][names.get(prefill, prefill), names.get(decode, decode)] = sample.value
        counted, handoffs, seconds, closed = (found[name] for name in _OF_PAIRS)
        for ends, count in counted.items():
            pairs[ends] = pairs.get(ends, 0) + int(count)
        for ends, count in handoffs.items():
            known = edges.get(ends, Edge())
            total = known.handoffs + int(count)
            weighed = known.seconds * known.handoffs + seconds.get(ends, 0.0) * count
            edges[ends] = Edge(total, weighed / total if total else 0.0, known.closed or bool(closed.get(ends)))
    return pairs, edges


def total(page: str, name: str) -> float:
    """Add up all samples of a name."""
    return sum(
        sample.value for family in text_string_to_metric_families(page) for sample in family.samples
        if sample.name == name
    )  # fmt: skip
