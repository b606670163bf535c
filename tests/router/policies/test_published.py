"""The published policies choose as their formulas, worked out by hand, say."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdrouter.openai.features import Prompt
from pdrouter.policies import POLICIES, Commons, RoutingKey
from pdrouter.policies.cache_aware import CacheAware, TextTree
from pdrouter.policies.fbi_hash import fbi_hash
from pdrouter.policies.kv_aware import KvAware
from pdrouter.policies.llmd import LlmdDefault, LlmdPdGuide, LlmdPdSample
from pdrouter.policies.llmd_index import DEFAULT_BLOCKS
from pdrouter.policies.llmd_scorers import active_requests, kv_room, prefix_match, queue_depth, sticky, token_load
from pdrouter.policies.power_of_two import PowerOfTwo
from pdrouter.policies.sticky_least_loaded import StickyLeastLoaded
from router.policies.rows import Ask, Clock, Row, blocks, rows


def chosen(policy, request: Ask, fleet: list[Row]) -> str:
    return policy.choose(request, fleet).name


# vllm-router


def test_power_of_two_never_takes_the_most_loaded_engine():
    fleet = rows({"in_flight": 10}, {"in_flight": 5}, {"in_flight": 0})
    policy = PowerOfTwo(Commons(seed=3).draw())
    taken = [chosen(policy, Ask(), fleet) for _ in range(600)]
    assert "e0" not in taken
    assert taken.count("e2") == pytest.approx(400, abs=60), "two of three pairs have the idle engine"


def test_power_of_two_draws_every_pair_equally_often():
    policy = PowerOfTwo(Commons(seed=3).draw())
    fleet = rows({}, {}, {})
    taken = [chosen(policy, Ask(), fleet) for _ in range(900)]
    assert all(taken.count(one.name) == pytest.approx(300, abs=60) for one in fleet)


def test_rendezvous_takes_the_highest_hash_of_key_and_engine():
    fleet = rows({}, {}, {}, {})
    policy = POLICIES["rendezvous_hash"]("prefill")
    for number in range(20):
        expected = max(fleet, key=lambda one, n=number: fbi_hash(f"user:{n}:{one.name}"))
        assert policy.choose(Ask(text=f"user:{number}"), fleet) is expected


def test_a_session_keeps_its_engine_for_two_hours_after_its_last_request():
    clock, fleet = Clock(), rows({}, {})
    policy = StickyLeastLoaded(clock)
    first = chosen(policy, Ask(session="s"), fleet)
    other = "e1" if first == "e0" else "e0"
    assert chosen(policy, Ask(session="t"), fleet) == other
    assert chosen(policy, Ask(session="u"), [one for one in fleet if one.name == first]) == first
    clock.now += 7199
    assert chosen(policy, Ask(session="s"), fleet) == first
    for session in ("v", "w"):
        chosen(policy, Ask(session=session), [one for one in fleet if one.name == first])
    clock.now += 7199
    assert chosen(policy, Ask(session="s"), fleet) == first, "each request starts the two hours anew"
    assert policy.sessions == {first: 3}, "those unused for two hours are swept"
    clock.now += 7200
    assert chosen(policy, Ask(session="x"), fleet) in (first, other)
    assert sum(policy.sessions.values()) == 1


def test_an_expired_session_moves_even_before_the_sweep():
    clock, fleet = Clock(), rows({}, {})
    policy = StickyLeastLoaded(clock, ttl=10)
    assert chosen(policy, Ask(session="s"), fleet[:1]) == "e0"
    assert chosen(policy, Ask(session="t"), fleet[:1]) == "e0"
    clock.now += 10
    assert policy.scores(Ask(session="s"), fleet) == [-1.0, 0.0]
    assert chosen(policy, Ask(session="s"), fleet) == "e1"
    assert policy.sessions == {"e0": 1, "e1": 1}


def test_new_sessions_go_where_the_fewest_sessions_are_whatever_the_load():
    fleet = rows({"in_flight": 99}, {})
    policy = StickyLeastLoaded(Clock())
    chosen(policy, Ask(session="s"), fleet[1:])
    assert chosen(policy, Ask(session="t"), fleet) == "e0"
    assert chosen(policy, Ask(session="s"), fleet) == "e1"
    policy.finished("s")
    assert chosen(policy, Ask(session="u"), fleet) == "e1"


def test_a_session_whose_engine_is_gone_moves_and_stays_there():
    fleet = rows({}, {})
    policy = StickyLeastLoaded(Clock())
    chosen(policy, Ask(session="s"), fleet[:1])
    assert chosen(policy, Ask(session="s"), fleet[1:]) == "e1"
    assert chosen(policy, Ask(session="s"), fleet) == "e1"
    assert policy.sessions == {"e1": 1}


def test_requests_without_session_count_for_nothing_and_hash_alike():
    fleet = rows({}, {}, {})
    policy = StickyLeastLoaded(Clock())
    assert len({chosen(policy, Ask(text="same"), fleet) for _ in range(5)}) == 1
    assert policy.sessions == {}


@pytest.mark.parametrize(
    ("most", "least", "even"),
    [(64, 0, True), (65, 0, False), (200, 134, True), (200, 135, True), (195, 130, True), (196, 130, False)],
)
def test_loads_are_uneven_over_64_apart_and_over_one_and_a_half_times(most, least, even):
    fleet = rows({"in_flight": most}, {"in_flight": least})
    policy, request = CacheAware(Clock()), Ask(blocks(4))
    policy.routed(request, fleet[0])
    assert chosen(policy, request, fleet) == ("e0" if even else "e1")


@pytest.mark.parametrize(("known", "cached"), [(3, False), (4, True)])
def test_a_prefix_counts_from_over_three_tenths_of_the_prompt(known, cached):
    fleet = rows({"in_flight": 5}, {"in_flight": 1}, {"in_flight": 1})
    policy, prompt = CacheAware(Clock()), blocks(10)
    policy.routed(Ask(prompt[: known * 256]), fleet[0])
    assert chosen(policy, Ask(prompt), fleet) == ("e0" if cached else "e1")


def test_of_equally_long_prefixes_the_less_loaded_engine_is_taken():
    fleet = rows({"in_flight": 5}, {"in_flight": 4}, {"in_flight": 0})
    policy, prompt = CacheAware(Clock()), blocks(10)
    for one in fleet[:2]:
        policy.routed(Ask(prompt), one)
    policy.routed(Ask(prompt[:2000]), fleet[2])
    assert chosen(policy, Ask(prompt), fleet) == "e1"
    policy.gone(fleet[1])
    assert chosen(policy, Ask(prompt), fleet) == "e0"


def test_cache_aware_spreads_short_prompts_that_have_only_their_model_in_common():
    fleet = rows({"in_flight": 1}, {"in_flight": 0})
    policy, model = CacheAware(Clock()), "meta-llama/Llama-3.1-8B-Instruct"
    first, same, other = (
        Prompt(RoutingKey("", ""), {"model": model, "prompt": text})
        for text in ("Name three rivers.", "Name three rivers.", "Who was Euler?")
    )
    policy.routed(first, fleet[0])
    assert policy.choose(same, fleet).name == "e0"
    assert policy.choose(other, fleet).name == "e1"


def test_the_text_tree_knows_how_much_of_a_text_each_engine_has_had():
    tree = TextTree()
    tree.insert(b"the quick brown fox", "a")
    tree.insert(b"the quick red fox", "b")
    tree.insert(b"the", "c")
    assert tree.matches(b"the quick brown cow") == {"a": 16, "b": 10, "c": 3}
    assert tree.matches(b"then") == {"a": 3, "b": 3, "c": 3}
    assert tree.matches(b"a") == {}
    assert tree.sizes == {"a": 19, "b": 17, "c": 3}
    tree.remove("a")
    assert tree.matches(b"the quick brown cow") == {"b": 10, "c": 3}


def common(one: bytes, other: bytes) -> int:
    return max(end for end in range(len(one) + 1) if other.startswith(one[:end]))


texts = st.text("ab", max_size=8).map(str.encode)


@settings(max_examples=200, deadline=None)
@given(inserted=st.lists(st.tuples(texts, st.sampled_from("xyz")), max_size=15), asked=texts, most=st.integers(0, 12))
def test_the_text_tree_finds_the_longest_common_beginning(inserted, asked, most):
    tree = TextTree()
    had: dict[str, set[bytes]] = {}
    for text, engine in inserted:
        tree.insert(text, engine)
        had.setdefault(engine, set()).add(text)
    expected = {one: max(common(asked, text) for text in had[one]) for one in had}
    assert {engine: length for engine, length in tree.matches(asked).items() if length} == {
        engine: length for engine, length in expected.items() if length
    }
    sizes = {one: len({text[:end] for text in had[one] for end in range(1, len(text) + 1)}) for one in had}
    assert tree.sizes == sizes
    tree.clear(most)
    assert all(tree.sizes[one] == size if size <= most else tree.sizes[one] <= most for one, size in sizes.items())
    assert all(length <= expected[one] for one, length in tree.matches(asked).items())


def test_the_text_tree_loses_the_leaves_used_longest_ago_at_the_next_clearing():
    clock, fleet = Clock(), rows({})
    policy = CacheAware(clock, most_bytes=20)
    for text in (b"old " * 3, b"new " * 3, b"old " * 3):
        policy.routed(Ask(text), fleet[0])
    assert policy.tree.sizes == {"e0": 24}
    clock.now += 119.9
    policy.routed(Ask(b""), fleet[0])
    assert policy.tree.sizes == {"e0": 24}
    clock.now += 0.1
    policy.routed(Ask(b""), fleet[0])
    assert policy.tree.sizes == {"e0": 12}
    assert policy.tree.matches(b"old ") == {"e0": 4}
    assert policy.tree.matches(b"new ") == {}


def test_kv_aware_prefill_weighs_queued_and_new_tokens_together():
    fleet = rows({"queued_tokens": 500}, {"queued_tokens": 100})
    policy, request = KvAware("prefill"), Ask(blocks(10))
    policy.routed(request, fleet[0])
    assert policy.scores(request, fleet) == [-501, -740], "one token of the cached prompt is computed again"
    assert chosen(policy, request, fleet) == "e0"
    fleet[0].queued_tokens = 740
    assert chosen(policy, request, fleet) == "e1"


def test_kv_aware_prefill_ties_go_to_fewer_requests_then_to_the_first():
    policy = KvAware("prefill")
    assert chosen(policy, Ask(), rows({"in_flight": 2}, {"in_flight": 1}, {"in_flight": 1})) == "e1"


def test_kv_aware_decode_takes_the_fewest_requests_and_turns_among_equals():
    policy = KvAware("decode")
    assert chosen(policy, Ask(session="s"), rows({"in_flight": 4}, {"in_flight": 1})) == "e1"
    even = rows({}, {}, {})
    assert sorted(chosen(policy, Ask(session="s"), even) for _ in range(3)) == ["e0", "e1", "e2"]


def test_kv_aware_sessions_stay_within_a_fair_share():
    clock, fleet = Clock(), rows({}, {})
    policy = KvAware("decode", clock, ttl=60)
    request = Ask(session="s")
    assert chosen(policy, request, fleet) == "e0"
    fleet[0].in_flight = fleet[1].in_flight = 1
    assert chosen(policy, request, fleet) == "e0", "1 < ceil((1 + 1 + 1) / 2) = 2"
    fleet[0].in_flight, fleet[1].in_flight = 2, 1
    assert chosen(policy, request, fleet) == "e1", "2 is not below ceil((2 + 1 + 1) / 2) = 2"
    fleet[0].in_flight = fleet[1].in_flight = 0
    clock.now += 59.9
    assert chosen(policy, request, fleet) == "e1"
    clock.now += 60
    assert policy.scores(request, fleet) == [0.0, 0.0]


# llm-d


def test_the_longest_queue_scores_0_and_the_shortest_1():
    assert queue_depth([0, 5, 10]) == [1.0, 0.5, 0.0]
    assert queue_depth([3, 4]) == [1.0, 0.0], "one request apart is as much as a hundred: a flaw of the original"
    assert queue_depth([7, 7]) == [1.0, 1.0]


def test_kv_room_prefix_and_requests_score_as_published():
    assert kv_room([0.25, 1.0, 1.2]) == [0.75, 0.0, 0.0]
    assert prefix_match([0, 3, 4], 4) == [0.0, 0.75, 1.0]
    assert prefix_match([0], 0) == [0.0]
    assert active_requests([0, 1, 4]) == [1.0, 0.75, 0.0]
    assert active_requests([2, 2]) == [0.0, 0.0]
    assert token_load([0, 1_048_576, 4_194_304, 10**9]) == [1.0, 0.75, 0.0, 0.0]


def test_engines_with_four_fifths_of_the_prompt_stay_alone():
    assert sticky([8, 7, 10], 10, [0, 0, 0]) == [True, False, True]
    assert sticky([7, 7, 0], 10, [0, 0, 0]) == [True, True, True]
    assert sticky([9, 9], 10, [0, 0]) == [True, True]
    assert sticky([0, 0], 0, [0, 0]) == [True, True]


def test_stickiness_ends_where_the_first_token_would_come_over_18_seconds_later():
    # 18 s at the guide's 33,821 tokens/s are 608,778 tokens.
    assert sticky([10, 0], 10, [608_778, 0]) == [True, False]
    assert sticky([10, 0], 10, [608_779, 0]) == [True, True]
    assert sticky([10, 0], 10, [700_000, 100_000]) == [True, False]
    assert sticky([10, 10, 0], 10, [700_000, 0, 0]) == [True, True, False], "the quickest of the sticky engines counts"


def test_the_default_adds_two_parts_queue_two_parts_room_and_three_parts_prefix():
    fleet = rows({"waiting": 4, "kv_usage": 0.5}, {"waiting": 2, "kv_usage": 0.25}, {})
    policy, prompt = LlmdDefault("prefill", Commons(seed=0)), blocks(4)
    policy.routed(Ask(prompt[:768]), fleet[0])
    assert policy.scores(Ask(prompt), fleet) == [2 * 0 + 2 * 0.5 + 3 * 0.75, 2 * 0.5 + 2 * 0.75, 2 + 2]
    assert chosen(policy, Ask(prompt), fleet) == "e2"


def test_the_sample_adds_two_parts_prefix_and_one_part_queue():
    fleet = rows({"waiting": 4, "kv_usage": 1.0}, {"waiting": 2}, {})
    policy, prompt = LlmdPdSample("decode", Commons(seed=0)), blocks(4)
    policy.routed(Ask(prompt), fleet[0])
    assert policy.scores(Ask(prompt), fleet) == [2.0, 0.5, 1.0]
    assert chosen(policy, Ask(prompt), fleet) == "e0"


def test_the_sample_skips_prefill_when_fewer_than_16_tokens_are_missing_on_decode():
    policy, prompt = LlmdPdSample("decode", Commons()), blocks(4)
    prefill, decode = rows({}, {})
    assert not policy.bypass(Ask(prompt), prefill, decode)
    policy.routed(Ask(prompt), decode)
    assert policy.bypass(Ask(prompt + b"x" * 60), prefill, decode)
    assert not policy.bypass(Ask(prompt + b"x" * 64), prefill, decode)


def test_the_guide_keeps_to_the_cache_until_18_seconds_of_work_wait_there():
    fleet = rows({"queued_tokens": 600_000, "in_flight": 50}, {})
    policy, request = LlmdPdGuide("prefill", Commons(seed=0)), Ask(blocks(10))
    policy.routed(request, fleet[0])
    assert policy.scores(request, fleet) == [1 - 600_000 / 4_194_304, -1.0]
    fleet[0].queued_tokens = 610_000
    assert policy.scores(request, fleet) == [1 - 610_000 / 4_194_304, 1 - 640 / 4_194_304]
    assert chosen(policy, request, fleet) == "e1"


def test_the_guides_decode_takes_the_fewest_requests():
    policy = LlmdPdGuide("decode", Commons(seed=0))
    assert chosen(policy, Ask(), rows({"in_flight": 3}, {"in_flight": 2}, {"in_flight": 4})) == "e1"


def test_llmds_index_counts_past_an_engines_hole_that_another_engine_fills():
    policy, prompt = LlmdDefault("prefill", Commons()), blocks(8)
    small, large = Row("small", kv_tokens=4 * 16), Row("large")
    policy.routed(Ask(prompt), small)
    assert policy.index.matches(Ask(prompt), [small, large]) == ([0, 0], 8), "of 8 blocks the first 4 are forgotten"
    policy.routed(Ask(prompt[: 4 * 256]), large)
    assert policy.index.matches(Ask(prompt), [small, large]) == ([4, 4], 8), "blocks 5 to 8 count without 1 to 4"


def test_llmds_index_thinks_that_four_times_as_much_fits():
    policy = LlmdDefault("prefill", Commons())
    engine = Row("e", kv_tokens=64 * 16)
    for number in range(16):
        policy.routed(Ask(blocks(4, f"p{number}-")), engine)
    assert all(policy.index.matches(Ask(blocks(4, f"p{n}-")), [engine]) == ([4], 4) for n in range(16))
    assert 4 * engine.kv_tokens == 16 * 4 * 64
    assert policy.index.capacity(Row("unknown")) == DEFAULT_BLOCKS == 31_250


def test_llmds_index_counts_the_short_last_block_and_no_generated_text():
    policy, engine = LlmdDefault("decode", Commons()), Row("e")
    request = Ask(blocks(2) + b"rest")
    assert policy.index.matches(request, [engine]) == ([0], 3)
    policy.routed(request, engine)
    policy.answered(request, engine, blocks(2, "answer"))
    assert policy.index.matches(request, [engine]) == ([3], 3)
    assert policy.index.matches(Ask(request.prefix + blocks(2, "answer")), [engine])[0] == [2]
    policy.gone(engine)
    assert policy.index.matches(request, [engine]) == ([0], 3)


def test_llmd_looks_at_131072_tokens_by_default_and_at_16384_with_the_sample():
    request = Ask(blocks(2100))
    assert LlmdDefault("prefill", Commons()).index.matches(request, [])[1] == 2048
    assert LlmdPdSample("prefill", Commons()).index.matches(request, [])[1] == 256
