"""The public port as an HTTP/1.1 server."""

import asyncio
import json

import pytest

from router import fakes
from router.fakes import Out, Seen, answer_to, event, read_answer, routed, run, until, wire

COMPLETE = wire("POST", "/v1/completions", b'{"prompt":"x"}')


def test_a_connection_serves_many_requests():
    async def main():
        async with routed() as bed:
            reader, writer = await bed.connect()
            for _ in range(3):
                writer.write(COMPLETE)
                assert (await read_answer(reader)).status == 200
            writer.close()
            await writer.wait_closed()

    run(main)


def test_requests_sent_ahead_are_answered_in_order():
    async def main():
        async with routed() as bed:

            async def slow_first(seen: Seen, out: Out) -> None:
                await asyncio.sleep(0.1 if seen.body["prompt"] == "0" else 0)
                await fakes.decode(seen, out)

            bed.decode.behave = slow_first
            reader, writer = await bed.connect()
            for number in range(20):
                body = json.dumps({"prompt": str(number), "stream": number % 2 == 1}).encode()
                writer.write(wire("POST", "/v1/completions", body))
            for number in range(20):
                answer = await read_answer(reader)
                assert answer.status == 200
                assert f"<{number}>".encode() in answer.body
            writer.close()
            await writer.wait_closed()

    run(main)


def test_ten_thousand_requests_sent_ahead_do_not_nest():
    async def main():
        async with routed() as bed:
            reader, writer = await bed.connect()
            writer.write(wire("GET", "/health") * 10_000)
            for _ in range(10_000):
                assert (await read_answer(reader, "GET")).status == 200
            writer.close()
            await writer.wait_closed()

    run(main)


def test_a_request_arriving_byte_by_byte_is_understood():
    async def main():
        async with routed() as bed:
            reader, writer = await bed.connect()
            for at in range(len(COMPLETE)):
                writer.write(COMPLETE[at : at + 1])
                await asyncio.sleep(0)
            assert (await read_answer(reader)).status == 200
            writer.close()
            await writer.wait_closed()

    run(main)


def test_a_client_that_expects_100_continue_gets_it_before_its_body():
    async def main():
        async with routed() as bed:
            reader, writer = await bed.connect()
            writer.write(wire("POST", "/v1/completions", headers={"expect": "100-continue", "content-length": "14"}))
            assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
            writer.write(b'{"prompt":"x"}')
            assert (await read_answer(reader)).status == 200
            writer.close()
            await writer.wait_closed()

    run(main)


def test_a_chunked_body_is_taken():
    async def main():
        async with routed() as bed:
            raw = b"POST /v1/completions HTTP/1.1\r\nhost: r\r\ntransfer-encoding: chunked\r\n\r\n"
            raw += b'7\r\n{"promp\r\n7\r\nt":"x"}\r\n0\r\n\r\n'
            assert (await bed.send(raw)).status == 200

    run(main)


def test_an_http_1_0_client_gets_a_stream_that_ends_with_the_connection():
    async def main():
        async with routed() as bed:
            reader, writer = await bed.connect()
            body = b'{"prompt":"x","stream":true}'
            writer.write(b"POST /v1/completions HTTP/1.0\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
            answer = await reader.read()
            assert b"transfer-encoding" not in answer
            assert answer.endswith(b"data: [DONE]\n\n")
            writer.close()
            await writer.wait_closed()

    run(main)


def test_a_client_that_offers_http2_is_served_as_http_1_1():
    async def main():
        async with routed() as bed:
            offer = {"connection": "upgrade, http2-settings", "upgrade": "h2c", "http2-settings": "AAMAAABkAAQ"}
            for method, path, body in (("POST", "/v1/completions", b'{"prompt":"x"}'), ("GET", "/health", b"")):
                answer = await bed.send(wire(method, path, body, offer), method)
                assert answer.status == 200
                assert "upgrade" not in answer.headers
            reader, writer = await bed.connect()
            writer.write(wire("POST", "/v1/completions", b'{"prompt":"x"}', offer) * 2)
            assert [(await read_answer(reader)).status for _ in range(2)] == [200, 200]
            writer.close()
            await writer.wait_closed()

    run(main)


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_over_the_limit_is_refused_with_413(chunked):
    async def main():
        async with routed(max_payload_size=1000) as bed:
            body = b'{"prompt":"' + b"x" * 200_000 + b'"}'
            if chunked:
                raw = b"POST /v1/completions HTTP/1.1\r\nhost: r\r\ntransfer-encoding: chunked\r\n\r\n"
                raw += b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
            else:
                raw = wire("POST", "/v1/completions", body)
            answer = await bed.send(raw)
            assert (answer.status, answer.error["type"]) == (413, "RequestTooLargeError")
            assert answer.headers["connection"] == "close"
            assert bed.prefill.seen == []

    run(main)


@pytest.mark.parametrize(
    "raw",
    [
        wire("GET", "/health", headers={"x-large": "x" * 40_000}),
        wire("GET", "/health", headers={f"x-{number}": "y" for number in range(200)}),
        b"GET /health HTTP/1.1\r\nx-unfinished: " + b"x" * 100_000,
    ],
    ids=["one header", "many headers", "unfinished header"],
)
def test_a_head_over_the_limit_is_refused_with_431(raw):
    async def main():
        async with routed() as bed:
            answer = await bed.send(raw, "GET")
            assert answer.status == 431
            assert (await bed.get("/health")).status == 200

    run(main)


@pytest.mark.parametrize(
    "raw",
    [
        b"nonsense\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nhost: r\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nhost: r\r\ncontent-length: -5\r\n\r\n",
        b"GET /health HTTP/1.1\r\nhost: r\r\nx: a\rb\r\n\r\n",
    ],
)
def test_what_is_not_http_is_refused_with_400_and_the_connection_closed(raw):
    async def main():
        async with routed() as bed:
            answer = await bed.send(raw)
            assert (answer.status, answer.error["code"]) == (400, 400)
            assert answer.headers["connection"] == "close"

    run(main)


@pytest.mark.parametrize(
    ("body", "told"),
    [(b"", "no body"), (b"{", "not valid JSON"), (b"[1]", "must be a JSON object"), (b'"x"', "must be a JSON object")],
)
def test_a_body_that_is_no_json_object_is_a_400(body, told):
    async def main():
        async with routed() as bed:
            for path in ("/v1/completions", "/v1/chat/completions"):
                answer = await bed.post(path, body)
                assert (answer.status, set(answer.error)) == (400, {"message", "type", "param", "code"})
                assert told in answer.error["message"]

    run(main)


def test_unknown_paths_and_methods_are_json_errors():
    async def main():
        async with routed() as bed:
            assert (await bed.get("/nothing")).error["code"] == 404
            assert (await bed.get("/v1/../metrics")).status == 404
            answer = await bed.get("/v1/completions")
            assert (answer.status, answer.headers["allow"]) == (405, "POST, OPTIONS")
            assert (await bed.post("/health", {})).status == 405
            options = await bed.send(wire("OPTIONS", "/v1/models"), "OPTIONS")
            assert (options.status, options.headers["allow"]) == (204, "GET, POST, HEAD, OPTIONS")

    run(main)


def test_head_tells_the_length_without_the_body():
    async def main():
        async with routed() as bed:
            reader, writer = await bed.connect()
            for path in ("/health", "/v1/models"):
                writer.write(wire("HEAD", path) + wire("GET", path))
                head, got = await read_answer(reader, "HEAD"), await read_answer(reader, "GET")
                assert head.status == 200
                assert head.body == b""
                assert head.headers["content-length"] == str(len(got.body))
            writer.close()
            await writer.wait_closed()

    run(main)


def test_other_openai_paths_go_to_one_decode_engine_as_they_are():
    async def main():
        async with routed() as bed:
            body = b'{ "odd" :  1 }'
            answer = await bed.post("/v1/embeddings?a=b%20c", body, content_type="application/json; charset=utf-8")
            assert answer.status == 200
            seen = bed.decode.seen[0]
            assert (seen.method, seen.target, seen.raw) == ("POST", "/v1/embeddings?a=b%20c", body)
            assert seen.headers["content-type"] == "application/json; charset=utf-8"
            for path in ("/v1/models", "/version", "/tokenizer_info"):
                assert (await bed.get(path)).json == {"path": path}
            assert bed.prefill.seen == []
            assert "pd_router_pairs_total{" not in await bed.metrics()

    run(main)


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/messages", "/v1/audio/transcriptions"])
def test_a_stream_of_a_path_that_the_router_does_not_read_arrives_as_it_comes(path):
    async def main():
        async with routed() as bed:
            go_on = asyncio.Event()

            async def behave(seen: Seen, out: Out) -> None:
                await out.events()
                await out.chunk(b"event: first\ndata: {}\n\n")
                await go_on.wait()
                await out.chunk(b"event: last\ndata: {}\n\n")
                await out.end()

            bed.decode.behave = behave
            reader, writer = await bed.connect()
            body = b'{"model": "tiny", "stream": true, "input": "x"}'
            writer.write(wire("POST", path, body, {"content-type": "application/json"}))
            async with asyncio.timeout(8):
                told = await reader.readuntil(b"event: first\ndata: {}\n\n")
                assert told.startswith(b"HTTP/1.1 200")
                go_on.set()
                assert (await reader.readuntil(b"0\r\n\r\n")).count(b"event: last\ndata: {}\n\n") == 1
            writer.close()

    run(main)


def test_a_stream_of_such_a_path_that_breaks_before_its_first_event_comes_from_another_engine():
    async def main():
        async with routed(1, 2, policy="round_robin") as bed:
            left = [True]

            async def behave(seen: Seen, out: Out) -> None:
                await out.events()
                if left:
                    left.clear()
                    await out.writer.drain()
                    out.cut()
                    return
                await out.chunk(b"event: first\ndata: {}\n\n")
                await out.end()

            bed.decodes[0].behave = bed.decodes[1].behave = behave
            answer = await bed.post("/v1/responses", b'{"stream": true}', content_type="application/json")
            assert (answer.status, answer.complete, answer.body) == (200, True, b"event: first\ndata: {}\n\n")
            assert sum(len(one.seen) for one in bed.decodes) == 2

    run(main)


def test_headers_that_matter_go_on_and_the_others_do_not():
    sent = {
        "authorization": "Bearer k", "traceparent": "00-1-2-01", "tracestate": "a=b", "baggage": "c=d", "b3": "1",
        "x-b3-traceid": "9", "x-request-id": "my.id-1", "connection": "keep-alive, x-hop", "x-hop": "1",
        "accept-encoding": "gzip", "x-data-parallel-rank": "3", "cookie": "secret", "te": "trailers",
    }  # fmt: skip
    kept = {"authorization", "traceparent", "tracestate", "baggage", "b3", "x-b3-traceid", "x-request-id"}

    async def main():
        async with routed() as bed:
            answer = await bed.send(wire("POST", "/v1/completions", b'{"prompt":"x"}', sent))
            assert answer.status == 200
            assert answer.headers["x-request-id"] == "my.id-1"
            for engine in (bed.prefill, bed.decode):
                got = dict(engine.seen[0].headers)
                assert got.pop("host") == engine.url.removeprefix("http://")
                assert got.pop("content-type") == "application/json"
                assert int(got.pop("content-length")) == len(engine.seen[0].raw)
                assert got == {name: sent[name] for name in kept}

    run(main)


@pytest.mark.parametrize("told", ["a b", "x" * 200, "ü", 'a"b', "a;b"])
def test_a_request_id_that_could_do_harm_is_replaced(told):
    async def main():
        async with routed() as bed:
            await bed.send(wire("POST", "/v1/completions", b'{"prompt":"x"}', {"x-request-id": told}))
            first, second = bed.prefill.seen[0].headers["x-request-id"], bed.decode.seen[0].headers["x-request-id"]
            assert first == second
            assert first.isalnum()
            assert len(first) == 32

    run(main)


def test_without_the_api_key_nothing_reaches_an_engine():
    async def main():
        async with routed(api_key="s3cret") as bed:
            for told in ({}, {"authorization": "Bearer wrong"}, {"authorization": "s3cret"}):
                for path in ("/v1/completions", "/v1/models", "/tokenize"):
                    method = "POST" if path == "/v1/completions" else "GET"
                    answer = await bed.send(wire(method, path, b'{"prompt":"x"}' if method == "POST" else b"", told))
                    assert (answer.status, answer.error["type"]) == (401, "AuthenticationError")
            assert bed.prefill.seen == bed.decode.seen == []
            assert (await bed.get("/health")).status == 200
            assert (await bed.get("/ready")).status == 200
            answer = await bed.post("/v1/completions", {"prompt": "x"}, authorization="Bearer s3cret")
            assert answer.status == 200

    run(main)


def test_a_slow_client_makes_the_engine_wait_and_memory_stays_bounded():
    total = 64 * 1024 * 1024

    async def main():
        async with routed() as bed:
            sent = 0
            piece = b"data: " + b"x" * 65_000 + b"\n\n"

            async def flood(seen: Seen, out: Out) -> None:
                nonlocal sent
                await out.events()
                while sent < total:
                    await out.chunk(piece)
                    sent += len(piece)
                await out.end()

            bed.decode.behave = flood
            reader, writer = await asyncio.open_connection("127.0.0.1", bed.router.public.port, limit=1024)
            writer.write(wire("POST", "/v1/completions", b'{"prompt":"x","stream":true}'))
            before = -1
            while before != sent or not sent:  # until the engine makes no more progress
                before = sent
                await asyncio.sleep(0.3)
            assert sent < 24 * 1024 * 1024, "the kernel's buffers and little more"
            received = 0
            while data := await reader.read(1 << 20):
                received += len(data)
                if received > total:
                    break
            assert sent >= total, "once the client reads, all of it comes"
            writer.close()
            await writer.wait_closed()

    run(main)


def test_a_client_that_does_not_take_its_answer_gets_no_other_request_served():
    async def main():
        async with routed() as bed:

            async def decode(seen: Seen, out: Out) -> None:
                await out.json(answer_to(seen, filler="x" * 7_000_000))

            bed.decode.behave = decode
            reader, writer = await asyncio.open_connection("127.0.0.1", bed.router.public.port, limit=1024)
            for number in range(5):
                body = b'{"prompt":"%d"}' % number
                writer.write(wire("POST", "/v1/completions", body) + wire("GET", "/health") * 20)
            await until(lambda: bed.decode.seen, "the first is served")
            bed.decode.behave = fakes.decode
            for _ in range(20):
                assert (await bed.complete()).status == 200
            assert [seen.body["prompt"] for seen in bed.decode.seen] == ["0"] + ["hi"] * 20
            answers = [await read_answer(reader) for _ in range(5 * 21)]
            assert [answer.status for answer in answers] == [200] * (5 * 21)
            writer.close()
            await writer.wait_closed()

    run(main)


def test_log_lines_cannot_be_forged(capfd):
    async def main():
        async with routed() as bed:
            await bed.post("/v1/completions", {"prompt": "x", "user": "a\nINFO request_id=fake status=200"})
            await bed.send(wire("GET", "/v1/x%0a%20request_id=fake?y=fake"), "GET")
            await bed.send(
                wire("POST", "/v1/completions", b'{"prompt":"x"}', {"x-session-id": "a status=500 prefill=http://evil"})
            )

    run(main)
    lines = [line for line in capfd.readouterr().err.splitlines() if "request_id=" in line]
    assert len(lines) == 3
    assert not any("fake" in line or "evil" in line for line in lines)


def test_each_request_is_logged_once_with_both_engines_and_times(capfd):
    async def main():
        async with routed() as bed:
            await bed.post("/v1/completions", {"prompt": "x"}, x_session_id="s", x_request_id="r1")
            pair.append(f"prefill={bed.prefill.url} decode={bed.decode.url}")

    pair: list[str] = []
    run(main)
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "request_id=r1" in line]
    assert f"path=/v1/completions status=200 {pair[0]} prefill_ms=" in line
    fields = dict(part.split("=", 1) for part in line.split(" ")[2:])
    assert 0 < float(fields["prefill_ms"]) < float(fields["total_ms"])
    assert 0 < float(fields["decode_ttft_ms"]) < float(fields["total_ms"])
    assert fields["reason"] == "consistent_hash:header:x-session-id"


def test_metrics_tell_requests_errors_pairs_and_in_flight():
    async def main():
        async with routed() as bed:
            hold = asyncio.Event()

            async def held(seen: Seen, out: Out) -> None:
                await hold.wait()
                await out.json(answer_to(seen))

            bed.decode.behave = held
            task = asyncio.ensure_future(bed.complete())
            await until(lambda: bed.decode.seen, "decode is busy")
            page = await bed.metrics()
            assert f'pd_router_in_flight{{engine="{bed.decode.url}",role="decode"}} 1.0' in page
            assert f'pd_router_in_flight{{engine="{bed.prefill.url}",role="prefill"}} 0.0' in page
            hold.set()
            await task
            await bed.get("/nothing")
            page = await bed.metrics()
            assert 'pd_router_requests_total{path="/v1/completions",status="200"} 1.0' in page
            assert 'pd_router_requests_total{path="other",status="404"} 1.0' in page
            assert 'pd_router_errors_total{leg="router",reason="not_found"} 1.0' in page
            assert f'pd_router_pairs_total{{decode="{bed.decode.url}",prefill="{bed.prefill.url}"}} 1.0' in page
            for name in ("ttft", "handoff", "prefill"):
                assert f"pd_router_{name}_seconds_count 1.0" in page
            assert f'pd_router_in_flight{{engine="{bed.decode.url}",role="decode"}} 0.0' in page

    run(main)


def test_clients_cannot_grow_the_metrics_page():
    async def main():
        async with routed() as bed:
            for number in range(50):
                await bed.get(f"/v1/{number}")
            assert (await bed.metrics()).count("pd_router_requests_total{") == 1

    run(main)


def test_list_workers_and_ready_tell_the_fleet():
    async def main():
        async with routed(2, 1) as bed:
            bed.prefills[1].healthy = False
            await until(lambda: len(bed.router.fleet.healthy("prefill")) == 1, "one is seen as down")
            workers = await bed.workers()
            told = {"url": bed.prefills[1].url, "role": "prefill", "healthy": False, "in_flight": 0, "model": "tiny"}
            assert workers[1] | told == workers[1]
            assert (await bed.admin("GET", "/list_workers")).json["urls"] == [one["url"] for one in workers]
            assert (await bed.get("/ready")).json == {
                "status": "ready", "prefill": {"healthy": 1, "total": 2}, "decode": {"healthy": 1, "total": 1},
            }  # fmt: skip

    run(main)


def test_a_failure_inside_the_router_is_a_500_and_does_not_hang():
    async def main():
        async with routed() as bed:
            bed.router.fleet.ready = None  # type: ignore[assignment,method-assign]
            answer = await bed.get("/ready")
            assert (answer.status, answer.error["type"]) == (500, "InternalServerError")

    run(main)


def test_draining_finishes_what_is_under_way_and_accepts_nothing_new():
    async def main():
        async with routed(drain_timeout_secs=10) as bed:
            go_on = asyncio.Event()

            async def decode(seen: Seen, out: Out) -> None:
                await out.events()
                await out.chunk(event(seen, 0, "a"))
                await go_on.wait()
                await out.chunk(b"data: [DONE]\n\n")
                await out.end()

            bed.decode.behave = decode
            idle_reader, idle_writer = await bed.connect()
            task = asyncio.ensure_future(bed.complete(stream=True))
            await until(lambda: bed.decode.seen, "a stream is under way")
            port = bed.router.public.port
            stopping = asyncio.ensure_future(bed.router.stop())
            assert await idle_reader.read() == b"", "idle connections are closed at once"
            idle_writer.close()
            with pytest.raises(OSError):  # noqa: PT011
                await asyncio.open_connection("127.0.0.1", port)
            assert not stopping.done()
            go_on.set()
            answer = await task
            assert answer.complete
            assert answer.body.endswith(b"[DONE]\n\n")
            await stopping

    run(main)
