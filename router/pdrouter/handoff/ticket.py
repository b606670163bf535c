"""The right to fetch a prompt's KV blocks from the prefill engine, once and for a limited time.

A prefill engine of vLLM 0.32 keeps the blocks for `kv_lease_duration` (30 s by default) after it answered, or until
decode has fetched them. A decode that comes later reads whatever the blocks hold by then: status 200, wrong text, and
neither engine fails. So the router must not use a ticket near its end.
"""

from typing import Any

import orjson

from pdrouter.fleet.engine import Engine
from pdrouter.openai.legs import TICKET_FIELD

# Decode needs all of these. Without `remote_request_id` the decode engine of vLLM 0.32 dies; without one of the others
# it logs a warning and computes the whole prompt itself.
NEEDED = ("remote_engine_id", "remote_request_id", "remote_host", "remote_port", "remote_block_ids")
MARGIN = 0.1  # of the lease: it began when prefill finished, before its answer came here


class TicketError(Exception):
    """A prefill answer cannot be handed to decode; the message says what is wrong with it."""


class Ticket:
    """A ticket: `params` goes to decode as it came.

    `received` and `expires` are loop times (monotonic seconds); after `expires` it must not be used.
    """

    __slots__ = ("expires", "params", "prefill", "prompt_tokens", "received")

    def __init__(
        self, params: bytes, prefill: Engine, received: float, expires: float, prompt_tokens: int | None
    ) -> None:
        self.params = params
        self.prefill = prefill
        self.received = received
        self.expires = expires
        self.prompt_tokens = prompt_tokens


def _missing(params: dict[str, Any]) -> list[str]:
    return [name for name in NEEDED if params.get(name) in (None, "", [])]


def read_ticket(raw: bytes, prefill: Engine, decode: Engine, asked_model: Any, now: float, lease: float) -> Ticket:
    """Read a prefill engine's answer (status 200).

    Args:
        raw: the answer's body.
        prefill: who answered.
        decode: who will be asked next; knows which names mean one model.
        asked_model: the request's `model`, if it had one.
        now: loop time.
        lease: the prefill engines' `kv_lease_duration` in seconds.

    Raises:
        TicketError: it is no JSON object, lacks a needed part of the ticket, or is of another model.
    """
    try:
        answer = orjson.loads(raw)
    except orjson.JSONDecodeError:
        raise TicketError("its answer is not JSON") from None
    if not isinstance(answer, dict):
        raise TicketError("its answer is not a JSON object")
    params = answer.get(TICKET_FIELD)
    if not isinstance(params, dict):
        raise TicketError("its answer has no kv_transfer_params; is it started with --kv-transfer-config?")
    if missing := _missing(params):
        raise TicketError(f"its kv_transfer_params lack {', '.join(missing)}")
    if params.get("do_remote_prefill") is not True:
        raise TicketError("its kv_transfer_params do not offer a transfer (do_remote_prefill is not true)")
    model = answer.get("model")
    expected = asked_model if isinstance(asked_model, str) and asked_model else decode.model
    if (
        model != expected
        and expected is not None
        and not (isinstance(model, str) and decode.same_model(expected, model))
    ):
        raise TicketError(f"it answered with model {model!r}, asked was {expected!r}")
    usage = answer.get("usage")
    tokens = usage.get("prompt_tokens") if isinstance(usage, dict) else None
    return Ticket(
        orjson.dumps(params), prefill, now, now + lease * (1 - MARGIN), tokens if isinstance(tokens, int) else None
    )
