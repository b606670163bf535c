"""Choices by predicted time."""

from dataclasses import replace
from random import Random

import pytest

from pdrouter.policies import Commons
from pdrouter.policies.pd_cost import Costs, PdCost
from router.policies.rows import Ask, Clock, blocks, rows


def both() -> tuple[PdCost, PdCost]:
    commons = Commons(seed=0)
    return PdCost.of("prefill", commons), PdCost.of("decode", commons)


def test_prefill_prefers_a_cached_engine_until_its_queue_costs_more_than_computing_again_costs_everybody():
    prefill, _ = both()
    fleet, request = rows({}, {}), Ask(blocks(16))
    prefill.routed(request, fleet[0])
    fleet[0].queued_tokens = 1022
    assert prefill.choose(request, fleet) is fleet[0], "1022 + 1 tokens against 1024"
    fleet[0].queued_tokens = 1024
    assert prefill.choose(request, fleet) is fleet[1]
    fleet[1].queued_tokens = 1
    for _ in range(500):
        prefill.choose(Ask(b"x" * 400), fleet)
    assert prefill.learned.dearness > 5, "all engines are always busy"
    fleet[0].queued_tokens = 5 * 1023
    assert prefill.choose(request, fleet) is fleet[0]
    fleet[0].queued_tokens = 20 * 1024
    assert prefill.choose(request, fleet) is fleet[1]


def test_prefill_predicts_the_wait_from_queue_and_rate():
    prefill, _ = both()
    fleet = rows({"queued_tokens": 40_915})
    assert prefill.scores(Ask(b"x" * 4000), fleet) == pytest.approx([-(1.0 + 1000 / 40_915)])


def test_the_costs_predict_the_times_between_tokens_that_were_measured():
    costs = Costs()
    for context, requests, measured in ((1000, 1, 4.89), (1000, 128, 10.6), (4000, 64, 13.2), (16_000, 32, 19.9)):
        held = (context + 130) * requests
        seconds = costs.itl_base + costs.itl_per_request * requests + costs.itl_per_token * held
        assert seconds * 1000 == pytest.approx(measured, rel=0.05)


def test_a_long_prompt_goes_where_few_are_delayed_by_it_and_a_short_one_where_little_is_read():
    _, decode = both()
    fleet = rows({"in_flight": 4, "held_tokens": 100_000}, {"in_flight": 30, "held_tokens": 60_000})
    assert decode.choose(Ask(b"x" * 4 * 60_000), fleet) is fleet[0]
    assert decode.choose(Ask(b"x" * 400), fleet) is fleet[1]


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
    fleet[0].in_flight, fleet[0].held_tokens = 300, 600_000
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
        prefill, decode = rows({}, {"in_flight": 20})
        request = Ask(blocks(32))
        assert not policy.bypass(request, prefill, decode)
        decode_policy.routed(request, decode)
        assert policy.bypass(request, prefill, decode)
        assert policy.bypass(Ask(request.prefix + b"?" * 40), prefill, decode)
        assert not policy.bypass(Ask(request.prefix + b"?" * 8000), prefill, decode), (
            "2000 tokens would stall 20 answers"
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


def test_prompts_that_decode_computes_make_answers_longer_by_a_share_only():
    clock = Clock()
    policy = PdCost.of("decode", Commons(seed=0, clock=clock))
    prefill, decode = rows({"queued_tokens": 10**8}, {"in_flight": 20})
    costs, request = Costs(), Ask(b"x" * 4 * 10_000)
    waiting = 20 * 10_000 / costs.prefill_rate
    while policy.bypass(request, prefill, decode):
        assert policy.learned.saved >= 0
    assert policy.learned.saved < waiting
    policy.learned.saved = 0.0
    for seconds, enough in ((0.98, False), (0.04, True)):
        clock.now += seconds * waiting / (costs.bypass_share * 20)
        policy.choose(Ask(b"y"), (decode,))
        assert policy.bypass(request, prefill, decode) is enough
    idle = rows({})[0]
    assert policy.bypass(request, prefill, idle), "nobody waits there"


def test_short_prompts_that_decode_computes_make_few_tokens_late():
    clock = Clock()
    policy = PdCost.of("decode", Commons(seed=0, clock=clock))
    prefill, decode = rows({"queued_tokens": 10**8}, {"in_flight": 20})
    costs, seconds = Costs(), 100.0
    policy.learned.saved = 0.0
    clock.now += seconds
    policy.learned.costs = replace(costs, bypass_saved=1e9)
    policy.choose(Ask(b"y"), (decode,))
    late = 0
    while policy.bypass(Ask(b"x" * 400), prefill, decode):
        late += decode.in_flight
    tokens = decode.in_flight * seconds / policy.learned.apart(20, 0)
    assert late / tokens == pytest.approx(costs.bypass_share / costs.bypass_tokens, rel=0.01)


def test_loads_are_evened_out_when_tokens_are_further_apart_than_usual():
    _, decode = both()
    quiet = rows({"in_flight": 1, "held_tokens": 1000}, {"in_flight": 1, "held_tokens": 1000})
    for _ in range(10):
        decode.choose(Ask(b"x" * 400), quiet)
    few_long, many_short = rows({"in_flight": 6, "held_tokens": 160_000}, {"in_flight": 40, "held_tokens": 90_000})
    long = Ask(b"x" * 4 * 10_000)
    assert decode.choose(long, (few_long, many_short)) is many_short, "its own tokens count most at a peak"
    decode.learned.usual = 1.0
    assert decode.choose(long, (few_long, many_short)) is few_long, "few are delayed there"


def test_decode_alone_is_for_what_prefill_would_not_soon_have_again():
    policy, other = both()
    prefill, decode = rows({}, {})
    known, asked = Ask(blocks(64)), Ask(blocks(64) + b"?" * 8000)
    for one, engine in ((policy, prefill), (other, decode)):
        one.routed(known, engine)
    assert not policy.bypass(asked, prefill, decode), "both lack the same 2000 tokens"
    policy.gone(prefill)
    assert policy.bypass(asked, prefill, decode)


def test_costs_are_learned_from_what_work_took():
    prefill, decode = both()
    draw = Random(0)
    for _ in range(3000):
        tokens, held = draw.randrange(100, 20_000), draw.randrange(400_000)
        prefill.prefilled(tokens, 0.03 + tokens / 20_000)
        decode.handed_over(tokens, 0.05 + tokens * 5e-6)
        decode.generated(held, 401, 400 * (0.012 + held * 6e-8))
    learned = prefill.learned
    assert learned is decode.learned
    assert learned.prefill.slope == pytest.approx(1 / 20_000, rel=0.1)
    assert learned.handoff.base == pytest.approx(0.05, rel=0.1)
    assert learned.handoff.slope == pytest.approx(5e-6, rel=0.2)
    assert learned.itl.base == pytest.approx(0.012, rel=0.1)
    assert learned.itl.slope == pytest.approx(6e-8, rel=0.1)
    assert learned.output == pytest.approx(401, rel=0.01)
