"""Is what comes through a router what the decode engine would have said itself? With a control that has to differ.

It is so to the bit only with engines that do not compile (`--enforce-eager`) and weights with which the text depends
on the whole prompt; vLLM's dummy weights are too small for that.
"""

import sys
from collections.abc import Sequence
from typing import Any

import httpx
from asking import Asking, RefusedError, Told, told

from engine import Engine, block_bytes, counted

TOKENS = 24  # of each answer
BATCH = "eight prompts in one request"
BLOCKS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16)  # full blocks of each prompt, which is a token longer


def _compared(asking: Asking, routed: list[Told], decode: Engine, bodies: list[dict[str, Any]]) -> dict[str, Any]:
    """Count the answers whose text, and whose log-probabilities too, are the decode engine's own.

    Engines round otherwise when they compute several requests at once, and texts then part where two tokens are nearly
    as likely. So the first words are compared too: a wrong KV cache does not wait.
    """
    texts, begins, probabilities = 0, 0, 0
    for answer, body in zip(routed, bodies, strict=True):
        own = told(asking.own(decode.url, body))
        texts += [text for text, _ in answer] == [text for text, _ in own]
        begins += [text.split()[:1] for text, _ in answer] == [text.split()[:1] for text, _ in own]
        probabilities += answer == own
    return {"asked": len(bodies), "begin_equal": begins, "texts_equal": texts, "and_logprobs_equal": probabilities}


def _lengths(decode: Engine, block: int) -> list[int]:
    """Give prompt lengths that the model takes, each one token more than full blocks."""
    longest = int(decode.model.get("max_model_len") or block * BLOCKS[-1] * 2) - TOKENS
    return [block * count + 1 for count in BLOCKS if block * count + 1 <= longest]


def _whole(asking: Asking, url: str, decode: Engine, block: int) -> dict[str, Any]:
    """Texts and log-probabilities, and the bytes that were moved for them."""
    lengths = _lengths(decode, block)
    bodies = [asking.body(asking.ids(length), TOKENS, logprobs=5) for length in lengths]
    before = decode.counters()
    routed = [told(asking.post(url, body)) for body in bodies]
    moved = counted(before, decode.counters())
    blocks = sum(length // block + 1 for length in lengths)
    size = block_bytes(decode.model, block)
    expected = None if size is None else size * blocks
    return _compared(asking, routed, decode, bodies) | {"moved": moved, "blocks": blocks, "bytes_expected": expected}


def _streamed(asking: Asking, url: str, decode: Engine, block: int) -> dict[str, Any]:
    bodies = [asking.body(asking.ids(block * count + 1), TOKENS) for count in BLOCKS[:4]]
    routed: list[Told] = [[(asking.post_stream(url, body), None)] for body in bodies]
    return _compared(asking, routed, decode, bodies)


def _chats(asking: Asking, url: str, decode: Engine, block: int) -> dict[str, Any]:
    chats = [asking.chat(decode.url, block * count - 40, block) for count in BLOCKS[:4]]
    bodies = [asking.body(chat, TOKENS, logprobs=True) for chat in chats]
    return _compared(asking, [told(asking.post(url, body)) for body in bodies], decode, bodies)


def _batch(asking: Asking, url: str, decode: Engine, block: int) -> dict[str, Any]:
    """Eight prompts in one request."""
    bodies = [asking.body(asking.ids(length), TOKENS, logprobs=5) for length in _lengths(decode, block)[:8]]
    routed = told(asking.post(url, bodies[0] | {"prompt": [body["prompt"] for body in bodies]}))
    return _compared(asking, [[answer] for answer in routed], decode, bodies)


KINDS = {"whole answers": _whole, "streams": _streamed, "chats": _chats, BATCH: _batch}


def through(asking: Asking, url: str, decode: Engine, block: int, kinds: Sequence[str]) -> dict[str, Any]:
    """Compare some kinds of request through a router."""
    found: dict[str, Any] = {}
    for kind in kinds:
        try:
            found[kind] = KINDS[kind](asking, url, decode, block)
        except (RefusedError, httpx.HTTPError, KeyError, TypeError, ValueError) as error:
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
