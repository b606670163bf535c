"""The right to fetch a prompt's KV blocks from the prefill engine, once and for a limited time.

A prefill engine of vLLM 0.32 keeps the blocks for `kv_lease_duration` (30 s by default) after it answered, or until
decode has fetched them. A decode that comes later reads whatever the blocks hold by then: status 200, wrong text, and
neither engine fails. So the router must not use a ticket near its end, and none twice.
"""

import re
from collections.abc import Callable
from enum import StrEnum
from math import inf
from typing import Any

import orjson

from pdrouter.deadlines import Deadlines
from pdrouter.fleet.engine import Engine
from pdrouter.openai.legs import TICKET_FIELD
from pdrouter.openai.usage import told_usage

# Decode needs all of these. Without `remote_request_id` the decode engine of vLLM 0.32 dies; without one of the others
# it logs a warning and computes the whole prompt itself.
NEEDED = ("remote_engine_id", "remote_request_id", "remote_host", "remote_port", "remote_block_ids")
MARGIN = 0.1  # of the lease: it began when prefill finished, before its answer came here
_RANK = re.compile(r"_dp[0-9]+$")  # of data-parallel cores behind one address: one process starts them and ends them
_FIELD = b'"%b":{' % TICKET_FIELD.encode()
_MODEL = b'"model":"'


class TicketError(Exception):
    """A prefill answer cannot be handed to decode; the message says what is wrong with it."""


class Cause(StrEnum):
    """How a ticket ended."""

    COLLECTED = "collected"  # decode answered, so it had the blocks
    REFUSED = "refused"  # decode refused the request; vLLM tells prefill to forget the blocks
    RELEASED = "released"  # given back without being used
    LOST = "lost"  # decode failed, and nobody knows whether it had the blocks
    EXPIRED = "expired"  # its lease ended first
    VOID = "void"  # the prefill engine restarted or left


class Ticket:
    """A ticket: `params` goes to decode as it came.

    `received` and `expires` are loop times (monotonic seconds); after `expires` it must not be used. `life` is the
    engine's own id, which another process at the same address does not have. `cause` is None while it is open, `over`
    is called when its lease ends. `fetched` tells that decode has its blocks, as they should be.
    """

    __slots__ = (
        "blocks", "cause", "expires", "fetched", "handed", "life", "over", "params", "prefill", "prompt_tokens",
        "received", "tokens",
    )  # fmt: skip

    def __init__(
        self, params: bytes, prefill: Engine, received: float, expires: float, prompt_tokens: int | None, life: str,
        blocks: int,
    ) -> None:  # fmt: skip
        self.params = params
        self.prefill = prefill
        self.received = received
        self.expires = expires
        self.prompt_tokens = prompt_tokens
        self.life = life
        self.blocks = blocks
        self.tokens = 0
        self.fetched = False
        self.handed = False
        self.cause: Cause | None = None
        self.over: Callable[[Ticket], object] | None = None

    def expired(self, deadlines: Deadlines) -> None:
        """Its lease is over (`pdrouter.deadlines`)."""
        if self.over is not None:
            self.over(self)

    def annul(self) -> None:
        """Make it unusable, also for a connection that is just being made."""
        self.expires = -inf


def _missing(params: dict[str, Any]) -> list[str]:
    return [name for name in NEEDED if not params.get(name)]


def _parts(raw: bytes) -> tuple[bytes, Any, Any]:
    """Give the ticket's own bytes, the same parsed, and the model's name.

    An engine writes compact JSON, so the ticket is cut out of it instead of parsing the whole answer: quotes inside of
    strings have backslashes before them, so the marks can only be what they seem.
    """
    at = raw.find(_FIELD)
    named = raw.find(_MODEL)
    if at >= 0 and named >= 0:
        begin = at + len(_FIELD) - 1
        bare = raw[begin : raw.find(b"}", begin) + 1]
        name = raw[named + len(_MODEL) : raw.find(b'"', named + len(_MODEL))]
        if b"\\" not in name:
            try:
                return bare, orjson.loads(bare), name.decode("utf-8", "replace")
            except orjson.JSONDecodeError:
                pass  # it has objects inside
    return _parsed(raw)


def _parsed(raw: bytes) -> tuple[bytes, Any, Any]:
    try:
        answer = orjson.loads(raw)
    except orjson.JSONDecodeError:
        raise TicketError("its answer is not JSON") from None
    if not isinstance(answer, dict):
        raise TicketError("its answer is not a JSON object")
    params = answer.get(TICKET_FIELD)
    return orjson.dumps(params), params, answer.get("model")


def read_ticket(raw: bytes, prefill: Engine, decode: Engine, asked_model: Any, received: float, lease: float) -> Ticket:
    """Read a prefill engine's answer (status 200).

    Args:
        raw: the answer's body.
        prefill: who answered.
        decode: who will be asked next; knows which names mean one model.
        asked_model: the request's `model`, if it had one.
        received: loop time at which the answer came, or may have come at the earliest.
        lease: the prefill engines' `kv_lease_duration` in seconds.

    Raises:
        TicketError: it is no JSON object, lacks a needed part of the ticket, or is of another model.
    """
    bare, params, model = _parts(raw)
    if not isinstance(params, dict):
        raise TicketError("its answer has no kv_transfer_params; is it started with --kv-transfer-config?")
    if missing := _missing(params):
        raise TicketError(f"its kv_transfer_params lack {', '.join(missing)}")
    if params.get("do_remote_prefill") is not True:
        raise TicketError("its kv_transfer_params do not offer a transfer (do_remote_prefill is not true)")
    expected = asked_model if isinstance(asked_model, str) and asked_model else decode.model
    if (
        model != expected
        and expected is not None
        and not (isinstance(model, str) and decode.same_model(expected, model))
    ):
        raise TicketError(f"it answered with model {model!r}, asked was {expected!r}")
    groups = params["remote_block_ids"]
    blocks = len(groups[0]) if isinstance(groups, list) and isinstance(groups[0], list) else 0
    life = _RANK.sub("", str(params["remote_engine_id"]))
    tokens = params.get("remote_num_tokens")
    if not isinstance(tokens, int):  # older engines do not tell
        usage = told_usage(raw)
        tokens = None if usage is None else usage[0]
    return Ticket(bare, prefill, received, received + lease * (1 - MARGIN), tokens, life, blocks)
