"""The two legs of a request: what prefill is asked, what decode is asked.

Rules, as vLLM 0.32's NixlConnector needs them (`vllm/entrypoints/openai`, `vllm/distributed/kv_transfer`): the prefill
engine computes the prompt and one token, keeps the KV blocks and answers with `kv_transfer_params`; these go to decode
verbatim beside the client's own fields. Nothing else is changed, added or left out, so that each engine validates and
samples what the client asked for.
"""

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


def prefill_leg(body: Mapping[str, Any]) -> bytes:
    """Encode the prefill leg.

    Changed are only: `stream` false and no `stream_options` (vLLM refuses options without a stream), `max_tokens` 1,
    `max_completion_tokens` 1 and `n` 1 where the client set them (further choices would pin blocks that nobody
    fetches), no `min_tokens` (above 1 it is refused), and the wish for a ticket.
    """
    leg = dict(body)
    leg["stream"] = False
    leg["max_tokens"] = 1
    if leg.get("max_completion_tokens") is not None:
        leg["max_completion_tokens"] = 1
    if leg.get("n") is not None:
        leg["n"] = 1
    leg.pop("stream_options", None)
    leg.pop("min_tokens", None)
    leg[TICKET_FIELD] = WANT_TICKET
    return orjson.dumps(leg)


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
    return orjson.dumps(body) if told else raw


def decode_leg(bare: bytes, ticket: bytes) -> bytes:
    """Put an encoded ticket into an encoded, non-empty JSON object that has none.

    The client's bytes stay as they are: a round trip would change integers above 64 bits and cost time.
    """
    return b'%b,"kv_transfer_params":%b}' % (bare[: bare.rindex(b"}")], ticket)
