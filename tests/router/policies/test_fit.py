"""What work costs is learned within bounds."""

from math import inf, nan

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdrouter.policies.fit import BOUND, MEMORY, Line

numbers = st.one_of(st.floats(), st.floats(0, 1e6), st.sampled_from([nan, inf, -inf, 0.0]))


@given(seen=st.lists(st.tuples(st.floats(0, 1e6), numbers), max_size=60))
def test_whatever_is_observed_the_line_stays_near_the_first_guess(seen):
    line = Line(0.02, 2e-6, 10_000)
    for x, y in seen:
        line.observe(x, y)
        assert 0.02 / BOUND <= line.base <= 0.02 * BOUND
        assert 2e-6 / BOUND <= line.slope <= 2e-6 * BOUND


def test_a_line_is_found_again_after_it_has_changed():
    line = Line(0.02, 2e-6, 10_000)
    for base, slope in ((0.04, 4e-6), (0.01, 1e-6)):
        for number in range(int(6 * MEMORY)):
            x = number * 7919 % 20_000
            line.observe(x, base + slope * x)
        assert line.at(0) == pytest.approx(base, rel=0.05)
        assert line.at(20_000) == pytest.approx(base + slope * 20_000, rel=0.05)


def test_where_all_prompts_are_alike_the_line_goes_through_what_they_took():
    line = Line(0.02, 2e-6, 10_000)
    for _ in range(int(6 * MEMORY)):
        line.observe(1000, 0.044)
    assert line.at(1000) == pytest.approx(0.044, rel=0.05)
    assert line.at(5000) > line.at(1000)


def test_one_answer_that_hung_changes_little():
    line = Line(0.02, 2e-6, 10_000)
    for _ in range(200):
        line.observe(1000, 0.022)
    line.observe(1000, 600.0)
    assert line.at(1000) == pytest.approx(0.022, rel=0.05)
