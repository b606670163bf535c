"""KV blocks: what is computed from them, who holds them, what a prefix finds again."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdsim.engine.kv import BlockPool, Context, OutOfBlocksError
from pdsim.engine.sequence import token_bytes

SIZE = 4
tokens = st.lists(st.integers(0, 8191), min_size=1, max_size=40)


def computed(pool: BlockPool, ids: list[int], cuts: list[int]) -> tuple[list, Context]:
    """Compute a prompt in chunks that end at `cuts`."""
    blocks = pool.take(-(-len(ids) // pool.block_size))
    context = Context(pool.block_size)
    start = 0
    for end in [*sorted({cut for cut in cuts if 0 < cut < len(ids)}), len(ids)]:
        context.compute(blocks, start, token_bytes(ids[start:end]))
        start = end
    return blocks, context


@given(tokens, st.lists(st.integers(1, 39)))
def test_a_context_does_not_depend_on_how_its_prompt_was_chunked(ids: list[int], cuts: list[int]) -> None:
    _, whole = computed(BlockPool(64, SIZE), ids, [])
    _, chunked = computed(BlockPool(64, SIZE), ids, cuts)
    assert whole.state == chunked.state


@given(tokens, st.integers(1, 40))
def test_a_context_read_from_blocks_is_the_one_that_was_computed(ids: list[int], length: int) -> None:
    length = min(length, len(ids))
    blocks, _ = computed(BlockPool(64, SIZE), ids, [])
    _, part = computed(BlockPool(64, SIZE), ids[:length], [])
    assert Context.read(blocks, length, SIZE).state == part.state


@given(tokens, st.data())
def test_one_foreign_block_anywhere_changes_the_context(ids: list[int], data: st.DataObject) -> None:
    pool = BlockPool(64, SIZE)
    blocks, context = computed(pool, ids, [])
    foreign, _ = computed(pool, [(token + 1) % 8192 for token in ids], [])
    where = data.draw(st.integers(0, len(blocks) - 1))
    mixed = [*blocks[:where], foreign[where], *blocks[where + 1 :]]
    assert Context.read(mixed, len(ids), SIZE).state != context.state


def test_a_freed_prefix_is_found_until_its_blocks_are_handed_out_tail_first() -> None:
    pool = BlockPool(5, SIZE)
    ids = token_bytes(list(range(12)))
    blocks = pool.take(3)
    for block, key in zip(blocks, pool.keys(ids), strict=True):
        pool.cache(block, key)
    pool.release(blocks)
    assert pool.lookup(pool.keys(ids)) == blocks
    pool.take(2)  # the block that was never used, then the tail of the prefix
    assert pool.lookup(pool.keys(ids)) == blocks[:2]


def test_blocks_that_are_held_are_not_handed_out() -> None:
    pool = BlockPool(4, SIZE)
    pool.take(2)
    with pytest.raises(OutOfBlocksError):
        pool.take(2)
    assert pool.free == 1


def test_a_cached_prefix_of_another_salt_is_not_found() -> None:
    pool = BlockPool(4, SIZE)
    ids = token_bytes([1, 2, 3, 4])
    (block,) = pool.take(1)
    pool.cache(block, pool.keys(ids, "mine")[0])
    assert pool.lookup(pool.keys(ids, "mine")) == [block]
    assert pool.lookup(pool.keys(ids)) == []
