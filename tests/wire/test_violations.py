"""Whatever a router does against the handoff protocol is answered as real vLLM answers it, and listed."""

import itertools
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from support.processes import Process, engine, start_all, until
from support.requests import COMPLETIONS, WANT_TICKET, completion, prompt

seeds = itertools.count(1)


class Pair:
    """A prefill and a decode engine, a plain one to compare with, and a client that drives them by hand."""

    def __init__(self, *decode_flags: str) -> None:
        self.prefill = engine("prefill", "--speed", "20")
        self.decode = engine("decode", "--speed", "20", *decode_flags)
        self.plain = engine("both", "--speed", "20")
        self.all = [self.prefill, self.decode, self.plain]

    def ticket(self, text: Any, **fields: Any) -> dict[str, Any]:
        body = completion(text, **{"max_tokens": 1, "kv_transfer_params": WANT_TICKET} | fields)
        answer = self.prefill.post(COMPLETIONS, body)
        assert answer.status_code == 200, answer.text
        ticket: dict[str, Any] = answer.json()["kv_transfer_params"]
        return ticket

    def collect(self, text: Any, ticket: dict[str, Any], **fields: Any) -> httpx.Response:
        return self.decode.post(COMPLETIONS, completion(text, kv_transfer_params=ticket, **fields))

    def plainly(self, text: Any, **fields: Any) -> str:
        return text_of(self.plain.post(COMPLETIONS, completion(text, **fields)))

    def rules(self) -> set[str]:
        told = [*self.prefill.get("/sim/violations"), *self.decode.get("/sim/violations")]
        assert all(set(entry) == {"rule", "request_id", "fields", "at"} for entry in told)
        return {entry["rule"] for entry in told}

    def forget(self) -> None:
        self.prefill.post("/sim/fault", {"kind": "expire_leases"})  # what an earlier test left behind
        for one in (self.prefill, self.decode):
            httpx.delete(one.url + "/sim/violations")


def text_of(answer: httpx.Response, choice: int = 0) -> str:
    text: str = answer.json()["choices"][choice]["text"]
    return text


@pytest.fixture(scope="module")
def shared() -> Iterator[Pair]:
    made = Pair()
    start_all(made.all)
    yield made
    for one in made.all:
        one.stop()


@pytest.fixture
def pair(shared: Pair) -> Pair:
    shared.forget()
    return shared


@pytest.fixture
def mortal(pair: Pair) -> Iterator[Pair]:
    """The pair with another decode engine, which may die in the test."""
    made = Pair()
    made.prefill, made.plain = pair.prefill, pair.plain
    with made.decode:
        yield made


def fresh(words: int = 300) -> str:
    return prompt(next(seeds), words)


def test_a_right_handoff_gives_the_plain_engines_text_and_no_violation(pair: Pair) -> None:
    text = fresh()
    answer = pair.collect(text, pair.ticket(text), max_tokens=40)
    assert text_of(answer) == pair.plainly(text, max_tokens=40)
    assert pair.rules() == set()
    assert pair.prefill.get("/sim/state")["tickets"] == 0


@pytest.mark.parametrize(
    ("rule", "fields", "status"),
    [
        ("prefill_stream", {"stream": True}, 200),
        ("prefill_stream_options", {"stream_options": {"include_usage": True}}, 400),
        ("prefill_min_tokens", {"min_tokens": 4}, 400),
        ("prefill_max_tokens", {"max_tokens": 5}, 200),
        ("prefill_n", {"n": 2, "temperature": 0.5}, 200),
        ("prefill_scores_disaggregated", {"prompt_logprobs": 1}, 200),
        ("prefill_scores_disaggregated", {"echo": True, "logprobs": 1}, 200),
        ("client_ticket", {"kv_transfer_params": WANT_TICKET | {"remote_host": "10.0.0.1"}}, 200),
        ("prefill_batch", {"prompt": ["one two", "three four"]}, 200),
    ],
)
def test_a_wrong_field_in_the_prefill_leg_is_listed(pair: Pair, rule: str, fields: dict[str, Any], status: int) -> None:
    body = completion(fresh(20), max_tokens=1, kv_transfer_params=WANT_TICKET) | fields
    assert pair.prefill.post(COMPLETIONS, body).status_code == status
    assert rule in pair.rules()


def test_max_completion_tokens_above_one_in_the_prefill_leg_is_listed(pair: Pair) -> None:
    messages = [{"role": "user", "content": fresh(20)}]
    body = {"model": "tiny", "messages": messages, "max_tokens": 1, "max_completion_tokens": 8}
    answer = pair.prefill.post("/v1/chat/completions", body | {"kv_transfer_params": WANT_TICKET})
    assert answer.json()["usage"]["completion_tokens"] > 1, "vLLM obeys max_completion_tokens"
    assert pair.rules() == {"prefill_max_completion_tokens"}


def test_a_ticket_used_twice_is_listed(pair: Pair) -> None:
    text = fresh()
    ticket = pair.ticket(text)
    pair.collect(text, ticket)
    assert pair.rules() == set()
    pair.decode.post("/reset_prefix_cache", {})
    pair.collect(text, ticket)
    assert pair.rules() == {"ticket_reused"}


def test_a_choice_that_fetches_after_another_has_freed_the_blocks_is_listed(pair: Pair) -> None:
    """Decode has room for one of the two choices."""
    made = Pair("--num-gpu-blocks", "12")
    made.prefill = pair.prefill
    ids = list(range(10, 1010))
    with made.decode:
        answer = made.collect(ids, made.ticket(ids), max_tokens=150, n=2, temperature=0.7, ignore_eos=True)
        assert answer.status_code == 200
        assert made.rules() == {"ticket_reused"}


def test_a_ticket_of_another_prompt_gives_wrong_text_with_status_200_and_poisons_the_cache(pair: Pair) -> None:
    own, foreign = fresh(300), fresh(310)
    answer = pair.collect(own, pair.ticket(foreign))
    assert answer.status_code == 200
    assert text_of(answer) != pair.plainly(own)
    assert text_of(pair.decode.post(COMPLETIONS, completion(own))) != pair.plainly(own), "the prefix cache is poisoned"
    assert pair.rules() == {"ticket_other_prompt"}


def test_one_ticket_for_a_batch_spoils_every_prompt_but_the_first(pair: Pair) -> None:
    texts = [fresh(300), fresh(300)]
    answer = pair.collect(texts, pair.ticket(texts))
    assert answer.status_code == 200
    assert [text_of(answer, n) == pair.plainly(text) for n, text in enumerate(texts)] == [True, False]
    assert {"prefill_batch", "ticket_batched", "ticket_other_prompt"} <= pair.rules()


@pytest.mark.parametrize(
    "altered",
    [{"tp_size": 2}, {"remote_num_tokens": 5}, {"transfer_mode": None}, {"do_remote_decode": True}],
    ids=str,
)
def test_an_altered_ticket_is_listed_with_the_field(pair: Pair, altered: dict[str, Any]) -> None:
    text = fresh()
    answer = pair.collect(text, pair.ticket(text) | altered)
    assert text_of(answer) == pair.plainly(text)
    entries = [entry for entry in pair.decode.get("/sim/violations") if entry["rule"] == "ticket_altered"]
    assert len(entries) == 1
    assert set(altered) <= set(entries[0]["fields"])


def test_a_ticket_that_no_prefill_engine_issued_is_listed_as_the_clients(pair: Pair) -> None:
    text = fresh()
    pair.collect(text, pair.ticket(text) | {"remote_request_id": "cmpl-made-up"})
    assert "client_ticket" in pair.rules()


def test_parameters_that_ask_for_nothing_are_listed_as_the_clients(pair: Pair) -> None:
    assert pair.collect(fresh(10), {"foo": 1}).status_code == 200
    assert pair.rules() == {"client_ticket"}


def test_a_ticket_of_another_model_is_listed(pair: Pair) -> None:
    other = engine("prefill", "--speed", "20", model="other")
    text = fresh()
    with other:
        body = completion(text, model="other", max_tokens=1, kv_transfer_params=WANT_TICKET)
        pair.collect(text, other.post(COMPLETIONS, body).json()["kv_transfer_params"])
    assert "ticket_other_model" in pair.rules()


def test_an_expired_ticket_gives_wrong_text_with_status_200_once_its_blocks_are_overwritten() -> None:
    made = Pair()
    # blocks for two prompts only, so that the second and third overwrite the first
    made.prefill = engine("prefill", "--speed", "20", "--num-gpu-blocks", "7")
    made.all[0] = made.prefill
    start_all(made.all)
    try:
        text = fresh(400)
        ticket = made.ticket(text)
        made.prefill.post("/sim/fault", {"kind": "expire_leases"})
        for _ in range(2):
            other = fresh(400)
            made.collect(other, made.ticket(other))
        answer = made.collect(text, ticket)
        assert answer.status_code == 200
        assert text_of(answer) != made.plainly(text)
        assert {"ticket_never_collected", "ticket_expired"} <= made.rules()
    finally:
        for one in made.all:
            one.stop()


def test_a_ticket_never_collected_is_listed_when_its_lease_ends_and_its_blocks_are_free_again() -> None:
    with engine("prefill", "--kv-lease-duration", "1") as prefill:
        body = completion(fresh(), max_tokens=1, kv_transfer_params=WANT_TICKET)
        prefill.post(COMPLETIONS, body)
        assert prefill.get("/sim/state")["blocks"]["pinned"] > 0
        until(lambda: prefill.get("/sim/state")["blocks"]["pinned"] == 0, 5, "the lease ends")
        assert [entry["rule"] for entry in prefill.get("/sim/violations")] == ["ticket_never_collected"]
        assert (
            'nixl_num_kv_expired_reqs_total{engine="0",model_name="tiny"} 1.0'
            in httpx.get(prefill.url + "/metrics").text
        )


def test_a_decode_request_that_is_refused_releases_its_ticket(pair: Pair) -> None:
    text = fresh()
    answer = pair.collect(text, pair.ticket(text), min_tokens=50)
    assert answer.status_code == 400
    until(lambda: pair.prefill.get("/sim/state")["tickets"] == 0, 10, "the ticket is released")
    assert pair.rules() == set()


def refused(one: Process, ticket: dict[str, Any], **fields: Any) -> httpx.Response:
    """Send an engine a request that it refuses, with a ticket that is thereby released, or not."""
    return one.post(COMPLETIONS, completion([0], **{"max_tokens": 1, "kv_transfer_params": ticket} | fields))


def held(pair: Pair) -> bool:
    """Whether a ticket is still held after another one, sent for release later, was released."""
    text = fresh(5)
    pair.collect(text, pair.ticket(text))  # the two engines know each other
    later = pair.ticket(fresh(20))
    before = pair.prefill.get("/sim/state")["tickets"]
    assert refused(pair.decode, later, min_tokens=2).status_code == 400
    until(lambda: pair.prefill.get("/sim/state")["tickets"] < before, 10, "the later ticket is released")
    return bool(pair.prefill.get("/sim/state")["tickets"])


@pytest.mark.parametrize(
    "fields",
    [
        {"min_tokens": 2}, {"n": 3}, {"max_tokens": 0}, {"temperature": -1}, {"model": "nobody"}, {"stop": ""},
        {"prompt": [0] * 140_000}, {"prompt": [9999]}, {"stream": True, "min_tokens": 2},
    ],
    ids=str,
)  # fmt: skip
def test_a_refusal_of_a_request_that_could_be_read_releases_its_ticket(pair: Pair, fields: dict[str, Any]) -> None:
    text = fresh()
    pair.collect(text, pair.ticket(text))
    ticket = pair.ticket(fresh())
    assert refused(pair.decode, ticket, **fields).status_code in (400, 404)
    until(lambda: pair.prefill.get("/sim/state")["tickets"] == 0, 10, "the ticket is released")
    assert pair.rules() == set()


@pytest.mark.parametrize(
    "fields",
    [{"prompt": ""}, {"prompt": None}, {"max_tokens": "x"}, {"stream_options": {"include_usage": True}}],
    ids=str,
)
def test_a_refusal_while_the_body_is_read_does_not_release_the_ticket(pair: Pair, fields: dict[str, Any]) -> None:
    ticket = pair.ticket(fresh())
    assert refused(pair.decode, ticket, **fields).status_code == 400
    assert held(pair)


def test_prefill_does_not_release_its_own_ticket(pair: Pair) -> None:
    ticket = pair.ticket(fresh())
    assert refused(pair.prefill, ticket, min_tokens=2).status_code == 400
    assert held(pair)


def test_a_decode_engine_that_does_not_know_prefill_releases_with_its_next_step(pair: Pair) -> None:
    stranger = engine("decode", "--speed", "20")
    with stranger:
        ticket = pair.ticket(fresh())
        assert refused(stranger, ticket, min_tokens=2).status_code == 400
        assert held(pair)
        assert stranger.post(COMPLETIONS, completion(fresh(5))).status_code == 200
        until(lambda: pair.prefill.get("/sim/state")["tickets"] == 0, 10, "the ticket is released")
        second = pair.ticket(fresh())
        assert refused(stranger, second, min_tokens=2).status_code == 400
        until(lambda: pair.prefill.get("/sim/state")["tickets"] == 0, 10, "now one refusal is enough")


@pytest.mark.parametrize(
    "key", ["remote_block_ids", "remote_engine_id", "remote_request_id", "remote_host", "remote_port"]
)
def test_decode_dies_of_an_incomplete_ticket_in_a_request_that_it_refuses(mortal: Pair, key: str) -> None:
    ticket = mortal.ticket(fresh())
    del ticket[key]
    assert refused(mortal.decode, ticket, min_tokens=2).status_code == 400
    until(lambda: mortal.decode.process.poll() == 1, 5, "the engine process ends")
    assert "violation ticket_missing_keys" in mortal.decode.output()


def test_an_engine_that_cannot_be_reached_is_listed_and_the_prompt_computed_again(pair: Pair) -> None:
    text = fresh()
    answer = pair.collect(text, pair.ticket(text) | {"remote_port": 5999})
    assert text_of(answer) == pair.plainly(text)
    assert pair.rules() == {"ticket_unreachable"}


def test_under_policy_fail_an_unreachable_engine_is_a_500(mortal: Pair) -> None:
    strict = engine("decode", "--speed", "20", "--kv-load-failure-policy", "fail")
    with strict:
        text = fresh()
        body = completion(text, kv_transfer_params=mortal.ticket(text) | {"remote_port": 5999})
        answer = strict.post(COMPLETIONS, body)
        assert (answer.status_code, answer.json()["error"]["message"]) == (500, "Internal server error")
        streamed = strict.post(COMPLETIONS, body | {"stream": True})
        assert streamed.status_code == 200
        assert streamed.text.endswith("data: [DONE]\n\n")
        assert '"message": "Internal server error"' in streamed.text
        assert strict.get("/sim/state")["running"] == 0


@pytest.mark.parametrize("key", ["remote_request_id", "remote_host"])
def test_decode_waits_forever_without_a_key_and_dies_when_the_client_gives_up(mortal: Pair, key: str) -> None:
    text = fresh()
    ticket = mortal.ticket(text)
    del ticket[key]
    with pytest.raises(httpx.ReadTimeout):
        mortal.decode.post(COMPLETIONS, completion(text, kv_transfer_params=ticket), timeout=1)
    rule = "ticket_missing_request_id" if key == "remote_request_id" else "ticket_missing_keys"
    assert rule in mortal.decode.output() or rule in mortal.rules()
    until(lambda: mortal.decode.process.poll() == 1, 5, "the engine process ends")


@pytest.mark.parametrize("key", ["remote_engine_id", "remote_block_ids"])
def test_decode_dies_at_once_without_a_key(mortal: Pair, key: str) -> None:
    text = fresh()
    ticket = mortal.ticket(text)
    del ticket[key]
    answer = mortal.collect(text, ticket)
    assert answer.status_code == 500
    assert "EngineCore encountered an issue" in answer.json()["error"]["message"]
    until(lambda: mortal.decode.process.poll() == 1, 5, "the engine process ends")
    assert "violation ticket_missing_keys" in mortal.decode.output()


def test_decode_dies_of_a_ticket_for_a_shorter_prompt(mortal: Pair) -> None:
    answer = mortal.collect(fresh(500), mortal.ticket(fresh(100)))
    assert answer.status_code == 500
    until(lambda: mortal.decode.process.poll() == 1, 5, "the engine process ends")
