"""Breaches of the P/D protocol that this engine saw: the answer is real vLLM's, this list is the loud part.

Each rule is a way in which a router can go wrong against vLLM 0.32 with the NIXL connector.
"""

import time
from collections import deque
from enum import StrEnum
from typing import Any


class Rule(StrEnum):
    """What a router must not do."""

    PREFILL_STREAM = "prefill_stream"
    PREFILL_STREAM_OPTIONS = "prefill_stream_options"
    PREFILL_MIN_TOKENS = "prefill_min_tokens"
    PREFILL_MAX_TOKENS = "prefill_max_tokens"
    PREFILL_MAX_COMPLETION_TOKENS = "prefill_max_completion_tokens"
    PREFILL_N = "prefill_n"
    PREFILL_BATCH = "prefill_batch"
    PREFILL_SCORES_DISAGGREGATED = "prefill_scores_disaggregated"
    CLIENT_TICKET = "client_ticket"
    TICKET_MISSING_KEYS = "ticket_missing_keys"
    TICKET_MISSING_REQUEST_ID = "ticket_missing_request_id"
    TICKET_ALTERED = "ticket_altered"
    TICKET_REUSED = "ticket_reused"
    TICKET_OTHER_PROMPT = "ticket_other_prompt"
    TICKET_OTHER_MODEL = "ticket_other_model"
    TICKET_EXPIRED = "ticket_expired"
    TICKET_BATCHED = "ticket_batched"
    TICKET_UNREACHABLE = "ticket_unreachable"
    TICKET_NEVER_COLLECTED = "ticket_never_collected"


class Violations:
    """The last breaches, oldest first."""

    def __init__(self, keep: int = 10_000) -> None:
        self._entries: deque[dict[str, Any]] = deque(maxlen=keep)

    def add(self, rule: Rule, request_id: str, **fields: Any) -> None:
        """Record a breach with the fields that broke the rule; the log keeps it even if the engine dies of it."""
        print(f"violation {rule.value} request_id={request_id} {fields}", flush=True)
        self._entries.append({"rule": rule.value, "request_id": request_id, "fields": fields, "at": time.time()})

    def listed(self) -> list[dict[str, Any]]:
        """Give all entries."""
        return list(self._entries)

    def clear(self) -> None:
        """Forget all entries."""
        self._entries.clear()


def prefill_leg_breaches(body: dict[str, Any]) -> list[tuple[Rule, dict[str, Any]]]:
    """Find what is wrong with the client fields of a prefill leg.

    The prefill engine is to compute the prompt and one token: anything else wastes it, is refused, or leaves blocks
    pinned that nobody collects.
    """
    found: list[tuple[Rule, dict[str, Any]]] = []

    def breach(rule: Rule, *names: str) -> None:
        found.append((rule, {name: body.get(name) for name in names}))

    if body.get("stream"):
        breach(Rule.PREFILL_STREAM, "stream")
    if body.get("stream_options") is not None:
        breach(Rule.PREFILL_STREAM_OPTIONS, "stream_options")
    if (body.get("min_tokens") or 0) > 1:
        breach(Rule.PREFILL_MIN_TOKENS, "min_tokens")
    of_chat = "messages" in body and body.get("max_completion_tokens") is not None  # which wins over `max_tokens`
    if body.get("max_tokens") != 1 and not of_chat:
        breach(Rule.PREFILL_MAX_TOKENS, "max_tokens")
    if body.get("max_completion_tokens") not in (None, 1):
        breach(Rule.PREFILL_MAX_COMPLETION_TOKENS, "max_completion_tokens")
    if (body.get("n") or 1) != 1:
        breach(Rule.PREFILL_N, "n")
    if body.get("prompt_logprobs") is not None or (body.get("echo") and body.get("logprobs") is not None):
        breach(Rule.PREFILL_SCORES_DISAGGREGATED, "echo", "logprobs", "prompt_logprobs")
    params = body["kv_transfer_params"]
    carried = {key: value for key, value in params.items() if key.startswith("remote_") and value is not None}
    if carried or params.get("do_remote_prefill"):
        found.append((Rule.CLIENT_TICKET, {"kv_transfer_params": params}))
    return found
