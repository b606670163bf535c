"""What engines and routers do at the moment: the difference of two looks at their metrics. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass

from pdctl.targets.pages import Page


@dataclass(frozen=True, slots=True)
class EngineRow:
    """One engine between two looks.

    Args:
        running, waiting: requests now.
        kv: share of its KV cache in use, 0 to 1.
        pinned: prompt tokens that it keeps for decode to fetch, by the router's account.
        prompt_rate, output_rate: tokens a second.
        ttft, itl: mean seconds in this time; None when there were none.
        kv_rate: bytes of KV a second that it has read.
    """

    running: float
    waiting: float
    kv: float
    pinned: float
    prompt_rate: float
    output_rate: float
    ttft: float | None
    itl: float | None
    kv_rate: float


@dataclass(frozen=True, slots=True)
class RouterRow:
    """All routers together between two looks; rates are a second."""

    requests: float
    errors: float
    retries: float
    running: float
    queued: float
    ttft: float | None
    handoff: float | None


def _grown(before: Page, after: Page, name: str) -> float:
    """How much a counter grew; one that is smaller began anew."""
    now, then = after.total(name), before.total(name)
    return now - then if now >= then else now


def _mean(before: Page, after: Page, name: str) -> float | None:
    count = _grown(before, after, f"{name}_count")
    return _grown(before, after, f"{name}_sum") / count if count else None


def engine_row(before: Page, after: Page, seconds: float, pinned: float) -> EngineRow:
    """Work out an engine's row."""
    return EngineRow(
        after.total("vllm:num_requests_running"), after.total("vllm:num_requests_waiting"),
        after.total("vllm:kv_cache_usage_perc"), pinned,
        _grown(before, after, "vllm:prompt_tokens_total") / seconds,
        _grown(before, after, "vllm:generation_tokens_total") / seconds,
        _mean(before, after, "vllm:time_to_first_token_seconds"),
        _mean(before, after, "vllm:inter_token_latency_seconds"),
        _grown(before, after, "vllm:nixl_bytes_transferred_sum") / seconds,
    )  # fmt: skip


def router_row(before: Page, after: Page, seconds: float) -> RouterRow:
    """Work out a router's row."""
    return RouterRow(
        _grown(before, after, "pd_router_requests_total") / seconds,
        _grown(before, after, "pd_router_errors_total") / seconds,
        _grown(before, after, "pd_router_retries_total") / seconds,
        after.total("pd_router_requests_running"), after.total("pd_router_requests_queued"),
        _mean(before, after, "pd_router_ttft_seconds"), _mean(before, after, "pd_router_handoff_seconds"),
    )  # fmt: skip


def pinned_by_url(pages: Mapping[str, Page]) -> dict[str, float]:
    """Give the pinned prompt tokens of each engine, by URL, over all routers."""
    found: dict[str, float] = {}
    for page in pages.values():
        for url, count in page.by("pd_router_pinned_kv_tokens", "engine").items():
            found[url] = found.get(url, 0.0) + count
    return found
