"""The load generator and its result."""

import asyncio
import contextlib
import json
import re
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pdctl.bench import client
from pdctl.bench.arrivals import Ramp, arrivals
from pdctl.bench.client import Record
from pdctl.bench.load import Load, Share, share_of
from pdctl.bench.prompts import words_of
from pdctl.bench.repeats import interval
from pdctl.bench.result import Outcome, result, table
from pdctl.bench.slo import Slo, meeting
from pdctl.bench.trace import Trace
from pdctl.bench.workload import Workload
from pdctl.errors import PdctlError
from pdsim.engine.tokenizer import Tokenizer

# the keys of `vllm bench serve --save-result --percentile-metrics ttft,tpot,itl,e2el` (0.32), in its order
VLLM_KEYS = (
    "date endpoint_type backend label model_id tokenizer_id num_prompts request_rate burstiness "
    "max_concurrency duration completed failed total_input_tokens total_output_tokens request_throughput "
    "request_goodput output_throughput total_token_throughput latencies queue_times max_output_tokens_per_s "
    "max_concurrent_requests rtfx mean_ttft_ms median_ttft_ms std_ttft_ms p99_ttft_ms mean_tpot_ms "
    "median_tpot_ms std_tpot_ms p99_tpot_ms mean_itl_ms median_itl_ms std_itl_ms p99_itl_ms "
    "mean_e2el_ms median_e2el_ms std_e2el_ms p99_e2el_ms"
).split()
VLLM_TABLE = """\
============ Serving Benchmark Result ============
Successful requests:                     20        
Failed requests:                         0         
Maximum request concurrency:             4         
Benchmark duration (s):                  5.54      
Total input tokens:                      4000      
Total generated tokens:                  320       
Request throughput (req/s):              3.61      
Output token throughput (tok/s):         57.80     
Peak output token throughput (tok/s):    80.00     
Peak concurrent requests:                11.00     
Total token throughput (tok/s):          780.27    
---------------Time to First Token----------------
Mean TTFT (ms):                          538.51    
Median TTFT (ms):                        412.31    
P99 TTFT (ms):                           1212.66   
-----Time per Output Token (excl. 1st token)------
Mean TPOT (ms):                          36.84     
Median TPOT (ms):                        27.24     
P99 TPOT (ms):                           81.49     
---------------Inter-token Latency----------------
Mean ITL (ms):                           36.84     
Median ITL (ms):                         22.19     
P99 ITL (ms):                            660.50    
=================================================="""  # noqa: W291 as vLLM 0.32 printed it
TINY = Workload(num_prompts=2, input_len=1, output_len=3, concurrency=1, spelling="ids")


def told(records: list[Record], duration: float, slos: list[Slo] | None = None) -> dict[str, object]:
    outcome = Outcome(records, duration)
    return result(TINY, outcome, model="m", simulated=True, slos=slos or [], gpus=16, extra={"partial": False})


def test_the_table_is_vllms_line_by_line() -> None:
    figures = {
        "completed": 20, "failed": 0, "max_concurrency": 4, "duration": 5.536580248000064, "total_input_tokens": 4000,
        "total_output_tokens": 320, "request_throughput": 3.612338140899239, "output_throughput": 57.79741025438783,
        "max_output_tokens_per_s": 80.0, "max_concurrent_requests": 11, "total_token_throughput": 780.2650384342356,
        "mean_ttft_ms": 538.5139184999844, "median_ttft_ms": 412.3078315001294, "p99_ttft_ms": 1212.659382460065,
        "mean_tpot_ms": 36.836350873337935, "median_tpot_ms": 27.243911266668878, "p99_tpot_ms": 81.4909698960082,
        "mean_itl_ms": 36.83635087333793, "median_itl_ms": 22.186228000009578, "p99_itl_ms": 660.4958166602682,
        "request_rate": "inf", "request_goodput": None,
    }  # fmt: skip
    assert table(figures) == VLLM_TABLE


def test_the_result_has_vllms_keys_in_its_order_and_ours_behind() -> None:
    figures = told([Record(0.0, 5, 3, 0.5, [0.1, 0.3], 0.9)], 1.0)
    assert list(figures) == [*VLLM_KEYS, "num_gpus", "simulated", "pdctl"]


def test_the_statistics_are_those_of_the_records() -> None:
    records = [
        Record(0.0, prompt_tokens=10, output_tokens=3, ttft=0.5, itls=[0.1, 0.3], latency=0.9),
        Record(0.2, prompt_tokens=20, output_tokens=2, ttft=0.7, itls=[0.2], latency=0.9),
        Record(0.4, error="status 500"),
        Record(0.4, prompt_tokens=0, output_tokens=5, ttft=9.0, itls=[9.0], latency=18.0, aborted=True),
    ]
    figures = told(records, 2.0)
    assert (figures["completed"], figures["failed"]) == (2, 1)
    assert (figures["total_input_tokens"], figures["total_output_tokens"]) == (30, 5)
    assert figures["output_throughput"] == pytest.approx(2.5)
    assert figures["mean_ttft_ms"] == pytest.approx(600)
    assert figures["median_itl_ms"] == pytest.approx(200)
    assert figures["mean_tpot_ms"] == pytest.approx(200)  # (0.9 - 0.5) / 2 and (0.9 - 0.7) / 1
    assert figures["pdctl"] == {
        "aborted": 1, "errors": {"status 500": 1}, "slos": {}, "slo_attainment": None, "partial": False
    }  # fmt: skip


def test_goodput_counts_the_requests_that_meet_every_objective() -> None:
    quick = Record(0.0, 10, 3, 0.2, [0.01, 0.01], 0.22)
    slow_start = replace(quick, ttft=0.5)
    stutters = replace(quick, itls=[0.01, 0.2])
    slos = [Slo.read("ttft:300"), Slo.read("itl:30")]
    assert meeting([quick, slow_start, stutters, replace(quick, error="x")], slos) == 1
    assert told([quick, slow_start], 2.0, slos)["request_goodput"] == pytest.approx(0.5)


@pytest.mark.parametrize("text", ["ttft", "ttft:x", "ttft:-1", "speed:3"])
def test_an_objective_that_is_none_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(PdctlError, match="is no objective") as refused:
        Slo.read(text)
    assert "--slo ttft:300" in refused.value.next_step


def test_the_interval_of_repeats_is_students() -> None:
    # 4.303 is the 97.5 % point of Student's t with 2 degrees of freedom
    found = interval([9.0, 10.0, 11.0])
    assert found.mean == 10
    assert found.low == pytest.approx(10 - 4.3027 / np.sqrt(3), abs=1e-3)
    assert interval([7.0]).low is None


def test_random_prompts_have_exactly_the_wished_number_of_tokens() -> None:
    tokenizer = Tokenizer()
    for shared in (0, 40):
        texts = [one.prompt for one in Workload(num_prompts=20, input_len=137, shared_prefix=shared).requests()]
        assert {len(tokenizer.encode(str(text))) for text in texts} == {137}
        tokens = [tokenizer.encode(str(text)) for text in texts]
        assert len({tuple(one[:shared]) for one in tokens}) == 1
        assert len({tuple(one[shared : shared + 20]) for one in tokens}) == 20
    ids = Workload(num_prompts=3, input_len=50, spelling="ids", shared_prefix=20).requests()
    assert [len(one.prompt) for one in ids] == [50] * 3


def test_equal_workloads_send_the_same_and_other_seeds_another() -> None:
    workload = Workload(num_prompts=30, input_len=20, rate=3.0, abort_share=0.5, seed=3)
    assert workload.requests() == Workload.read(json.loads(json.dumps(workload.told()))).requests()
    other = replace(workload, seed=4)
    assert {one.prompt for one in workload.requests()}.isdisjoint(str(one.prompt) for one in other.requests())
    assert [one.due for one in workload.requests()] != [one.due for one in other.requests()]


def test_no_warm_up_prompt_begins_as_a_counted_one_does() -> None:
    workload = Workload(num_prompts=20, input_len=100, warmup=5)
    begun = {str(one.prompt)[:40] for one in workload.requests()}
    assert begun.isdisjoint(str(one.prompt)[:40] for one in workload.warmups())


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_gaps_of_an_open_loop_vary_as_much_as_the_burstiness_says(burstiness: float) -> None:
    gaps = np.diff(arrivals(20_000, 10.0, burstiness, None, 7))
    assert gaps.mean() == pytest.approx(0.1, rel=0.01)
    assert gaps.std() / gaps.mean() == pytest.approx(burstiness**-0.5, rel=0.05)  # of a gamma distribution


def test_without_burstiness_requests_come_evenly() -> None:
    assert np.diff(arrivals(50, 10.0, float("inf"), None, 7)) == pytest.approx(np.full(49, 0.1))


@pytest.mark.parametrize(("strategy", "middle"), [("linear", 10.5), ("exponential", 20**0.5)])
def test_a_ramps_rate_grows_from_its_first_to_its_last_request(strategy: str, middle: float) -> None:
    ramp = Ramp(1.0, 20.0, strategy)  # type: ignore[arg-type]
    rates = 1 / np.diff(arrivals(4001, None, float("inf"), ramp, 7))
    assert (rates[0], rates[2000], rates[-1]) == pytest.approx((1, middle, 20), rel=0.01)


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """Three requests, of which the second begins as the first does for two blocks."""
    lines = [
        {"timestamp": 3000, "input_length": 1100, "output_length": 5, "hash_ids": [0, 1, 2]},
        {"timestamp": 1000, "input_length": 1030, "output_length": 7, "hash_ids": [0, 1, 9]},
        {"timestamp": 5000, "input_length": 600, "output_length": 9, "hash_ids": [4, 5]},
    ]
    path = tmp_path / "trace.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.parametrize("spelling", ["text", "ids"])
def test_a_traces_requests_keep_lengths_times_and_shared_prefixes(trace: Path, spelling: str) -> None:
    workload = Workload(data="trace", num_prompts=3, trace_speed=2.0, spelling=spelling)  # type: ignore[arg-type]
    requests = workload.requests(trace)
    tokenizer = Tokenizer()
    tokens = [tokenizer.encode(one.prompt) if isinstance(one.prompt, str) else one.prompt for one in requests]
    assert [len(one) for one in tokens] == [1030, 1100, 600]
    assert [one.due for one in requests] == [0, 1, 2]
    assert [one.output_tokens for one in requests] == [7, 5, 9]
    same = next(number for number, pair in enumerate(zip(tokens[0], tokens[1], strict=False)) if pair[0] != pair[1])
    assert same in range(1024, 1030)  # two blocks of 512, and perhaps a token by chance
    assert tokens[2][1:20] != tokens[0][1:20]


def test_a_line_that_is_no_request_of_a_trace_is_named(trace: Path) -> None:
    trace.write_text(trace.read_text() + '{"timestamp": 1, "input_length": 9999, "output_length": 1, "hash_ids": [1]}')
    with pytest.raises(PdctlError, match=r"line 4 .* do not hold 9999 tokens"):
        Trace.read(trace)


def test_client_processes_share_a_workload_without_rest_and_keep_conversations_whole() -> None:
    workload = Workload(data="conversations", num_prompts=21, turns=3, input_len=5)
    requests = workload.requests()
    shares = [share_of(workload, requests, number, 3) for number in range(3)]
    assert sorted(one.number for share in shares for one in share) == list(range(21))
    owners = [{one.conversation for one in share} for share in shares]
    assert not owners[0] & owners[1] | owners[1] & owners[2]


def chunk(payload: str) -> bytes:
    data = f"data: {payload}\n\n".encode()
    return b"%x\r\n%s\r\n" % (len(data), data)


Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


async def sent(serve: Serve, workload: Workload) -> list[Record]:
    """Send a workload to a server that answers as `serve` does."""
    serving: set[asyncio.Task[object]] = set()

    async def served(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        serving.add(asyncio.current_task())  # type: ignore[arg-type]
        try:
            await serve(reader, writer)
        finally:
            writer.close()

    server = await asyncio.start_server(served, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    records: list[Record] = []
    share = Share(f"http://127.0.0.1:{port}", "m", workload, workload.requests(), workload.concurrency)
    await Load(share, records.append).run()
    server.close()
    await asyncio.gather(*serving)
    return records


class Server:
    """A server that sends tokens at known times and keeps what it was sent."""

    def __init__(self, pauses: tuple[float, ...] = (0.2, 0.1, 0.1)) -> None:
        self.pauses = pauses
        self.bodies: list[dict[str, object]] = []
        self.heads: list[str] = []
        self.left = 0

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                length = int(re.search(rb"content-length: (\d+)", head)[1])  # type: ignore[index]
                self.bodies.append(json.loads(await reader.readexactly(length)))
                self.heads.append(head.decode())
                writer.write(
                    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
                )
                for pause in self.pauses:
                    await asyncio.sleep(pause)
                    writer.write(chunk('{"choices":[{"index":0,"text":"a","token_ids":[7]}]}'))
                    await writer.drain()
                usage = {"prompt_tokens": 7, "total_tokens": 10, "completion_tokens": len(self.pauses)}
                writer.write(chunk(json.dumps({"choices": [], "usage": usage}, separators=(",", ":"))))
                writer.write(chunk("[DONE]") + b"0\r\n\r\n")
        except (asyncio.IncompleteReadError, ConnectionError):
            self.left += 1


def test_the_client_measures_the_gaps_that_a_server_makes() -> None:
    server = Server()
    records = asyncio.run(sent(server, replace(TINY, num_prompts=3)))
    assert [body["max_tokens"] for body in server.bodies] == [3, 3, 3]
    assert all(body["ignore_eos"] and body["stream_options"] == {"include_usage": True} for body in server.bodies)
    for record in records:
        assert (record.ok, record.prompt_tokens, record.output_tokens) == (True, 7, 3)
        assert 0.19 < record.ttft < 1
        assert len(record.itls) == 2
        assert all(0.09 < gap < 1 for gap in record.itls)
        assert record.latency == pytest.approx(record.ttft + sum(record.itls))


def test_a_later_turn_repeats_the_conversation_and_its_answers_under_one_session() -> None:
    server = Server((0.0, 0.0))
    workload = Workload(
        data="conversations", num_prompts=6, turns=3, input_len=4, output_len=2, concurrency=2, spelling="ids"
    )
    asyncio.run(sent(server, workload))
    talks: dict[str, list[list[int]]] = {}
    for head, body in zip(server.heads, server.bodies, strict=True):
        session = re.search(r"x-session-id: (\S+)", head)
        assert session
        talks.setdefault(session[1], []).append(body["prompt"])  # type: ignore[arg-type]
    assert sorted(talks) == ["conversation-0", "conversation-1"]
    for first, second, third in talks.values():
        assert (len(first), len(second), len(third)) == (4, 4 + 2 + 4, 4 + 2 + 4 + 2 + 4)
        assert second[:6] == [*first, 7, 7]
        assert third[:12] == [*second, 7, 7]


def test_a_client_that_leaves_closes_its_connection_after_the_drawn_token() -> None:
    server = Server((0.01,) * 40)
    workload = replace(TINY, num_prompts=4, output_len=20, abort_share=1.0)
    records = asyncio.run(sent(server, workload))
    wished = {one.number: one.abort_after for one in workload.requests()}
    assert all(record.aborted and not record.ok and not record.error for record in records)
    assert {record.number: record.output_tokens for record in records} == wished


def test_an_open_loop_sends_by_the_clock_and_counts_what_waited_for_room() -> None:
    server = Server((0.3,))
    free = asyncio.run(sent(server, replace(TINY, num_prompts=4, rate=40.0, concurrency=None)))
    assert max(record.start for record in free) - min(record.start for record in free) < 0.3
    held = asyncio.run(sent(server, replace(TINY, num_prompts=4, rate=40.0, concurrency=1)))
    assert sorted(record.queued for record in held)[-1] > 0.5


def test_a_server_that_breaks_off_is_a_failed_request_with_the_reason() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + chunk('{"choices":[{"text":"a"}]}'))
        writer.close()

    assert [record.error for record in asyncio.run(sent(serve, TINY))] == ["the server broke off its answer"] * 2


def test_a_server_that_falls_silent_is_a_failed_request_and_its_connection_is_closed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(client, "SILENCE_SECONDS", 0.5)
    ends: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        if not ends:  # the first one sends for longer than the limit; the second never says a word
            writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
            for _ in range(8):
                await asyncio.sleep(0.1)
                writer.write(chunk('{"choices":[{"text":"a"}]}'))
        with contextlib.suppress(ConnectionError):
            await reader.read()
        ends.append(await reader.read())

    records = asyncio.run(asyncio.wait_for(sent(serve, TINY), 20))
    assert [record.error for record in records] == ["no byte for 0.5 s"] * 2
    assert len(records[0].itls) == 7
    assert ends == [b"", b""]


def test_blocks_of_a_trace_are_the_same_wherever_they_come() -> None:
    assert words_of("ids").draw("a", 30) == words_of("ids").draw("a", 30)
    assert words_of("text").draw("a", 30) != words_of("text").draw("b", 30)
