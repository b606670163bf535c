"""Choices by predicted time."""

import pytest

from pdrouter.policies import Commons
from pdrouter.policies.pd_cost import Costs, PdCost
from router.policies.rows import Ask, blocks, rows


def both() -> tuple[PdCost, PdCost]:
    commons = Commons(seed=0)
    return PdCost.of("prefill", commons), PdCost.of("decode", commons)


def test_prefill_prefers_a_cached_engine_until_its_queue_costs_more():
    prefill, _ = both()
    fleet, request = rows({}, {}), Ask(blocks(16))
    prefill.routed(request, fleet[0])
    fleet[0].queued_tokens = 1000
    assert prefill.choose(request, fleet) is fleet[0], "1000 + 1 tokens against 1024"
    fleet[0].queued_tokens = 1024
    assert prefill.choose(request, fleet) is fleet[1]


def test_prefill_predicts_the_first_token_from_queue_rate_and_transfer():
    prefill, _ = both()
    fleet = rows({"queued_tokens": 40_915})
    assert prefill.scores(Ask(b"x" * 4000), fleet) == pytest.approx([-(1.0 + 1000 / 40_915 + 0.0179 + 1000 * 1.97e-6)])


def test_decode_predicts_the_time_between_tokens_that_was_measured():
    _, decode = both()
    for context, requests, measured in ((1000, 1, 4.89), (1000, 128, 10.6), (4000, 64, 13.2), (16_000, 32, 19.9)):
        # The request itself is one of those; what it has to fetch is not part of the measurement.
        request = Ask(b"x" * 4 * (context + 130), max_tokens=10**9)
        fleet = rows({"in_flight": requests - 1, "held_tokens": (context + 130) * (requests - 1)})
        fetched = Costs().handoff_per_token * request.tokens / Costs().expected_output
        assert (-decode.scores(request, fleet)[0] - fetched) * 1000 == pytest.approx(measured, rel=0.05)


def test_decode_prefers_little_held_kv_to_few_requests():
    _, decode = both()
    fleet = rows({"in_flight": 2, "held_tokens": 60_000}, {"in_flight": 10, "held_tokens": 5_000})
    assert decode.choose(Ask(b"x" * 4000), fleet) is fleet[1]


def test_a_conversation_returns_to_its_decode_engine_while_loads_are_about_even():
    _, decode = both()
    fleet = rows({"in_flight": 4, "held_tokens": 4000}, {"in_flight": 3, "held_tokens": 3000})
    request = Ask(blocks(64))
    assert decode.choose(request, fleet) is fleet[1]
    decode.routed(request, fleet[0])
    decode.answered(request, fleet[0], blocks(4, "answer"))
    turn = Ask(request.prefix + blocks(4, "answer") + b"and then?")
    assert decode.uncached(turn, fleet[0]) < 64, "the answer is held too"
    fleet[0].in_flight, fleet[0].held_tokens = 3, 3500
    assert decode.choose(turn, fleet) is fleet[0]
    fleet[0].in_flight = 30
    assert decode.choose(turn, fleet) is fleet[1]


@pytest.mark.parametrize(
    "full",
    [
        {"kv_tokens": 10_000, "held_tokens": 8_900},
        {"kv_tokens": 10_000, "kv_usage": 0.89},
        {"kv_usage": 0.97},
    ],
)
def test_decode_avoids_an_engine_without_kv_room(full):
    _, decode = both()
    fleet = rows(full, {"in_flight": 100, "held_tokens": 100_000, "kv_tokens": 900_000})
    request = Ask(b"x" * 4000, max_tokens=200)
    assert decode.choose(request, fleet) is fleet[1]


def test_a_stale_scrape_does_not_tell_of_kv_room():
    _, decode = both()
    fleet = rows({"kv_tokens": 10_000, "kv_usage": 0.97, "metrics_age": 60.0}, {"in_flight": 1})
    assert decode.choose(Ask(b"x" * 4000), fleet) is fleet[0]


def test_where_no_engine_has_room_the_one_that_lacks_least_is_taken():
    _, decode = both()
    fleet = rows({"held_tokens": 9_000}, {"held_tokens": 7_000, "in_flight": 50}, kv_tokens=10_000)
    assert decode.choose(Ask(b"x" * 4000, max_tokens=30_000), fleet) is fleet[1]


def test_prefill_is_bypassed_when_decode_holds_the_prompt():
    for asked in (0, 1):
        policies = both()
        policy, decode_policy = policies[asked], policies[1]
        prefill, decode = rows({}, {"in_flight": 100})
        request = Ask(blocks(32))
        assert not policy.bypass(request, prefill, decode)
        decode_policy.routed(request, decode)
        assert policy.bypass(request, prefill, decode)
        assert policy.bypass(Ask(request.prefix + b"?" * 40), prefill, decode)
        assert not policy.bypass(Ask(request.prefix + b"?" * 8000), prefill, decode), (
            "2000 tokens would stall 100 answers"
        )


def test_prefill_is_bypassed_when_its_queue_is_longer_than_decodes_whole_work():
    policy, _ = both()
    prefill, decode = rows({"queued_tokens": 200_000}, {"in_flight": 8})
    assert policy.bypass(Ask(b"x" * 4000), prefill, decode)
    prefill.queued_tokens = 0
    assert not policy.bypass(Ask(b"x" * 4000), prefill, decode)


def test_one_of_a_fleet_of_equals_with_fewest_requests_is_taken():
    prefill, _ = both()
    fleet = rows({"in_flight": 2}, {"in_flight": 1}, {"in_flight": 2})
    assert prefill.choose(Ask(b"x" * 400), fleet) is fleet[1]
