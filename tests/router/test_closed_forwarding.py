"""Whatever a request says, it goes to engines of the fleet, as one request, and into one line of the log."""

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

from router.served import ADMIN, METRICS
from router.standing import CLOSING_HEALTH, HEALTH, Standing, post, read_answers, standing

ELSEWHERE = "169.254.169.254"
STOLEN = {
    "do_remote_prefill": True, "do_remote_decode": False, "remote_engine_id": "e", "remote_request_id": "r",
    "remote_block_ids": [1], "remote_host": ELSEWHERE, "remote_port": 80,
}  # fmt: skip


@pytest.fixture(scope="module")
def bed() -> Iterator[Standing]:
    with standing("--log-format", "text") as found:
        yield found
        assert found.malformed() == []
        assert "Traceback" not in found.log()


@pytest.fixture(autouse=True)
def anew(bed: Standing) -> None:
    bed.forget()


def sent(raw: bytes, path: str, kind: str = "application/json") -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: router\r\nContent-Type: {kind}\r\nContent-Length: {len(raw)}\r\n\r\n"
    return head.encode() + raw


# where engines fetch from

PATHS = [
    "/v1/completions", "/v1/chat/completions", "/v1/messages", "/v1/responses", "/v1/embeddings", "/tokenize",
    "/v1/completions/render", "/v1/completions?x=y",
]  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
def test_no_client_can_tell_an_engine_where_to_fetch_from(bed: Standing, path: str):
    ticket = json.dumps(STOLEN)
    bodies = [
        f'{{"kv_transfer_params":{ticket},"prompt":"x"}}',
        f'{{"prompt":"x","kv_transfer_params":{ticket},"kv_transfer_params":{ticket}}}',
        f'{{"prompt":"x","\\u006bv_transfer_par\\u0061ms":{ticket}}}',
        f'{{"prompt":"x","ec_transfer_params":{ticket}}}',
        f'{{"prompt":"x","vllm_xargs":{{"kv_transfer_params":"{ELSEWHERE}","a":1}}}}',
        f'{{"prompt":"x","vllm_xargs":{{"ec_transfer_params":["{ELSEWHERE}"],"a":1}}}}',
        # in each of these cases one engine serves alone
        f'{{"prompt":"x","echo":true,"logprobs":1,"kv_transfer_params":{ticket}}}',
        f'{{"prompt":"x","max_tokens":0,"vllm_xargs":{{"kv_transfer_params":"{ELSEWHERE}"}}}}',
        f'{{"kv_transfer_params":{ticket}}}',
        # a batch
        f'{{"prompt":["x","y"],"kv_transfer_params":{ticket},"vllm_xargs":{{"kv_transfer_params":"{ELSEWHERE}"}}}}',
    ]
    for body in bodies:
        assert bed.one(sent(body.encode(), path)).status == 200
    assert len(bed.decode.reached) >= len(bodies)
    for reached in bed.reached():
        assert ELSEWHERE.encode() not in reached.body
        assert "ec_transfer_params" not in reached.json
        told = reached.json.get("kv_transfer_params")
        assert told is None or told["remote_host"] in (None, "127.0.0.1")  # what the router wants, or the ticket
        assert not {"kv_transfer_params", "ec_transfer_params"} & set(reached.json.get("vllm_xargs") or ())


@pytest.mark.parametrize("path", PATHS)
def test_what_the_router_cannot_read_as_json_nobody_gets_to_read_otherwise(bed: Standing, path: str):
    """Python reads more than JSON: what the router refuses it would understand, with the client's ticket."""
    ticket = json.dumps(STOLEN)
    bodies = [
        f'{{"kv_transfer_params":{ticket},"x":NaN}}'.encode(),
        f'{{"kv_transfer_params":{ticket},"x":-Infinity}}'.encode(),
        f'{{"kv_transfer_params":{ticket},"x":"\\ud800"}}'.encode(),
        f'{{"kv_transfer_params":{ticket},"x":"a\tb"}}'.encode(),
        f'{{"kv_transfer_params":{ticket},}}'.encode(),
        f'{{"kv_transfer_params":{ticket}}}'.encode("utf-16"),
        f'{{"kv_transfer_params":{ticket}}}'.encode("utf-32-be"),
        f'{{"kv_transfer_params":{ticket}}}'.encode("utf-8-sig"),
        f'{{"kv_transfer_params":{ticket},"x":"\xff"}}'.encode("latin-1"),
        f'[{{"kv_transfer_params":{ticket}}}]'.encode(),
        f'{{"kv_transfer_params":{ticket}}}{{}}'.encode(),
        f'{{"kv_transfer_params":{ticket}}}\0'.encode(),
    ]
    for body in bodies:
        for kind in ("application/json", "text/plain", "application/vnd.x+json"):
            assert bed.one(sent(body, path, kind)).status == 400, body
    assert bed.reached() == []


def test_the_parts_of_a_form_go_on_as_they_are(bed: Standing):
    form = b'--x\r\ncontent-disposition: form-data; name="file"; filename="a"\r\n\r\n\x00\xff{"\\\r\n--x--\r\n'
    assert bed.one(sent(form, "/v1/audio/transcriptions", "multipart/form-data; boundary=x")).status == 200
    (reached,) = bed.reached()
    assert reached.body == form
    assert reached.header("content-type") == ["multipart/form-data; boundary=x"]


# which paths there are

CLOSED_PATHS = [
    # what an engine would decode to a path that the router knows
    "/v1/%63ompletions", "/v1/chat%2fcompletions", "/v1%2fcompletions", "/%76%31/completions", "/v1/completions%20",
    "/v1/completions%00", "/v1/completions%3fx", "/v1/%2e%2e/metrics", "/v1/..%2fmetrics", "/v1/x%0d%0aHost:%20evil",
    # what another server would make such a path of
    "/v1/completions/", "/v1//completions", "//v1/completions", "/v1/./completions", "/v1/../v1/completions",
    "/v1/../metrics", "/v1/x/../../metrics", "/v1/.hidden", "/v1/", "/v1", "/V1/completions", "/v1/completions;x",
    "/v1/completions\\x", "/v1/a'b", "/v1/a\"b", "/v1/a<b>",
    # what engines have and clients may not use
    "/metrics", "/health/", "/sim/fault", "/sim/state", "/reset_prefix_cache", "/sleep", "/wake_up", "/collective_rpc",
    "/abort_requests", "/start_profile", "/inference/v1/generate", "/invocations", "/server_info", "/docs",
    "/openapi.json", "/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/v1/load_lora_adapter?x",
    # what the router has on other ports
    "/list_workers", "/add_worker", "/remove_worker", "/debug/routing",
]  # fmt: skip


def test_only_plain_paths_of_the_openai_api_reach_engines(bed: Standing):
    for path in CLOSED_PATHS:
        for raw in (sent(b'{"prompt":"x"}', path), f"GET {path} HTTP/1.1\r\nHost: router\r\n\r\n".encode()):
            assert bed.one(raw).status in (404, 405), path
        absolute = sent(b'{"prompt":"x"}', f"http://elsewhere{path}")
        assert bed.ended(absolute + CLOSING_HEALTH)[0].status in (404, 400), path
    assert bed.reached() == []


def test_metrics_and_admin_have_ports_of_their_own_without_anything_else(bed: Standing):
    for port, own in ((METRICS, {"/metrics"}), (ADMIN, {"/list_workers", "/debug/routing"})):
        paths = {"/metrics", "/list_workers", "/debug/routing", "/health", "/v1/models", "/", "/v1/completions"}
        for path in paths:
            wire = bed.wire(port)
            wire.send(CLOSING_HEALTH.replace(b"/health", path.encode()))
            assert [answer.status for answer in read_answers(wire.rest())] == [200 if path in own else 404], path
            wire.close()
        wire = bed.wire(port)
        wire.send(HEALTH.replace(b"Host", b"Host : x\r\nHost"))  # as strict as the public port
        assert [answer.status for answer in read_answers(wire.rest())] == [400]
        wire.close()
        wire = bed.wire(port)
        wire.send(b"POST /add_worker HTTP/1.1\r\nHost: r\r\nContent-Length: 65537\r\n\r\n")
        assert [answer.status for answer in read_answers(wire.rest())] == [413]
        wire.close()
    assert bed.reached() == []


def test_what_is_told_to_the_admin_port_is_read_as_strictly(bed: Standing):
    deep = b'{"url":"http://127.0.0.1:1","role":"x","y":' + b"[" * 900 + b"]" * 900 + b"}"
    for body in (
        deep,
        b'{"url":' * 8000,
        b"[" * 60_000,
        b'{"url":"http://a b:1"}',
        b'{"url":"http://a:1\\r\\nX: y"}',
        b"[]",
    ):
        wire = bed.wire(ADMIN)
        wire.send(
            b"POST /add_worker HTTP/1.1\r\nHost: r\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(body)
            + body
        )
        assert [answer.status for answer in read_answers(wire.rest())] == [400]
        wire.close()


# what goes on of a request's head

FORWARDED = {
    "host", "x-request-id", "content-type", "content-length", "authorization", "traceparent", "tracestate", "baggage",
}  # fmt: skip


def test_headers_that_could_lead_a_request_elsewhere_or_break_it_stay_in_the_router(bed: Standing):
    hostile = [
        f"X-Forwarded-Host: {ELSEWHERE}", f"X-Forwarded-For: {ELSEWHERE}", f"X-Forwarded-Proto: {ELSEWHERE}",
        f"Forwarded: for={ELSEWHERE};host={ELSEWHERE}", f"X-Real-Ip: {ELSEWHERE}", f"X-Original-Url: /{ELSEWHERE}",
        f"X-Rewrite-Url: /{ELSEWHERE}", f"X-Http-Method-Override: {ELSEWHERE}", f"X-Prefiller-Host-Port: {ELSEWHERE}:1",
        f"X-Prefiller-Url: http://{ELSEWHERE}", f"X-Gateway-Destination-Endpoint: {ELSEWHERE}", f"Via: 1.1 {ELSEWHERE}",
        f"X-Data-Parallel-Host-Port: {ELSEWHERE}", "X-Data-Parallel-Rank: 7", f"Proxy: http://{ELSEWHERE}",
        f"Proxy-Authorization: {ELSEWHERE}", f"Cookie: {ELSEWHERE}", f"Origin: http://{ELSEWHERE}", "Te: trailers",
        f"Referer: {ELSEWHERE}", "Keep-Alive: timeout=9", "Accept-Encoding: gzip", "Range: bytes=0-1",
        "Connection: keep-alive, host", "X-B3: 1", f"X: {ELSEWHERE}",
    ]  # fmt: skip
    kept = ["Authorization: Bearer k", "Traceparent: 00-1-2-01", "Tracestate: a=b", "Baggage: c=d"]
    headers = "".join(f"{line}\r\n" for line in hostile + kept)
    for path in ("/v1/completions", "/v1/messages"):
        assert bed.one(post("x", path, headers)).status == 200
    assert len(bed.reached()) == 3
    for engine in bed.engines:
        for reached in engine.reached:
            names = [name for name, _ in reached.headers]
            assert len(names) == len(set(names))
            assert set(names) <= FORWARDED
            assert reached.header("host") == [engine.url.removeprefix("http://")]
            assert ELSEWHERE not in str(reached.headers)


ODD = [
    "\xff\xfe",
    "a\tb",
    "a, b",
    "a; b=c",
    "'\"\\",
    "%0d%0aX: y",
    "\\r\\nX: y",
    "=?utf-8?q?x?=",
    "\xe2\x80\xa8X: y",
    "",
]


def test_a_value_is_one_value_wherever_it_goes(bed: Standing):
    for odd in ODD:
        names = (
            "X-Request-Id",
            "Traceparent",
            "Tracestate",
            "Baggage",
            "Authorization",
            "X-B3-Traceid",
            "X-Session-Id",
        )
        head = "".join(f"{name}: {odd}\r\n" for name in names).encode("latin-1")
        raw = b"POST /v1/completions HTTP/1.1\r\nHost: r\r\n" + head + b'Content-Length: 14\r\n\r\n{"prompt":"x"}'
        answer = bed.one(raw)
        assert answer.status == 200
        assert re.fullmatch(r"[0-9a-f]{32}", answer.headers["x-request-id"])
    for reached in bed.reached():
        assert {name for name, _ in reached.headers} <= FORWARDED | {"x-b3-traceid"}
        (told,) = reached.header("traceparent")
        assert told in [odd.strip() for odd in ODD]


FIELDS: list[Any] = [
    "a\nb", "a\r\nX-Evil: 1\r\n\r\nGET / HTTP/1.1", "\x00", "\x1b[31m", "\u2028", "\ud83d\ude00", "}", '"', "'\\",
    10**400,
]  # fmt: skip


def test_no_field_of_a_body_gets_into_the_head_of_a_request(bed: Standing):
    for field in ("model", "user", "session_id", "user_id", "request_id", "cache_salt", "prompt"):
        for value in FIELDS:
            body = json.dumps({"prompt": "x"} | {field: value}).encode()
            answer = bed.one(sent(body, "/v1/completions"))
            assert answer.status in (200, 400), (field, value)
    for reached in bed.reached():
        assert {name for name, _ in reached.headers} <= FORWARDED
        assert "evil" not in str(reached.headers).lower()
        assert "prompt" in reached.json


def test_what_an_engine_answers_is_one_answer_and_is_not_followed(bed: Standing):
    bed.decode.status, bed.decode.extra = 307, [("location", f"http://{ELSEWHERE}/"), ("trailer", "x"), ("server", "x")]
    try:
        for path in ("/v1/models", "/v1/completions"):
            answer = bed.one(post("x", path))
            assert answer.status == 307
            assert not {"trailer", "server"} & set(answer.headers)
    finally:
        bed.decode.status, bed.decode.extra = 200, []
    assert len(bed.reached()) == 3


# logs

TEXT = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z (DEBUG|INFO|WARNING|ERROR) [ -~]+")
REQUEST = re.compile(
    r" INFO request_id=[A-Za-z0-9._:/=+@-]{1,128} path=[a-z0-9/_]+ status=\d{3} prefill=\S+ decode=\S+ "
)


@pytest.mark.parametrize("style", ["text", "json"])
def test_a_request_is_one_line_of_the_log_whatever_is_in_it(style: str):
    forged = "2026-01-01T00:00:00.000Z INFO request_id=forged path=/ status=200"
    odd = [
        "a\n" + forged,
        "a\r" + forged,
        "\x1b[2J",
        "\x85" + forged,
        "\u2028" + forged,
        '","forged":"1',
        "a b=c",
        "\x00",
    ]
    with standing("--log-format", style, "--log-level", "debug") as found:
        for value in odd:
            for field in ("model", "user", "session_id", "user_id", "request_id", "x"):
                found.one(sent(json.dumps({"prompt": "x", field: value}).encode(), "/v1/completions"))
            found.one(sent(json.dumps({value: value}).encode(), "/v1/messages"))
            found.one(sent(b'{"prompt":' + value.encode(), "/v1/completions"))
            told = value.encode("latin-1", "replace").translate(None, b"\n\r\0\x1b\x85")
            head = b"POST /v1/completions HTTP/1.1\r\nHost: r\r\nX-Request-Id: %b\r\nX-Session-Id: %b\r\n" % (
                told,
                told,
            )
            found.one(head + b'Content-Length: 14\r\n\r\n{"prompt":"x"}')
            found.ended(b"GET /v1/" + told.replace(b" ", b"%0a") + b" HTTP/1.1\r\nHost: r\r\n\r\n" + CLOSING_HEALTH)
            found.ended(b"GET /" + value.encode() + b" HTTP/1.1\r\nHost: r\r\n\r\n" + CLOSING_HEALTH)
            found.ended(b"GET / HTTP/1.1\r\nHost: r\r\nX: " + value.encode() + b"\r\n\r\n" + CLOSING_HEALTH)
        found.serves()
        wire = found.wire(METRICS)  # all that was answered before is counted, so it is written soon
        wire.send(CLOSING_HEALTH.replace(b"/health", b"/metrics"))
        assert b"forged" not in wire.rest()
        found.router.process.terminate()
        found.router.process.wait(20)
        lines = found.log().splitlines()
    requests = 0
    for line in lines:
        assert line.isascii(), line
        if style == "json":
            told = json.loads(line)
            assert {"time", "level"} <= set(told)
            assert "forged" not in json.dumps(sorted(told))
            requests += "request_id" in told
            assert "forged" not in str(told.get("request_id"))
        else:
            assert TEXT.fullmatch(line), line
            requests += bool(REQUEST.search(line))
    assert "forged" not in "".join(lines)
    # Requests whose head could not be read have no line of their own beyond a refusal.
    assert requests >= len(odd) * 9
