"""What engines hold, beside a plain list in the order of last use."""

from hypothesis import given, settings
from hypothesis import strategies as st

from pdrouter.policies.held_blocks import HeldBlocks

chains = st.lists(st.integers(0, 30), unique=True, max_size=8)
uses = st.lists(st.tuples(st.sampled_from(["a", "b"]), chains), max_size=120)


@settings(max_examples=150, deadline=None)
@given(uses=uses, capacity=st.integers(1, 12), left=st.sampled_from(["a", "b", "nobody"]))
def test_each_engine_keeps_what_it_used_last(uses, capacity, left):
    held, plain = HeldBlocks(), {"a": [], "b": []}
    for name, chain in uses:
        held.use(name, chain, capacity)
        plain[name] = [*(block for block in plain[name] if block not in chain), *chain][-capacity:]
    held.gone(left)
    plain[left] = []
    for name in ("a", "b"):
        bit = held.bits.get(name, 0)
        assert {block for block, engines in held.holders.items() if engines & bit} == set(plain[name])
        assert held.size(name) == len(plain[name])
    assert 0 not in held.holders.values()
