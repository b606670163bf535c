"""Through the router and two engines a client gets what one plain engine would have answered."""

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from support.answers import told
from support.processes import Process, engine, router, start_all, until
from support.requests import CHAT, COMPLETIONS, completion, prompt

REQUESTS = 360


@dataclass
class Fleet:
    prefills: list[Process]
    decodes: list[Process]
    plain: Process
    router: Process


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    prefills = [engine("prefill", "--speed", "20", "--kv-lease-duration", "600") for _ in range(2)]
    decodes = [engine("decode", "--speed", "20") for _ in range(2)]
    plain = engine("both", "--speed", "20")
    start_all([*prefills, *decodes, plain])
    with router(prefills, decodes) as started:
        yield Fleet(prefills, decodes, plain, started)
    for one in [*prefills, *decodes, plain]:
        one.stop()


def mixed(count: int) -> list[tuple[str, dict[str, Any]]]:
    """Give requests of all kinds, the same ones each time."""
    draw = random.Random(7)
    cached = [prompt(seed, 300) for seed in range(5)]
    made = []
    for number in range(count):
        text: Any = (
            draw.choice(cached) if draw.random() < 0.3 else prompt(1000 + number, draw.choice([1, 20, 90, 200, 500]))
        )
        fields: dict[str, Any] = {"max_tokens": draw.choice([1, 2, 16, 60])}
        if draw.random() < 0.5:
            fields |= {
                "temperature": 0.9,
                "seed": number,
                "top_p": draw.choice([0.5, 1.0]),
                "top_k": draw.choice([0, 3]),
            }
            fields["n"] = draw.choice([1, 1, 2, 3])
        if draw.random() < 0.5:
            fields["stream"] = True
            if draw.random() < 0.6:
                fields["stream_options"] = {"include_usage": True}
                if draw.random() < 0.4:
                    fields["stream_options"]["continuous_usage_stats"] = True
        fields |= draw.choice(
            [
                {}, {}, {"stop": ["a", "e"]}, {"stop": "in", "include_stop_str_in_output": True}, {"ignore_eos": True},
                {"min_tokens": fields["max_tokens"]}, {"stop_token_ids": [300, 400]}, {"return_token_ids": True},
                {"user": f"user-{number % 7}"}, {"kv_transfer_params": {"do_remote_prefill": True, "remote_host": "x"}},
            ]
        )  # fmt: skip
        if draw.random() < 0.3:
            messages = [{"role": "system", "content": "you are"}, {"role": "user", "content": text}]
            body = {"model": "tiny", "messages": messages, "temperature": 0} | fields
            if draw.random() < 0.4:
                body["max_completion_tokens"] = body.pop("max_tokens")
            if draw.random() < 0.4:
                body |= {"logprobs": True, "top_logprobs": draw.choice([0, 2])}
            if draw.random() < 0.2 and not body.get("stream"):
                body["prompt_logprobs"] = 1
            made.append((CHAT, body))
            continue
        kind = draw.random()
        if kind < 0.15:
            text = [draw.randrange(5, 8000) for _ in range(draw.choice([3, 130, 300]))]
        elif kind < 0.35:
            text = [
                prompt(5000 + number * 4 + part, draw.choice([3, 150, 260])) for part in range(draw.choice([1, 2, 4]))
            ]
        elif kind < 0.45:
            text = [[draw.randrange(5, 8000) for _ in range(draw.choice([3, 200]))] for _ in range(3)]
        if draw.random() < 0.3:
            fields["logprobs"] = draw.choice([0, 1, 5])
        if draw.random() < 0.2:
            fields["echo"] = True
            if draw.random() < 0.3:
                fields["max_tokens"] = 0
                fields.pop("min_tokens", None)
        if draw.random() < 0.1 and not fields.get("stream"):
            fields["prompt_logprobs"] = 1
        made.append((COMPLETIONS, completion(text, **fields)))
    return made


def send(process: Process, path: str, body: dict[str, Any]) -> Any:
    return told(process.post(path, body))


def test_hundreds_of_mixed_requests_are_answered_as_by_one_plain_engine(fleet: Fleet) -> None:
    requests = mixed(REQUESTS)
    assert {key for _, body in requests for key in body} >= {
        "n", "stop", "logprobs", "echo", "prompt_logprobs", "min_tokens", "max_completion_tokens", "ignore_eos", "seed",
        "stream_options", "top_logprobs", "stop_token_ids", "return_token_ids", "kv_transfer_params",
    }  # fmt: skip
    clean = [
        (path, {key: value for key, value in body.items() if key != "kv_transfer_params"}) for path, body in requests
    ]
    with ThreadPoolExecutor(12) as pool:
        routed = list(pool.map(lambda request: send(fleet.router, *request), requests))
        alone = list(pool.map(lambda request: send(fleet.plain, *request), clean))
    different = [
        (requests[number], mine, theirs)
        for number, (mine, theirs) in enumerate(zip(routed, alone, strict=True))
        if mine != theirs
    ]
    assert not different, f"{len(different)} of {len(requests)}; the first: {different[0]}"
    refused = sum(isinstance(answer, tuple) and isinstance(answer[0], int) for answer in alone)
    assert refused < 40, "most requests are meant to be valid"

    engines = [*fleet.prefills, *fleet.decodes]
    assert [entry for one in engines for entry in one.get("/sim/violations")] == []
    until(lambda: sum(one.get("/sim/state")["blocks"]["pinned"] for one in engines) == 0, 5, "no block is left pinned")
    moved = sum(edge["bytes"] for one in fleet.decodes for edge in one.get("/sim/state")["transfers"])
    assert moved > 0, "KV was really handed over"


def test_both_legs_of_a_request_carry_the_clients_request_id(fleet: Fleet) -> None:
    answer = fleet.router.post(COMPLETIONS, completion("one two"), headers={"x-request-id": "mine-1"})
    assert answer.json()["id"] == "cmpl-mine-1"


def test_every_pair_that_served_is_counted(fleet: Fleet) -> None:
    for user in range(20):
        fleet.router.post(COMPLETIONS, completion("one two", user=f"u{user}"))
    page = httpx.get(fleet.router.url.replace(":10001", ":29000") + "/metrics").text
    pairs = [line for line in page.splitlines() if line.startswith("pd_router_pairs_total")]
    assert len([line for line in pairs if 'prefill="none"' not in line]) == 4, "two by two engines, twenty users"
