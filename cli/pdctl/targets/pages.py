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
        for name, labels, value in Page(page).samples:
            if name in found:
                prefill, decode = (labels[leg] for leg in ("prefill", "decode"))
                found[name][names.get(prefill, prefill), names.get(decode, decode)] = value
        counted, handoffs, seconds, closed = (found[name] for name in _OF_PAIRS)
        for ends, count in counted.items():
            pairs[ends] = pairs.get(ends, 0) + int(count)
        for ends, count in handoffs.items():
            known = edges.get(ends, Edge())
            total = known.handoffs + int(count)
            weighed = known.seconds * known.handoffs + seconds.get(ends, 0.0) * count
            edges[ends] = Edge(total, weighed / total if total else 0.0, known.closed or bool(closed.get(ends)))
    return pairs, edges


class Page:
    """One metrics page.

    Args:
        text: the page as it was answered.
    """

    def __init__(self, text: str) -> None:
        self.samples = [
            (sample.name, sample.labels, sample.value)
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        ]

    def total(self, name: str) -> float:
        """Add up all samples of a name; 0 when there is none."""
        return sum(value for told, _, value in self.samples if told == name)

    def by(self, name: str, label: str) -> dict[str, float]:
        """Add up the samples of a name by one of their labels."""
        found: dict[str, float] = {}
        for told, labels, value in self.samples:
            if told == name and label in labels:
                found[labels[label]] = found.get(labels[label], 0.0) + value
        return found
