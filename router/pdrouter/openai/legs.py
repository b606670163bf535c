"""The two legs of a request: what prefill is asked, what decode is asked.

Rules, as vLLM 0.32's NixlConnector needs them (`vllm/entrypoints/openai`, `vllm/distributed/kv_transfer`): the prefill
engine computes the prompt and one token, keeps the KV blocks and answers with `kv_transfer_params`; these go to decode
verbatim beside the client's own fields. Nothing else is changed or left out, so that each engine validates and samples
what the client asked for; added is only that decode tells token ids of streams (`pdrouter.openai.continuation`).
"""

import json
from collections.abc import Mapping
from typing import Any

import orjson

TICKET_FIELD = "kv_transfer_params"
# What tells an engine from where to fetch: a client that could set it would send engines to hosts of its choice. vLLM
# puts the two fields among the extra arguments of sampling, where a client of `vllm_xargs` could name them too.
TRANSFER_FIELDS = (TICKET_FIELD, "ec_transfer_params")
EXTRA_ARGUMENTS = "vllm_xargs"
WANT_TICKET: Mapping[str, Any] = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}


def encoded(body: Mapping[str, Any]) -> bytes:
    """Encode a body, integers above 64 bits too."""
    try:
        return orjson.dumps(body)
    except TypeError:
        return json.dumps(body, separators=(",", ":")).encode("utf-8", "surrogatepass")


def prefill_leg(body: Mapping[str, Any]) -> bytes:
    """Encode the prefill leg.

    Changed are only: `stream` false and no `stream_options` (vLLM refuses options without a stream), `max_tokens` 1,
    `max_completion_tokens` 1 where the client set it, no `min_tokens` (above 1 it is refused), no `return_token_ids`
    (nobody reads them), and the wish for a ticket. Of several choices there are none here (`why_alone`).
    """
    leg = dict(body)
    leg["stream"] = False
    leg["max_tokens"] = 1
    if leg.get("max_completion_tokens") is not None:
        leg["max_completion_tokens"] = 1
    leg.pop("stream_options", None)
    leg.pop("min_tokens", None)
    leg.pop("return_token_ids", None)
    leg[TICKET_FIELD] = WANT_TICKET
    return encoded(leg)


def without_transfers(body: dict[str, Any], raw: bytes) -> bytes:
    """Take what a client may not set out of its parsed JSON; give the JSON without it, its very bytes if it had none.

    Args:
        body: the parsed JSON, which is changed.
        raw: its bytes.
    """
    places = [body]
    if EXTRA_ARGUMENTS in body and isinstance(body[EXTRA_ARGUMENTS], dict):
        places.append(body[EXTRA_ARGUMENTS])
    told = False
    for place in places:
        for name in TRANSFER_FIELDS:
            if name in place:
                del place[name]
                told = True
    return encoded(body) if told else raw


def decode_leg(bare: bytes, ticket: bytes | None, ids: bool = False) -> bytes:
    """Put an encoded ticket into an encoded, non-empty JSON object that has none.

    The client's bytes stay as they are: a round trip would change integers above 64 bits and cost time.

    Args:
        bare: the object.
        ticket: what decode is to fetch, if anything.
        ids: whether decode shall tell token ids, which the object must not ask for itself.
    """
    more = b"" if ticket is None else b',"kv_transfer_params":%b' % ticket
    if ids:
        more += b',"return_token_ids":true'
    return b"%b%b}" % (bare[: bare.rindex(b"}")], more)


def salted(body: bytes, salt: str, own: Any) -> bytes:
    """Have an engine find nothing in its prefix cache but what it cached for the same salt (vLLM's `cache_salt`).

    Args:
        body: a non-empty JSON object, encoded.
        salt: by which the engine shall find it; when empty, the body stays as it is.
        own: the client's `cache_salt`, which goes on to keep clients apart; one that vLLM refuses is left to it.
    """
    if not salt or not (own is None or (isinstance(own, str) and own)):
        return body
    # Of two fields of one name engines take the last, as Python's json does.
    return b'%b,"cache_salt":%b}' % (body[: body.rindex(b"}")], json.dumps(salt + (own or "")).encode())


def release_leg(model: Any, ticket: bytes) -> bytes:
    """Encode a request that decode refuses, whereupon it tells prefill that the ticket's blocks are not needed.

    vLLM 0.32 notifies prefill for every request with a ticket that it refuses after it was parsed; `min_tokens` above
    `max_tokens` is refused before anything is computed (400 after some milliseconds, blocks free 22 ms later).
    """
    told: dict[str, Any] = {"prompt": [0], "max_tokens": 1, "min_tokens": 2}
    if isinstance(model, str):
        told["model"] = model
    return decode_leg(orjson.dumps(told), ticket)
