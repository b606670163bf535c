"""OpenTelemetry traces, sent to a collector that reads OTLP."""

import asyncio
import gzip
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from pdrouter.observe.traces import Traces, TracesError
from router.fakes import Bed, Out, Seen, routed, run

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = "00f067aa0ba902b7"


class Collector:
    """Takes spans over HTTP."""

    def __init__(self) -> None:
        self.spans: dict[str, Any] = {}

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        length = int(next(line.split(":")[1] for line in head.split("\r\n") if line.startswith("content-length:")))
        raw = await reader.readexactly(length)
        if "content-encoding: gzip" in head:
            raw = gzip.decompress(raw)
        for resource in ExportTraceServiceRequest.FromString(raw).resource_spans:
            for scope in resource.scope_spans:
                self.spans |= {span.name: span for span in scope.spans}
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
        await writer.drain()
        writer.close()


def told(span: Any) -> dict[str, Any]:
    """The attributes of a span."""
    values = {one.key: one.value for one in span.attributes}
    return {key: getattr(value, value.WhichOneof("value")) for key, value in values.items()}


@asynccontextmanager
async def traced(**settings: Any) -> AsyncIterator[tuple[Bed, Collector]]:
    """A router that sends traces; what it has sent is complete when it has stopped."""
    collector = Collector()
    server = await asyncio.start_server(collector.serve, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1/traces"
    async with server, routed(otel_endpoint=url, **settings) as bed:
        yield bed, collector


def test_a_request_is_one_span_with_one_child_for_each_leg_in_the_clients_trace() -> None:
    async def main() -> None:
        async with traced() as (bed, collector):
            answer = await bed.post(
                "/v1/completions", {"model": "tiny", "prompt": "hi"}, traceparent=f"00-{TRACE}-{PARENT}-01",
                tracestate="vendor=1",
            )  # fmt: skip
            assert answer.status == 200
        request, prefill, decode = (collector.spans[name] for name in ("POST /v1/completions", "prefill", "decode"))
        assert request.trace_id.hex() == prefill.trace_id.hex() == decode.trace_id.hex() == TRACE
        assert request.parent_span_id.hex() == PARENT
        assert prefill.parent_span_id == decode.parent_span_id == request.span_id
        for engine, span in ((bed.prefill, prefill), (bed.decode, decode)):
            headers = engine.seen[-1].headers
            assert headers["traceparent"] == f"00-{TRACE}-{span.span_id.hex()}-01"
            assert headers["tracestate"] == "vendor=1"
            assert f"http://{told(span)['server.address']}:{told(span)['server.port']}" == engine.url
        assert prefill.start_time_unix_nano <= prefill.end_time_unix_nano <= decode.start_time_unix_nano
        assert decode.end_time_unix_nano <= request.end_time_unix_nano
        assert told(request)["http.response.status_code"] == told(decode)["http.response.status_code"] == 200
        assert told(request)["pd.request_id"] == answer.headers["x-request-id"]

    run(main)


def test_a_failed_leg_is_marked_in_its_span() -> None:
    async def refuse(seen: Seen, out: Out) -> None:
        await out.json({"error": {"message": "no"}}, 500)

    async def main() -> None:
        async with traced() as (bed, collector):
            bed.decode.behave = refuse
            assert (await bed.complete()).status == 500
        assert told(collector.spans["decode"])["error.type"] == "500"
        assert collector.spans["decode"].status.code == collector.spans["POST /v1/completions"].status.code == 2
        assert collector.spans["prefill"].status.code == 0

    run(main)


def test_a_collector_that_is_down_costs_no_request() -> None:
    async def main() -> None:
        async with routed(otel_endpoint="http://127.0.0.1:9/v1/traces") as bed:
            assert [(await bed.complete()).status for _ in range(5)] == [200] * 5

    run(main)


def test_traces_without_their_packages_are_told_with_the_next_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(TracesError, match=r"pip install 'pd-router\[otel\]'"):
        Traces("http://127.0.0.1:4318/v1/traces")
