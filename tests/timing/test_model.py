"""The time model: near every measured point, and sensible between them."""

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdsim.timing import Chunk, load_profile
from pdsim.timing.replay import measured, points

H200 = load_profile("h200")
counts = st.integers(1, 8192)


@pytest.mark.parametrize("name", [point.name for point in points(H200)])
def test_each_measured_point_is_met_within_ten_percent(name: str) -> None:
    point = next(point for point in points(H200) if point.name == name)
    assert abs(point.error) <= 0.10, f"measured {point.measured} {point.unit}, model {point.model:.2f}"


def test_the_table_shows_every_point_and_says_so_by_its_exit_status() -> None:
    shown = subprocess.run([sys.executable, "-m", "pdsim.timing"], capture_output=True, text=True, check=False)
    assert shown.returncode == 0
    assert all(point.name in shown.stdout for point in points(H200))


def test_the_figures_say_where_they_come_from() -> None:
    source = measured()["provenance"]
    assert {"hardware", "date", "vllm", "nixl", "model", "method"} <= set(source)


def test_an_unknown_profile_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="h200"):
        load_profile("gpu-of-dreams")


@given(counts, counts, st.integers(0, 100_000))
def test_more_tokens_or_more_context_never_take_less_time(tokens: int, more: int, context: int) -> None:
    small = H200.step_seconds([Chunk(tokens, context)], 0, 0)
    assert H200.step_seconds([Chunk(tokens + more, context)], 0, 0) >= small
    assert H200.step_seconds([Chunk(tokens, context + more)], 0, 0) >= small
    assert H200.step_seconds([Chunk(tokens, context)], 1, more) >= small


@given(st.integers(1, 1000), st.integers(0, 1_000_000), st.integers(1, 1000))
def test_a_larger_batch_never_decodes_faster(batch: int, context: int, more: int) -> None:
    alone = H200.step_seconds((), batch, context)
    assert H200.step_seconds((), batch + more, context) > alone
    assert H200.step_seconds((), batch, context + more) > alone


@given(st.integers(0, 100_000), st.integers(0, 64))
def test_a_transfer_beside_others_is_never_faster(tokens: int, others: int) -> None:
    assert H200.transfer_seconds(tokens, others + 1) >= H200.transfer_seconds(tokens, others)
