"""What holds for every policy in both roles."""

from collections.abc import Iterator
from math import ceil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdrouter.policies import POLICIES, Bypassing, Commons, Learning, Scoring
from router.policies.rows import Ask, Clock, Row, blocks

ROLES = ("prefill", "decode")
EVERY = [(name, role) for name in sorted(POLICIES) for role in ROLES]
HASHES = ("chwbl", "consistent_hash", "rendezvous_hash")

names = st.lists(st.integers(0, 50), min_size=1, max_size=5, unique=True)
loads = st.builds(
    dict,
    in_flight=st.integers(0, 100),
    queued_tokens=st.integers(0, 10**6),
    held_tokens=st.integers(0, 10**6),
    waiting=st.integers(0, 50).map(float),
    kv_usage=st.floats(0, 1),
    kv_tokens=st.sampled_from([0, 640, 900_000]),
    metrics_age=st.sampled_from([0.1, 30.0, float("inf")]),
)
fleets = names.flatmap(
    lambda numbers: st.tuples(
        *(loads.map(lambda load, n=number: Row(f"http://e{n}:8000", **load)) for number in numbers)
    )
)
asks = st.builds(
    Ask,
    prefix=st.tuples(st.sampled_from("abc"), st.integers(0, 6)).map(lambda one: blocks(one[1], one[0])),
    session=st.sampled_from([None, "s1", "s2"]),
    max_tokens=st.sampled_from([0, 16, 4000]),
    text=st.sampled_from(["k1", "k2", "k3"]),
)
fast = settings(max_examples=40, deadline=None)


def serve(name: str, role: str, fleet: tuple[Row, ...], requests: list[Ask]) -> Iterator[tuple[Ask, Row, list[float]]]:
    """Choose for one request after the other as the router does, and learn from each."""
    policy = POLICIES[name](role, Commons(seed=7, clock=Clock()))
    for request in requests:
        scores = policy.scores(request, fleet) if isinstance(policy, Scoring) else []
        chosen = policy.choose(request, fleet)
        if isinstance(policy, Learning):
            assert 0 <= policy.uncached(request, chosen) <= request.tokens
            policy.routed(request, chosen)
            if len(request.prefix) % 512:
                policy.answered(request, chosen, b"answer" * 60)
            if request.max_tokens == 16:
                policy.gone(chosen)
        if isinstance(policy, Bypassing):
            assert policy.bypass(request, chosen, chosen) in (True, False)
        yield request, chosen, scores


@pytest.mark.parametrize(("name", "role"), EVERY)
@fast
@given(fleet=fleets, requests=st.lists(asks, min_size=1, max_size=8))
def test_the_choice_is_a_candidate_with_the_highest_score(name, role, fleet, requests):
    for _, chosen, scores in serve(name, role, fleet, requests):
        assert any(chosen is one for one in fleet)
        if scores:
            assert scores[fleet.index(chosen)] == max(scores)


@pytest.mark.parametrize(("name", "role"), EVERY)
@fast
@given(fleet=fleets, requests=st.lists(asks, min_size=1, max_size=8))
def test_two_policies_with_one_seed_choose_alike(name, role, fleet, requests):
    first, second = ([chosen.name for _, chosen, _ in serve(name, role, fleet, requests)] for _ in range(2))
    assert first == second


@pytest.mark.parametrize("name", HASHES)
@fast
@given(fleet=fleets, text=st.text(), turn=st.randoms(use_true_random=False))
def test_the_order_of_engines_does_not_matter_to_hashes(name, fleet, text, turn):
    shuffled = list(fleet)
    turn.shuffle(shuffled)
    first, second = (POLICIES[name]("prefill").choose(Ask(text=text), one) for one in (fleet, shuffled))
    assert first is second


@fast
@given(fleet=fleets, texts=st.lists(st.text(max_size=5), min_size=1, max_size=30))
def test_no_engine_gets_more_than_its_bounded_share(fleet, texts):
    policy = POLICIES["chwbl"]("decode")
    for text in texts:
        bound = ceil(1.25 * (sum(one.in_flight for one in fleet) + 1) / len(fleet))
        chosen = policy.choose(Ask(text=text), fleet)
        chosen.in_flight += 1
        assert chosen.in_flight <= bound


def test_a_key_has_the_same_engine_under_bounded_loads_as_long_as_that_has_room():
    fleet = [Row(f"http://e{number}:8000") for number in range(8)]
    plain, bounded = POLICIES["consistent_hash"]("prefill"), POLICIES["chwbl"]("prefill")
    for number in range(100):
        request = Ask(text=f"user:{number}")
        first = plain.choose(request, fleet)
        assert bounded.choose(request, fleet) is first
        first.in_flight = 1
        assert bounded.choose(request, fleet) is not first, "one of eight may not have two of two requests"
        first.in_flight = 0


def test_factories_share_an_index_only_within_a_router():
    request, rows = Ask(blocks(4)), [Row("e0"), Row("e1")]
    here, there = Commons(), Commons()
    decode = POLICIES["llmd_default"]("decode", here)
    assert isinstance(decode, Learning)
    decode.routed(request, rows[1])
    for commons, expected in ((here, 0), (there, request.tokens), (None, request.tokens)):
        prefill = POLICIES["llmd_default"]("prefill", commons)
        assert isinstance(prefill, Learning)
        assert prefill.uncached(request, rows[1]) == expected


@pytest.mark.parametrize("name", ["random", "power_of_two", "least_tokens", "pd_cost", "llmd_pd_guide", "llmd_default"])
def test_equal_engines_are_chosen_about_equally_often(name):
    fleet = [Row(f"e{number}") for number in range(4)]
    policy = POLICIES[name]("prefill", Commons(seed=1))
    counts = dict.fromkeys((one.name for one in fleet), 0)
    for _ in range(1000):
        counts[policy.choose(Ask(b"x" * 100), fleet).name] += 1
    assert min(counts.values()) > 180
