"""Through the router and two real vLLM engines a client gets what one real engine would have answered."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from engines.asking import chat, fresh, ids, text
from engines.real import BLOCK, STARTS, Engines
from support.answers import told
from support.processes import Process, router, until
from support.requests import COMPLETIONS, WANT_TICKET, completion

pytestmark = pytest.mark.timeout(STARTS + 300)
# vLLM 0.32 on a CPU dies of a seed where prompts take more than one step ("CPU Generator does not use offset").
SEEDED: dict[str, Any] = {"words": 12, "temperature": 0.8, "seed": 11}
USAGE = {"include_usage": True}
KINDS: dict[str, Callable[[], tuple[str, dict[str, Any]]]] = {
    "completions": text,
    "completions, streamed": lambda: text(stream=True),
    "completions, streamed with usage": lambda: text(stream=True, stream_options=USAGE),
    "completions, usage in every chunk": lambda: text(
        stream=True, stream_options=USAGE | {"continuous_usage_stats": True}
    ),
    "completions with logprobs": lambda: text(logprobs=2),
    "completions with logprobs, streamed": lambda: text(logprobs=2, stream=True),
    "echo": lambda: text(echo=True),
    "echo and logprobs": lambda: text(echo=True, logprobs=1),
    "echo and logprobs of the prompt alone": lambda: text(echo=True, logprobs=1, max_tokens=0),
    "prompt_logprobs": lambda: text(prompt_logprobs=1),
    "several choices": lambda: text(n=3, **SEEDED),
    "several choices, streamed": lambda: text(n=2, stream=True, **SEEDED),
    "sampled with a seed": lambda: text(max_tokens=30, **SEEDED),
    "a stop string": lambda: text(max_tokens=40, stop=["e", "a"]),
    "a stop string, streamed": lambda: text(max_tokens=40, stop=["er", "an"], stream=True),
    "a stop string that stays in": lambda: text(max_tokens=40, stop=["e"], include_stop_str_in_output=True),
    "min_tokens": lambda: text(max_tokens=12, min_tokens=10),
    "ignore_eos": lambda: text(max_tokens=60, ignore_eos=True),
    "default max_tokens": lambda: (COMPLETIONS, {"model": "tiny", "prompt": fresh(), "temperature": 0}),
    "a prompt of token ids": lambda: (COMPLETIONS, completion(ids(200))),
    "a prompt of exactly one block": lambda: (COMPLETIONS, completion(ids(BLOCK))),
    "a prompt one token longer than two blocks": lambda: (COMPLETIONS, completion(ids(2 * BLOCK + 1))),
    "token ids returned": lambda: text(return_token_ids=True),
    "token ids returned, streamed": lambda: text(return_token_ids=True, stream=True),
    "a list of prompts": lambda: (COMPLETIONS, completion([fresh(90), fresh(200), fresh(10)])),
    "a list of prompts, streamed": lambda: (COMPLETIONS, completion([fresh(90), fresh(200)], stream=True)),
    "a list of token ids": lambda: (COMPLETIONS, completion([ids(140), ids(30)], return_token_ids=True)),
    "chat": chat,
    "chat, streamed": lambda: chat(stream=True),
    "chat, usage in every chunk": lambda: chat(stream=True, stream_options=USAGE | {"continuous_usage_stats": True}),
    "chat with logprobs": lambda: chat(logprobs=True, top_logprobs=2),
    "chat with logprobs, streamed": lambda: chat(logprobs=True, top_logprobs=2, stream=True),
    "chat with prompt_logprobs": lambda: chat(prompt_logprobs=1),
    "chat, max_completion_tokens": lambda: chat(max_tokens=None, max_completion_tokens=9),
    "chat, min_tokens and a stop string": lambda: chat(max_tokens=40, min_tokens=6, stop=["e"]),
    "chat, several choices": lambda: chat(n=2, **SEEDED),
    "chat, token ids returned, streamed": lambda: chat(return_token_ids=True, stream=True),
}
REFUSED: dict[str, dict[str, Any]] = {
    "by both legs": {"temperature": -1},
    "by decode only": {"n": 2},
    "for another model's name": {"model": "nobody"},
}


@pytest.fixture(scope="module")
def routed(started: Engines) -> Iterator[Process]:
    with router([started.prefill], started.decodes, "--request-timeout-secs", "200") as made:
        yield made


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_request_is_answered_as_by_one_engine(engines: Engines, routed: Process, kind: str) -> None:
    path, body = KINDS[kind]()
    answer = routed.post(path, body, timeout=200)
    assert answer.status_code == 200, answer.text
    assert told(answer) == told(engines.plain.post(path, body, timeout=200))


@pytest.mark.parametrize("why", REFUSED)
def test_what_an_engine_refuses_is_refused_in_its_words(engines: Engines, routed: Process, why: str) -> None:
    path, body = text(**REFUSED[why])
    status, error = told(routed.post(path, body, timeout=200))
    assert (status, error) == told(engines.plain.post(path, body, timeout=200))
    assert status in (400, 404)
    until(engines.quiet, 20, "no ticket is left pinned")


def test_the_bytes_that_move_are_the_blocks_of_the_prompts(engines: Engines, routed: Process) -> None:
    def moved() -> float:
        return sum(one.metric("vllm:nixl_bytes_transferred_sum") for one in engines.decodes)

    before = moved()
    lengths = [1, 40, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK, 700]
    for length in lengths:
        assert routed.post(COMPLETIONS, completion(ids(length)), timeout=200).status_code == 200
    # the same prompts as one list, so none of their blocks is cached on a decode engine
    assert routed.post(COMPLETIONS, completion([ids(length) for length in lengths]), timeout=200).status_code == 200
    blocks = 2 * sum(-(-length // BLOCK) for length in lengths)
    wanted = blocks * engines.installation.block_bytes
    until(lambda: moved() - before == wanted, 20, f"{wanted} bytes, not {moved() - before}")


def test_an_engine_without_a_connector_passes_over_tickets_and_gives_none(engines: Engines) -> None:
    want = completion(fresh(), max_tokens=1, kv_transfer_params=WANT_TICKET)
    assert engines.plain.post(COMPLETIONS, want, timeout=200).json()["kv_transfer_params"] is None
    ticket = engines.prefill.post(COMPLETIONS, want, timeout=200).json()["kv_transfer_params"]
    body = completion(want["prompt"], kv_transfer_params=ticket)
    texts = [told(one.post(COMPLETIONS, body, timeout=200)) for one in (engines.plain, engines.decodes[0])]
    assert texts[0] == texts[1]


def test_after_many_requests_nothing_is_held_expired_or_failed(engines: Engines, routed: Process) -> None:
    names = ("vllm:nixl_num_failed_transfers_total", "vllm:nixl_num_kv_expired_reqs_total")

    def trouble() -> float:
        return sum(one.metric(name) for one in (engines.prefill, *engines.decodes) for name in names)

    before = trouble()
    bodies = [completion(fresh(60), stream=number % 2 == 0) for number in range(24)]
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda body: routed.post(COMPLETIONS, body, timeout=200), bodies))
    assert [answer.status_code for answer in answers] == [200] * len(bodies)
    until(engines.quiet, 20, "no block is held")
    assert trouble() == before
