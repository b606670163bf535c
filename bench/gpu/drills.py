"""What goes wrong on purpose: clients that leave between the legs, a decode engine killed under its streams."""

import http.client
import json
import subprocess
import threading
import time
import uuid
from collections.abc import Sequence
from statistics import median
from typing import Any
from urllib.parse import urlsplit

from asking import COMPLETIONS, Asking, RefusedError, Streamed, first_difference
from routers import Router

from engine import Engine, samples, seconds_until

PROMPT = 16_000  # tokens: prefill takes half a second
LEASE = 40.0  # seconds of patience, a lease of 30 s and some
KILLED = 160  # tokens of a stream that is cut


def _prompt_tokens(prefill: Engine) -> int:
    """Give a length of which the KV cache holds more than a dozen."""
    told = prefill.cache()
    longest = int(prefill.model.get("max_model_len") or PROMPT) - 64
    room = int(told["num_gpu_blocks"]) * int(told["block_size"]) if told["num_gpu_blocks"].isdecimal() else PROMPT * 16
    return min(PROMPT, longest, room // 16)


def _share(asking: Asking, prefill: Engine, decode: Engine, body: dict[str, Any]) -> float:
    """Measure the share of the KV cache that a prompt takes while its ticket waits for decode.

    Raises:
        RefusedError: the engine's figures do not show it.
    """
    asking.post(prefill.url, asking.body(asking.ids(3), 1))
    idle = prefill.held
    ticket = asking.ticket(prefill.url, body)
    share = prefill.held - idle
    asking.post(decode.url, body | {"kv_transfer_params": ticket})
    if share <= 0:
        raise RefusedError(f"{prefill.url} shows no KV blocks held for a ticket (vllm:kv_cache_usage_perc)")
    return share


def _leave(url: str, body: dict[str, Any], after: float) -> bool:
    """Send a streaming request and close the connection some seconds later; say whether an answer had begun by then."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=60)
    sent = time.monotonic()
    connection.request("POST", COMPLETIONS, json.dumps(body | {"stream": True}), {"Content-Type": "application/json"})
    assert connection.sock is not None
    connection.sock.settimeout(max(0.001, after - (time.monotonic() - sent)))
    began = False
    try:
        began = bool(connection.sock.recv(1))
        time.sleep(max(0.0, after - (time.monotonic() - sent)))
    except TimeoutError:
        pass
    connection.close()
    return began


def _free(prefill: Engine, asking: Asking, above: float, patience: float) -> float | None:
    """Give the seconds until prefill holds less.

    It is asked something small five times a second: an engine at rest may neither hear of collected blocks nor count.
    """
    began = time.monotonic()
    while time.monotonic() - began < patience:
        if seconds_until(lambda: prefill.held < above, 0.2) is not None:
            return round(time.monotonic() - began, 3)
        asking.post(prefill.url, asking.body(asking.ids(3), 1))
    return None


def leaving(router: Router, asking: Asking, prefill: Engine, decode: Engine, each: bool) -> dict[str, Any]:
    """Let clients leave before, between and after the legs; see when prefill's KV blocks are free.

    Args:
        router: through which they ask.
        asking: for the model.
        prefill: whose blocks are watched.
        decode: to know how long its leg takes.
        each: wait for the blocks of each; else leave one after the other and wait for all, at most a lease.
    """
    tokens = _prompt_tokens(prefill)

    def body() -> dict[str, Any]:
        return asking.body(asking.ids(tokens), 32)

    took, first = [], []
    for _ in range(3):
        began = time.perf_counter()
        asking.post(prefill.url, body() | {"max_tokens": 1})
        took.append(time.perf_counter() - began)
        first.append(asking.stream(router.url, body(), Streamed()).times[0])
    leg, ttft = median(took), median(first)
    share = _share(asking, prefill, decode, body())
    _free(prefill, asking, share / 4, 5.0)
    idle = prefill.held
    between = ttft - leg
    moments = [
        leg * 0.5,
        leg * 0.9,
        *(leg + between * part for part in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8)),
        ttft + 0.05,
    ]
    before = samples(router.metrics) if router.metrics else {}
    generated = decode.counters()["generated_tokens"]
    rows: list[dict[str, Any]] = []
    for after in moments:
        began = _leave(router.url, body(), after)
        row: dict[str, Any] = {"left_after_ms": round(after * 1e3, 1), "answer_had_begun": began}
        if each:
            row["free_after_s"] = _free(prefill, asking, idle + share / 4, LEASE)
        rows.append(row)
        print(f"  {router.name}: {row}", flush=True)
    found: dict[str, Any] = {
        "tokens": tokens, "prefill_ms": round(leg * 1e3, 1), "ttft_ms": round(ttft * 1e3, 1), "moments": rows,
        "prompts_held_after_1_s": None, "all_free_after_s": None,
    }  # fmt: skip
    time.sleep(1.0)
    asking.post(prefill.url, asking.body(asking.ids(3), 1))
    found["prompts_held_after_1_s"] = round((prefill.held - idle) / share, 1)
    found["all_free_after_s"] = _free(prefill, asking, idle + share / 4, LEASE)
    found["generated_for_nobody"] = decode.counters()["generated_tokens"] - generated
    if router.metrics:
        after_all = samples(router.metrics)
        found["router"] = {name: value - before.get(name, 0.0) for name, value in after_all.items()
                           if name.endswith("_total") and value != before.get(name, 0.0)}  # fmt: skip
    return found


def _served_by(router: Router, asking: Asking, decode: Engine, wanted: int) -> tuple[list[str], list[str]]:
    """Find users whose requests go to a decode engine, and others."""
    assert router.metrics is not None
    there: list[str] = []
    elsewhere: list[str] = []
    while len(there) < wanted or len(elsewhere) < wanted:
        if len(there) + len(elsewhere) > 20 * wanted:
            raise RefusedError(f"no users found for both decode engines: {len(there)} and {len(elsewhere)}")
        user = uuid.uuid4().hex
        before = decode.counters()["generated_tokens"]
        asking.post(router.url, asking.body(asking.ids(8), 8, user=user))
        # counted with the engine's next report, which is there when the answer is
        (there if decode.counters()["generated_tokens"] - before >= 4 else elsewhere).append(user)
    return there[:wanted], elsewhere[:wanted]


def killing(
    router: Router, asking: Asking, prefill: Engine, killed: Engine, other: Engine, command: str, block: int
) -> dict[str, Any]:
    """Kill a decode engine while it streams. Every stream has to go on with the other engine, none loses a token.

    The rest of a cut stream is compared with what the other engine makes of the prompt and the ids before the cut,
    handed over by hand in the same way, which is equal to the bit with engines that round alike. A stream as a whole
    can part from one that was not cut where two tokens are a rounding step apart.

    Args:
        router: in front of both.
        asking: for the model.
        prefill: their prefill engine.
        killed: the decode engine to kill.
        other: the one that goes on.
        command: shell command that kills it.
        block: tokens of a KV block.
    """
    there, elsewhere = _served_by(router, asking, killed, 4)
    prompts = [asking.ids(8 * block + 1) for _ in range(8)]
    streams = [Streamed() for _ in prompts]
    bodies = [asking.body(prompt, KILLED, user=user)
              for prompt, user in zip(prompts, (*there, *elsewhere), strict=True)]  # fmt: skip
    threads = [threading.Thread(target=asking.stream, args=(router.url, body, stream))
               for body, stream in zip(bodies, streams, strict=True)]  # fmt: skip
    for thread in threads:
        thread.start()
    seconds_until(lambda: all(len(stream.ids) >= KILLED // 4 for stream in streams[: len(there)]), 60)
    at = [len(stream.ids) for stream in streams]
    done = subprocess.run(command, shell=True, check=False, timeout=30)
    for thread in threads:
        thread.join(180)
    if done.returncode or seconds_until(lambda: not killed.alive, 5.0) is None:
        raise RefusedError(f"{command!r} ended with status {done.returncode} and did not kill {killed.url}")
    rows = []
    for number, (prompt, stream) in enumerate(zip(prompts, streams, strict=True)):
        gaps = [later - earlier for earlier, later in zip(stream.times, stream.times[1:], strict=False)]
        row: dict[str, Any] = {
            "on_killed_engine": number < len(there), "tokens_at_kill": at[number], "tokens": len(stream.ids),
            "error": stream.error, "longest_gap_ms": round(max(gaps, default=0.0) * 1e3),
        }  # fmt: skip
        row["was_cut"] = number < len(there) and at[number] < KILLED
        if row["was_cut"] and stream.error is None and gaps:
            cut = gaps.index(max(gaps)) + 1
            row |= {"cut_after": cut} | _rest(asking, prefill, other, prompt, stream.ids, cut)
        rows.append(row)
        print(f"  {row}", flush=True)
    assert router.metrics is not None
    return {
        "streams": rows, "continued": samples(router.metrics).get("pd_router_continued_streams_total"),
        "complete": sum(stream.error is None and len(stream.ids) == KILLED for stream in streams),
    }  # fmt: skip


def _rest(
    asking: Asking, prefill: Engine, decode: Engine, prompt: list[int], ids: Sequence[int], cut: int
) -> dict[str, Any]:
    """Compare a stream's rest with one handed over by hand from the cut or a little before, as the router does."""
    whole = asking.own(decode.url, asking.body(prompt, KILLED, return_token_ids=True))["choices"][0]["token_ids"]
    parts = first_difference(ids, whole)
    found: dict[str, Any] = {"parts_from_undisturbed_at": parts, "rest_equal_by_hand": False}
    for begin in range(cut, max(0, cut - 6), -1):
        salt = uuid.uuid4().hex
        asking.post(prefill.url, asking.body(prompt, 1, cache_salt=salt))  # what prefill had in its cache
        body = asking.body([*prompt, *ids[:begin]], KILLED - begin, cache_salt=salt, return_token_ids=True)
        ticket = asking.ticket(prefill.url, body)
        rest = asking.post(decode.url, body | {"kv_transfer_params": ticket})["choices"][0]["token_ids"]
        if rest == list(ids[begin:]):
            return found | {"rest_equal_by_hand": True, "went_on_at": begin}
    return found
