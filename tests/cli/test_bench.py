"""The load generator and its result."""

import asyncio
import json
import pathlib
import re
from collections.abc import Awaitable, Callable

import pytest

from pdctl.bench.client import Record
from pdctl.bench.load import Outcome, Workload, run
from pdctl.bench.prompts import random_texts
from pdctl.bench.result import result, table
from pdsim.engine.tokenizer import Tokenizer

# the keys of `vllm bench serve --save-result` (0.32), in its order
VLLM_KEYS = (
    "date endpoint_type backend label model_id tokenizer_id num_prompts request_rate burstiness "
    "max_concurrency duration completed failed total_input_tokens total_output_tokens request_throughput "
    "request_goodput output_throughput total_token_throughput latencies queue_times max_output_tokens_per_s "
    "max_concurrent_requests rtfx mean_ttft_ms median_ttft_ms std_ttft_ms p99_ttft_ms mean_tpot_ms "
    "median_tpot_ms std_tpot_ms p99_tpot_ms mean_itl_ms median_itl_ms std_itl_ms p99_itl_ms"
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


def workload(count: int = 2) -> Workload:
    return Workload("http://x", "m", ["p"] * count, 3, 1)


def test_the_table_is_vllms_line_by_line() -> None:
    told = {
        "completed": 20, "failed": 0, "max_concurrency": 4, "duration": 5.536580248000064, "total_input_tokens": 4000,
        "total_output_tokens": 320, "request_throughput": 3.612338140899239, "output_throughput": 57.79741025438783,
        "max_output_tokens_per_s": 80.0, "max_concurrent_requests": 11, "total_token_throughput": 780.2650384342356,
        "mean_ttft_ms": 538.5139184999844, "median_ttft_ms": 412.3078315001294, "p99_ttft_ms": 1212.659382460065,
        "mean_tpot_ms": 36.836350873337935, "median_tpot_ms": 27.243911266668878, "p99_tpot_ms": 81.4909698960082,
        "mean_itl_ms": 36.83635087333793, "median_itl_ms": 22.186228000009578, "p99_itl_ms": 660.4958166602682,
    }  # fmt: skip
    assert table(told) == VLLM_TABLE


def test_the_result_has_vllms_keys_in_its_order_and_ours_behind() -> None:
    told = result(workload(), Outcome([Record(0.0, 5, 3, 0.5, [0.1, 0.3], 0.9)], 0.0, 1.0), simulated=True, extra={})
    assert list(told) == [*VLLM_KEYS, "simulated", "pdctl"]


def test_the_statistics_are_those_of_the_records() -> None:
    records = [
        Record(0.0, prompt_tokens=10, output_tokens=3, ttft=0.5, itls=[0.1, 0.3], latency=0.9),
        Record(0.2, prompt_tokens=20, output_tokens=2, ttft=0.7, itls=[0.2], latency=0.9),
        Record(0.4, error="status 500"),
    ]
    told = result(workload(3), Outcome(records, 0.0, 2.0), simulated=False, extra={})
    assert (told["completed"], told["failed"]) == (2, 1)
    assert (told["total_input_tokens"], told["total_output_tokens"]) == (30, 5)
    assert told["output_throughput"] == pytest.approx(2.5)
    assert told["mean_ttft_ms"] == pytest.approx(600)
    assert told["median_itl_ms"] == pytest.approx(200)
    assert told["mean_tpot_ms"] == pytest.approx(200)  # (0.9 - 0.5) / 2 and (0.9 - 0.7) / 1


def test_random_prompts_have_exactly_the_wished_number_of_tokens() -> None:
    tokenizer = Tokenizer()
    texts = random_texts(20, 137, seed=3)
    assert {len(tokenizer.encode(text)) for text in texts} == {137}
    assert texts == random_texts(20, 137, seed=3)
    assert texts != random_texts(20, 137, seed=4)


def chunk(payload: str) -> bytes:
    data = f"data: {payload}\n\n".encode()
    return b"%x\r\n%s\r\n" % (len(data), data)


async def measured(
    serve: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]], count: int
) -> Outcome:
    """Send `count` requests, one after the other, to a server that answers as `serve` does."""
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    outcome = Outcome()
    await run(Workload(f"http://127.0.0.1:{port}", "m", ["x"] * count, 3, 1), outcome, lambda record: None)
    server.close()
    return outcome


def test_the_client_measures_the_gaps_that_a_server_makes() -> None:
    """A server that sends tokens at known times; several requests on one connection."""
    seen: list[dict[str, object]] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while head := await reader.readuntil(b"\r\n\r\n"):
            length = int(re.search(rb"content-length: (\d+)", head)[1])  # type: ignore[index]
            seen.append(json.loads(await reader.readexactly(length)))
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
            for pause in (0.2, 0.1, 0.1):
                await asyncio.sleep(pause)
                writer.write(chunk('{"choices":[{"index":0,"text":"a"}]}'))
            writer.write(chunk('{"choices":[],"usage":{"prompt_tokens":7,"total_tokens":10,"completion_tokens":3}}'))
            writer.write(chunk("[DONE]") + b"0\r\n\r\n")

    outcome = asyncio.run(measured(serve, 3))
    assert [body["max_tokens"] for body in seen] == [3, 3, 3]
    assert all(body["ignore_eos"] and body["stream_options"] == {"include_usage": True} for body in seen)
    for record in outcome.records:
        assert (record.ok, record.prompt_tokens, record.output_tokens) == (True, 7, 3)
        assert 0.19 < record.ttft < 1
        assert len(record.itls) == 2
        assert all(0.09 < gap < 1 for gap in record.itls)
        assert record.latency == pytest.approx(record.ttft + sum(record.itls))


def test_a_server_that_breaks_off_is_a_failed_request_with_the_reason(tmp_path: pathlib.Path) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + chunk('{"choices":[{"text":"a"}]}'))
        writer.close()

    assert [record.error for record in asyncio.run(measured(serve, 2)).records] == [
        "the server broke off its answer"
    ] * 2
