"""Recorded traffic of several kinds becomes the same requests."""

import json

import pytest

from pdsim.virtual.judge import Source, load
from pdsim.virtual.synthetic import SHAPES, Shape
from pdsim.virtual.traces import TraceError, read_trace


def write(path, *lines):
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return path


def test_mooncake_requests_share_blocks_by_their_hashes(tmp_path):
    path = write(
        tmp_path / "trace.jsonl",
        {"timestamp": 3000, "input_length": 1100, "output_length": 7, "hash_ids": [0, 1, 2]},
        {"timestamp": 0, "input_length": 512, "output_length": 500, "hash_ids": [0]},
    )
    workload = read_trace(path)
    assert [(one.arrival, one.tokens, one.output, one.keys) for one in workload.requests] == [
        (0.0, 512, 500, [0]), (3.0, 1100, 7, [0, 1]),
    ]  # fmt: skip
    assert workload.block_tokens == 512
    first, second = workload.requests
    assert second.prefix.startswith(first.prefix)
    assert len(second.prefix) == 4400


def test_arrivals_are_spread_over_the_time_to_which_they_were_rounded(tmp_path):
    lines = [{"timestamp": 3000 * (n // 10), "input_length": 5, "output_length": 1, "hash_ids": [n]} for n in range(40)]
    workload = read_trace(write(tmp_path / "trace.jsonl", *lines))
    first, again, other = (workload.arrivals(2.0, seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    assert first == sorted(first)
    for time, place in first:
        assert 1.5 * (place // 10) <= time <= 1.5 * (place // 10) + 1.5


def test_bailian_blocks_are_gathered_to_those_of_an_engine(tmp_path):
    ids = list(range(100, 120))
    line = {
        "chat_id": 5, "parent_chat_id": -1, "timestamp": 1.5, "input_length": 300, "output_length": 9, "hash_ids": ids,
        "type": "text", "turn": 1,
    }  # fmt: skip
    workload = read_trace(write(tmp_path / "trace.jsonl", line), sessions=True)
    (one,) = workload.requests
    assert (one.arrival, workload.block_tokens, one.session) == (1.5, 128, "5")
    assert one.keys == [107, 115], "the last of each eight tells all before"
    assert one.chain.numbers[-1] == ids[-1]


BURST_GPT = """Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type
5,ChatGPT,472,18,490,Conversation log
45,ChatGPT,1087,230,1317,API log"""
AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:17:03.9799600,472,18
2023-11-16 18:17:43.9799600,1087,230"""


@pytest.mark.parametrize("lines", [BURST_GPT, AZURE], ids=["BurstGPT", "Azure"])
def test_tables_of_lengths_have_no_common_prefixes(tmp_path, lines):
    workload = read_trace(write(tmp_path / "trace.csv", lines))
    one, other = workload.requests
    assert (one.tokens, one.output, other.tokens, other.output) == (472, 18, 1087, 230)
    assert other.arrival - one.arrival == pytest.approx(40.0)
    assert not set(one.keys) & set(other.keys)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("a,b\n1,2\n", "known columns"),
        ('{"timestamp": 1}\n', "line 1"),
        ('{"timestamp": 0, "input_length": 5, "output_length": 1, "hash_ids": [1]}\nnonsense\n', "line 2"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\nyesterday,1,2\n", "line 2"),
    ],
)
def test_what_is_no_trace_is_refused_with_its_line(tmp_path, text, why):
    path = tmp_path / "trace"
    path.write_text(text)
    with pytest.raises(TraceError, match=why):
        read_trace(path)


@pytest.mark.parametrize("name", SHAPES)
def test_made_up_traffic_repeats_and_has_its_rate(name):
    shape = Shape(requests=1000, rate=25.0, seed=4)
    one, again = (load(Source(f"synthetic:{name}", shape=shape)) for _ in range(2))
    assert [(r.arrival, r.tokens, r.keys) for r in one.requests] == [
        (r.arrival, r.tokens, r.keys) for r in again.requests
    ]
    assert len(one.requests) == 1000
    for request in one.requests:
        assert len(request.chain.numbers) >= request.tokens // 128
        assert request.output >= 1
    shared = len({key for r in one.requests for key in r.keys}) / sum(len(r.keys) for r in one.requests)
    assert shared == 1 if name == "uniform" else shared < 0.7


def test_a_part_of_a_trace_is_cut_by_time():
    whole = load(Source("synthetic:prefixes", shape=Shape(requests=400)))
    first, second = whole.part(0, 0.5), whole.part(0.5, 1)
    assert len(first.requests) + len(second.requests) == 400
    assert first.requests[-1].arrival < second.requests[0].arrival
