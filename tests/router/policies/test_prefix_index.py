"""The index of what engines hold."""

from hypothesis import given, settings
from hypothesis import strategies as st

from pdrouter.policies.block_chain import block_chain
from pdrouter.policies.prefix_index import PrefixIndex
from router.policies.rows import Ask, Row, blocks


def held(index: PrefixIndex, prompt: bytes, *engines: Row) -> list[int]:
    return [index.blocks(block_chain(prompt), engine) for engine in engines]


def test_a_block_is_known_by_all_that_comes_before_it():
    one, other = block_chain(b"a" * 256 + b"c" * 256), block_chain(b"b" * 256 + b"c" * 256)
    assert len({*one.numbers, *other.numbers}) == 4
    assert block_chain(b"a" * 512 + b"x").numbers[:1] == one.numbers[:1]


def test_the_bytes_after_the_last_full_block_are_a_block_that_is_not_full():
    for size, numbers, whole in ((0, 0, 0), (255, 1, 0), (511, 2, 1), (512, 2, 2), (2000, 8, 7)):
        chain = block_chain(b"a" * size)
        assert (len(chain.numbers), chain.whole) == (numbers, whole)
    assert block_chain(b"a" * 2000).full(3) == block_chain(b"a" * 768).numbers


def test_an_engine_holds_the_common_beginning_of_what_it_was_sent():
    index, one, other = PrefixIndex(), Row("one"), Row("other")
    index.held(block_chain(blocks(5)), one)
    index.held(block_chain(blocks(2) + blocks(5, "b")), other)
    assert held(index, blocks(8), one, other) == [5, 2]
    assert held(index, blocks(8, "b"), one, other) == [0, 0], "equal blocks elsewhere in a prompt are different ones"


def test_uncached_is_the_share_of_the_prompt_not_held_and_at_least_one_token():
    index, engine = PrefixIndex(), Row("e")
    request = Ask(blocks(4))
    assert index.uncached(request, [engine]) == [256]
    index.held(block_chain(blocks(3)), engine)
    assert index.uncached(request, [engine, Row("f")]) == [64, 256]
    index.held(block_chain(blocks(4)), engine)
    assert index.uncached(request, [engine]) == [1]
    assert index.uncached(Ask(b"short"), [engine]) == [1]


def test_a_full_engine_forgets_the_end_of_the_prefix_used_longest_ago():
    index, engine = PrefixIndex(), Row("e", kv_tokens=10 * 64)
    index.held(block_chain(blocks(6, "old")), engine)
    index.held(block_chain(blocks(4, "new")), engine)
    index.held(block_chain(blocks(6, "new")), engine)
    assert held(index, blocks(6, "old"), engine) == [4]
    assert held(index, blocks(6, "new"), engine) == [6]
    index.held(block_chain(blocks(4, "old")), engine)
    index.held(block_chain(blocks(2, "third")), engine)
    assert held(index, blocks(6, "old"), engine) == [4]
    assert held(index, blocks(6, "new"), engine) == [4]


def test_no_engine_has_more_blocks_than_its_cache():
    index = PrefixIndex(default_tokens=7 * 64, most_tokens=9 * 64)
    unknown, small, large = Row("unknown"), Row("small", kv_tokens=3 * 64), Row("large", kv_tokens=10**9)
    for engine, most in ((unknown, 7), (small, 3), (large, 9)):
        for number in range(5):
            index.held(block_chain(blocks(4, f"p{number}")), engine)
            index.held(block_chain(blocks(20, "long")), engine)
        assert index.size(engine) == most
        assert held(index, blocks(20, "long"), engine) == [most]


def test_generated_text_is_part_of_the_next_turns_prefix():
    index, engine = PrefixIndex(), Row("e")
    prompt, answer = blocks(2) + b"half a block", b"generated " * 60
    index.held(block_chain(prompt), engine)
    index.continued(prompt, answer, engine)
    whole = prompt + answer
    assert held(index, whole + b"next question" * 50, engine) == [len(whole) // 256]


def test_a_restarted_engine_holds_nothing():
    index, one, other = PrefixIndex(), Row("one"), Row("other")
    for engine in (one, other):
        index.held(block_chain(blocks(3)), engine)
    index.gone(one)
    index.gone(one)
    assert held(index, blocks(3), one, other) == [0, 3]


prompts = st.lists(st.sampled_from("abc"), max_size=6).map(lambda parts: b"".join(p.encode() * 256 for p in parts))


@settings(max_examples=200, deadline=None)
@given(uses=st.lists(prompts, max_size=25), asked=prompts)
def test_what_is_held_never_has_holes(uses, asked):
    index, engine = PrefixIndex(), Row("e", kv_tokens=5 * 64)
    for prompt in uses:
        index.held(block_chain(prompt), engine)
    assert index.size(engine) <= 5
    one_by_one = [
        index.blocks(block_chain(asked[: 256 * count]), engine) == count for count in range(len(asked) // 256 + 1)
    ]
    length = index.blocks(block_chain(asked), engine)
    assert one_by_one == [count <= length for count in range(len(one_by_one))]
    if uses and uses[-1]:
        assert index.blocks(block_chain(uses[-1]), engine) == min(5, len(uses[-1]) // 256), (
            "what was used last is there"
        )
