"""The engines chosen are those that the real vllm-router 0.1.17 chose (scripts/record_decisions.py)."""

import gzip
import json
import math
import pathlib
from collections import Counter
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdrouter.openai.features import Prompt
from pdrouter.openai.routing_key import KeySources, body_key, forwarded_text_key
from pdrouter.policies import POLICIES, ConsistentHash, RoutingKey
from pdrouter.policies import fbi_hash as fbi_hash_module
from pdrouter.policies.fbi_hash import fbi_hash

routing_key = KeySources().routing_key

FILE = pathlib.Path(__file__).parent / "data" / "decisions.jsonl.gz"
AGREEING = {
    "header", "headers", "empty_header", "user", "session_id", "user_id", "session_params", "number_user_id",
}  # fmt: skip
WITHOUT_KEY = {"no_key", "no_key_fields", "null_user"}
DIFFERENT = {"chat_user", "user_in_prompt", "quote_in_user", "empty_user", "null_user_id", "fraction_user_id"}


@dataclass(frozen=True)
class Candidate:
    name: str
    in_flight: int = 0
    queued_tokens: int = 0
    held_tokens: int = 0
    waiting: float = 0.0
    running: float = 0.0
    kv_usage: float = 0.0
    kv_tokens: int = 0
    metrics_age: float = math.inf


class Fleet:
    """Both roles of one recorded fleet."""

    def __init__(self, line: dict[str, Any]) -> None:
        self.urls = line["prefill"], line["decode"]
        self._candidates = [tuple(map(Candidate, urls)) for urls in self.urls]
        self._policies = [ConsistentHash(), ConsistentHash()]

    def choose(self, key: RoutingKey) -> tuple[int, int]:
        prefill, decode = (
            urls.index(policy.choose(Prompt(key, {}), candidates).name)
            for urls, policy, candidates in zip(self.urls, self._policies, self._candidates, strict=True)
        )
        return prefill, decode


def decisions() -> list[tuple[Fleet, dict[str, Any]]]:
    found: list[tuple[Fleet, dict[str, Any]]] = []
    fleet: Fleet | None = None
    for line in map(json.loads, gzip.decompress(FILE.read_bytes()).decode().splitlines()):
        if fleet is not None and "kind" in line:
            found.append((fleet, line))
        else:
            fleet = Fleet(line)
    return found


DECISIONS = decisions()


def ours(line: dict[str, Any]) -> RoutingKey:
    headers = [(name.encode(), value.encode()) for name, value in line["headers"].items()]
    return routing_key(headers, json.loads(line["body"]), line["body"].encode())


def agreement(kinds: set[str]) -> tuple[int, int]:
    lines = [(fleet, line) for fleet, line in DECISIONS if line["kind"] in kinds]
    same = sum(fleet.choose(ours(line)) == (line["prefill"], line["decode"]) for fleet, line in lines)
    return same, len(lines)


def test_all_recorded_kinds_are_judged():
    assert {line["kind"] for _, line in DECISIONS} == AGREEING | WITHOUT_KEY | DIFFERENT


def test_the_same_engines_are_chosen_wherever_the_key_sources_agree():
    same, asked = agreement(AGREEING)
    assert asked >= 2000
    assert same == asked


def test_vllm_routers_choice_for_a_body_without_key_follows_from_the_text_it_forwards():
    lines = [(fleet, line) for fleet, line in DECISIONS if line["kind"] in WITHOUT_KEY]
    assert len(lines) >= 400
    for fleet, line in lines:
        key = RoutingKey(forwarded_text_key(line["seen"]), "request_hash")
        assert fleet.choose(key) == (line["prefill"], line["decode"])


def test_a_body_without_key_is_hashed_as_the_client_sent_it():
    assert routing_key((), {}, b'{"prompt":"a"}').source == "request_hash"
    assert routing_key((), {}, b'{"prompt":"a"}').text == routing_key((), {}, b'{"prompt":"a"}').text
    assert routing_key((), {}, b'{"prompt":"a"}').text != routing_key((), {}, b'{"prompt":"b"}').text


def test_a_chat_clients_user_keeps_its_engines_where_vllm_router_scatters_them():
    lines = [(fleet, line) for fleet, line in DECISIONS if line["kind"] == "chat_user"]
    for _, line in lines:
        assert ours(line).text == f"user:{json.loads(line['body'])['user']}"
    same, asked = agreement({"chat_user"})
    assert same < asked / 2, "vllm-router did not see the field"


def test_user_in_a_prompts_text_is_no_key_here_but_is_to_vllm_router():
    lines = [(fleet, line) for fleet, line in DECISIONS if line["kind"] == "user_in_prompt"]
    for fleet, line in lines:
        assert ours(line).source == "request_hash"
        word = json.loads(line["body"])["prompt"].split("user: ")[1].split(" ")[0].split(",")[0]
        assert fleet.choose(RoutingKey(f"user:{word}", "")) == (line["prefill"], line["decode"])


def test_a_quote_is_part_of_a_user_here_and_ends_it_for_vllm_router():
    for fleet, line in DECISIONS:
        if line["kind"] == "quote_in_user":
            user = json.loads(line["body"])["user"]
            assert ours(line).text == f"user:{user}"
            seen = "user:" + user.replace('"', '\\"').split('"')[0]
            assert fleet.choose(RoutingKey(seen, "")) == (line["prefill"], line["decode"])


@pytest.mark.parametrize("kind", ["empty_user", "null_user_id", "fraction_user_id"])
def test_values_that_name_nobody_are_keys_to_vllm_router_only(kind):
    for fleet, line in DECISIONS:
        if line["kind"] == kind:
            assert ours(line).source == "request_hash"
            body = json.loads(line["body"])
            value = body["user"] if kind == "empty_user" else json.dumps(body["user_id"])
            assert fleet.choose(RoutingKey(f"user:{value}", "")) == (line["prefill"], line["decode"])


def test_session_params_that_are_no_object_are_passed_over():
    assert body_key({"session_params": "x", "user": "u"}).text == "user:u"
    assert body_key({"session_params": {"session_id": 7}}).text == "session:7"
    assert body_key({"user": True, "session_id": ["a"]}) is None


def test_the_last_of_a_repeated_header_and_only_ascii_counts():
    def text(*pairs: tuple[str, bytes]) -> str:
        return routing_key([(name.encode(), value) for name, value in pairs], {}, b"{}").text

    assert text(("x-session-id", b"a"), ("x-session-id", b"b")) == "header:x-session-id:b"
    assert text(("x-session-id", "é".encode()), ("x-user-id", b"u")) == "header:x-user-id:u"


@given(data=st.binary(max_size=40))
def test_the_fast_way_to_furc_hash_gives_what_trying_bit_by_bit_gives(data):
    assert fbi_hash_module._furc(data) == fbi_hash_module._furc_by_tries(data)


urls = st.lists(st.integers(1, 10_000), min_size=1, max_size=6, unique=True).map(
    lambda numbers: [Candidate(f"http://10.0.0.1:{number}") for number in numbers]
)


@given(candidates=urls, key=st.text(), data=st.data())
def test_a_lost_engine_moves_only_its_own_keys(candidates, key, data):
    policy = ConsistentHash()
    routing = RoutingKey(key, "")
    chosen = policy.choose(Prompt(routing, {}), candidates)
    others = [one for one in candidates if one is not chosen]
    if others:
        lost = data.draw(st.sampled_from(others))
        assert policy.choose(Prompt(routing, {}), [one for one in candidates if one is not lost]) == chosen
        assert policy.choose(Prompt(routing, {}), others) in others


@given(candidates=urls, key=st.text(), turn=st.randoms(use_true_random=False))
def test_the_order_of_engines_does_not_matter_to_the_ring(candidates, key, turn):
    shuffled = list(candidates)
    turn.shuffle(shuffled)
    routing = RoutingKey(key, "")
    first, second = (ConsistentHash().choose(Prompt(routing, {}), one) for one in (candidates, shuffled))
    # Two engines with one place on the ring are the only exception: the later one has it, as in vllm-router.
    places = Counter(fbi_hash(f"{one.name}:{i}") for one in candidates for i in range(160))
    assert first == second or max(places.values()) > 1


def test_round_robin_takes_each_engine_in_turn():
    candidates = [Candidate(str(number)) for number in range(3)]
    policy, key = POLICIES["round_robin"]("decode"), Prompt(RoutingKey("", ""), {})
    assert [policy.choose(key, candidates).name for _ in range(7)] == list("0120120")


def test_random_takes_every_engine_about_equally_often():
    candidates = [Candidate(str(number)) for number in range(4)]
    policy, key = POLICIES["random"]("decode"), Prompt(RoutingKey("", ""), {})
    counts = Counter(policy.choose(key, candidates).name for _ in range(4000))
    assert len(counts) == 4
    assert min(counts.values()) > 800
