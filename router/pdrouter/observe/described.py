"""Every metric of the router: its name, kind, labels and meaning, and what vllm-router calls the like.

`docs/metrics.md` is generated from this table (`make docs`).
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Described:
    """One metric. Counters get `_total` when they are shown; `like` names vllm-router's counterparts."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    labels: tuple[str, ...]
    text: str
    like: tuple[str, ...] = ()


REQUESTS = Described(
    "pd_router_requests", "counter", ("path", "status"), "Client requests, by path and answered status.",
    ("vllm_router_pd_requests_total",),
)  # fmt: skip
ERRORS = Described(
    "pd_router_errors", "counter", ("leg", "reason"), "Requests that ended early, by leg at fault and why.",
    ("vllm_router_pd_errors_total", "vllm_router_pd_stream_errors_total", "vllm_router_pd_body_over_limit_total"),
)  # fmt: skip
PAIRS = Described(
    "pd_router_pairs", "counter", ("prefill", "decode"),
    "Handoffs by engines; prefill is none where one engine served alone.",
)  # fmt: skip
LEGS = Described(
    "pd_router_legs", "counter", ("engine", "role", "outcome"),
    "Legs that engines answered (ok) or failed (error: 5xx, cut connection, no HTTP); the breaker counts these.",
    ("vllm_router_pd_prefill_requests_total", "vllm_router_pd_decode_requests_total",
     "vllm_router_pd_prefill_errors_total", "vllm_router_pd_decode_errors_total"),
)  # fmt: skip
DECISIONS = Described(
    "pd_router_decisions", "counter", ("reason",),
    "Requests by why their engines were chosen: the policies and where the routing key was found.",
    ("vllm_router_pd_prefill_decisions_total", "vllm_router_pd_affinity_decisions_total"),
)  # fmt: skip
PREDICTED = Described(
    "pd_router_predicted_tokens", "counter", ("engine", "state"),
    "Prompt tokens sent to prefill engines, as the policy predicts: cached there, or uncached and to be computed.",
    ("vllm_router_pd_credited_prefix_tokens_total", "vllm_router_pd_new_prefill_tokens"),
)  # fmt: skip
TOKENS = Described("pd_router_tokens", "counter", ("kind",), "Tokens that engines' usage told.")
DURATION = Described(
    "pd_router_request_duration_seconds", "histogram", (), "From a request's arrival to the end of its answer.",
    ("vllm_router_pd_request_duration_seconds",),
)  # fmt: skip
ROUTING = Described(
    "pd_router_routing_seconds", "histogram", (),
    "From a request's arrival to sending its prefill leg: reading it, waiting in the queue, choosing engines.",
    ("vllm_router_pd_kv_prepare_seconds",),
)  # fmt: skip
TTFT = Described("pd_router_ttft_seconds", "histogram", (), "From a request's arrival to the first byte of its answer.")
HANDOFF = Described(
    "pd_router_handoff_seconds", "histogram", (), "From the prefill answer to the first byte of decode's answer.",
    ("vllm_router_pd_decode_pending_seconds",),
)  # fmt: skip
PREFILL = Described("pd_router_prefill_seconds", "histogram", (), "From sending the prefill leg to its answer.")
IN_FLIGHT = Described(
    "pd_router_in_flight", "gauge", ("engine", "role"), "Requests that an engine is working on.",
    ("vllm_router_pd_active_decode_requests", "vllm_router_pd_pending_decode_requests",
     "vllm_router_pd_prefill_occupancy"),
)  # fmt: skip
QUEUED_TOKENS = Described(
    "pd_router_queued_tokens", "gauge", ("engine", "role"),
    "Prompt tokens that an engine still has to compute, as the policy estimates them.",
    ("vllm_router_pd_active_prefill_tokens", "vllm_router_pd_unknown_prefill_requests"),
)  # fmt: skip
HELD_TOKENS = Described(
    "pd_router_held_tokens", "gauge", ("engine", "role"),
    "Tokens that requests hold of an engine's KV cache or will hold: prompts, on decode also predicted answers.",
)  # fmt: skip
PINNED = Described(
    "pd_router_pinned_kv_tokens", "gauge", ("engine",),
    "Tokens of the KV blocks that a prefill engine keeps for decode to fetch.",
)  # fmt: skip
TICKETS = Described(
    "pd_router_tickets", "gauge", ("engine", "state"),
    "Open tickets of a prefill engine: held by the router, or handed to a decode engine that has not answered yet.",
)  # fmt: skip
TICKETS_ENDED = Described(
    "pd_router_tickets_ended", "counter", ("engine", "cause"),
    "Tickets by how they ended: collected, refused, released, lost, expired, void.",
)  # fmt: skip
EDGE_HANDOFFS = Described(
    "pd_router_edge_handoffs", "counter", ("prefill", "decode"), "Tickets that decode collected, by both engines.",
)  # fmt: skip
EDGE_SECONDS = Described(
    "pd_router_edge_seconds", "gauge", ("prefill", "decode"),
    "Mean time, recent handoffs counting more, from a ticket to decode's first byte.",
)  # fmt: skip
EDGE_CLOSED = Described(
    "pd_router_edge_closed", "gauge", ("prefill", "decode"),
    "1 while a way between two engines is left alone although both serve others.",
)  # fmt: skip
RETRIES = Described(
    "pd_router_retries", "counter", ("outcome",),
    "Further tries of requests: spent, or refused because too many requests were being tried again.",
)  # fmt: skip
HEDGED = Described(
    "pd_router_hedged_prefills", "counter", (), "Prefills that took so long that another engine was asked too."
)
CONTINUED = Described("pd_router_continued_streams", "counter", (), "Streams that went on with other engines.")
CANARIES = Described(
    "pd_router_canaries", "counter", ("outcome",), "Canaries by outcome: alike, differs, failed (no answer).",
)  # fmt: skip
CANARY_DIFFERS = Described(
    "pd_router_canary_differs", "gauge", ("prefill", "decode"),
    "1 while the last canary over this way was answered otherwise than by decode alone: KV blocks come over wrong.",
)  # fmt: skip
WAITING = Described(
    "pd_router_requests_waiting", "gauge", ("for",),
    "Prompts that wait for a prefill engine, for a decode engine, or for room in decode's KV caches. To scale by.",
)  # fmt: skip
HEALTHY = Described("pd_router_engine_healthy", "gauge", ("engine", "role"), "1 while an engine's /health answers 200.")
BREAKER = Described("pd_router_breaker_open", "gauge", ("engine", "role"), "1 while a failing engine is left alone.")
METRICS_AGE = Described(
    "pd_router_engine_metrics_age_seconds", "gauge", ("engine", "role"),
    "How old an engine's own load figures are; absent while its /metrics are not read.",
    ("vllm_router_pd_identity_verified",),
)  # fmt: skip
RUNNING = Described("pd_router_requests_running", "gauge", (), "Client requests under way.")
QUEUED = Described("pd_router_requests_queued", "gauge", (), "Client requests that wait for one of those to end.")
SOURCE_AGE = Described(
    "pd_router_discovery_age_seconds", "gauge", ("source",), "Seconds since a source of engines was last heard."
)
WORKERS = Described("pd_router_workers", "gauge", (), "Worker processes that told their figures.")

ALL = (
    REQUESTS, ERRORS, DECISIONS, PAIRS, LEGS, PREDICTED, TOKENS, DURATION, ROUTING, TTFT, HANDOFF, PREFILL, IN_FLIGHT,
    QUEUED_TOKENS, HELD_TOKENS, PINNED, TICKETS, TICKETS_ENDED, EDGE_HANDOFFS, EDGE_SECONDS, EDGE_CLOSED, HEALTHY,
    BREAKER, METRICS_AGE, RUNNING, QUEUED, WAITING, RETRIES, HEDGED, CONTINUED, CANARIES, CANARY_DIFFERS, SOURCE_AGE,
    WORKERS,
)  # fmt: skip
