"""Is what comes through a router what the decode engine would have said itself? With a control that has to differ.

It is so to the bit only with engines that do not compile (`--enforce-eager`) and weights with which the text depends
on the whole prompt; vLLM's dummy weights are too small for that.
"""

import sys
from typing import Any

from asking import Asking, RefusedError, Told, told

from engine import Engine, block_bytes, counted

TOKENS = 24  # of each answer
BLOCKS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16)  # full blocks of each prompt, which is a token longer


def _same(asking: Asking, routed: dict[str, Any], decode: Engine, body: dict[str, Any]) -> bool:
    return told(routed) == told(asking.own(decode.url, body))


def _whole(asking: Asking, url: str, decode: Engine, block: int) -> dict[str, Any]:
    """Texts and log-probabilities, and the bytes that were moved for them."""
    bodies = [asking.body(asking.ids(block * count + 1), TOKENS, logprobs=5) for count in BLOCKS]
    before = decode.counters()
    routed = [asking.post(url, body) for body in bodies]
    moved = counted(before, decode.counters())
    equal = [_same(asking, answer, decode, body) for answer, body in zip(routed, bodies, strict=True)]
    blocks = sum(count + 1 for count in BLOCKS)
    size = block_bytes(decode.model, block)
    return {
        "asked": len(bodies), "equal": sum(equal), "moved": moved, "blocks": blocks,
        "bytes_expected": None if size is None else size * blocks,
    }  # fmt: skip


def _streamed(asking: Asking, url: str, decode: Engine, block: int) -> dict[str, Any]:
    equal = 0
    for count in BLOCKS[:4]:
        body = asking.body(asking.ids(block * count + 1), TOKENS)
        from_stream = asking.post_stream(url, body)
        equal += from_stream == told(asking.own(decode.url, body))[0][0]
    return {"asked": 4, "equal": equal}


def _chats(asking: Asking, url: str, decode: Engine, block: int) -> dict[str, Any]:
    equal = 0
    for count in BLOCKS[:4]:
        body = asking.body(asking.chat(decode.url, block * count - 40, block), TOKENS, logprobs=True)
        equal += _same(asking, asking.post(url, body), decode, body)
    return {"asked": 4, "equal": equal}


def _batch(asking: Asking, url: str, decode: Engine, block: int) -> dict[str, Any]:
    """Eight prompts in one request."""
    prompts = [asking.ids(block * count + 1) for count in BLOCKS[:8]]
    routed = told(asking.post(url, asking.body(prompts, TOKENS, logprobs=5)))
    own = [told(asking.own(decode.url, asking.body(prompt, TOKENS, logprobs=5)))[0] for prompt in prompts]
    equal = sum(left == right for left, right in zip(routed, own, strict=False))
    return {"asked": len(prompts), "answered": len(routed), "equal": equal}


KINDS = {"whole answers": _whole, "streams": _streamed, "chats": _chats, "eight prompts in one request": _batch}


def through(asking: Asking, url: str, decode: Engine, block: int) -> dict[str, Any]:
    """Compare every kind of request through a router."""
    found: dict[str, Any] = {}
    for kind, ask in KINDS.items():
        try:
            found[kind] = ask(asking, url, decode, block)
        except (RefusedError, KeyError, TypeError, ValueError) as error:
            found[kind] = {"refused": f"{type(error).__name__}: {error}"[:400]}
        print(f"  {kind}: {found[kind]}", flush=True)
    return found


def control(asking: Asking, prefill: Engine, decode: Engine, block: int) -> dict[str, Any]:
    """Hand tickets over by hand: the right ones have to give equal answers, those of other prompts must not."""
    right, foreign, repeats = 0, 0, 0
    for count in BLOCKS[:6]:
        body = asking.body(asking.ids(block * count + 1), TOKENS, logprobs=5)
        other = asking.body(asking.ids(block * count + 1), TOKENS, logprobs=5)
        own = told(asking.own(decode.url, body))
        repeats += own == told(asking.own(decode.url, body))
        answers: list[Told] = []
        for ticket in (asking.ticket(prefill.url, body), asking.ticket(prefill.url, other)):
            salt = f"{count} {len(answers)} {body['prompt'][:4]}"
            answers.append(told(asking.post(decode.url, body | {"kv_transfer_params": ticket, "cache_salt": salt})))
        right += answers[0] == own
        foreign += answers[1][0][0] == own[0][0]
    found = {"asked": 6, "own_repeats": repeats, "right_ticket_equal": right, "foreign_ticket_equal": foreign}
    if foreign:
        print("texts: a foreign KV cache changed nothing in some answers, so equal texts prove nothing here; "
              "engines with dummy weights need larger ones", file=sys.stderr)  # fmt: skip
    print(f"  by hand: {found}", flush=True)
    return found
