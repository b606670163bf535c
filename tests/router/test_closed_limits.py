"""How much and how slowly clients may send, how many may come, and what happens to the rest."""

import json
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, suppress
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import trustme

from router.fakes import Answer
from router.standing import CLOSING_HEALTH, HEALTH, Standing, Wire, post, read_answers, standing
from support.processes import until

HOST = b"Host: router\r\n"
LINE = b"POST /v1/completions HTTP/1.1\r\n" + HOST


def length(size: int) -> bytes:
    return LINE + b"Content-Length: %d\r\n\r\n" % size


def large(body: bytes, path: str = "/v1/completions") -> bytes:
    return f"POST {path} HTTP/1.1\r\nHost: router\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


# sizes


@pytest.fixture(scope="module")
def small() -> Iterator[Standing]:
    """A router with low limits of size, and a policy that reads prompts."""
    flags = ["--max-payload-size", "200000", "--max-payload-memory", "500000", "--max-header-size", "4096"]
    flags += ["--max-headers", "20", "--max-prompts", "5", "--policy", "pd_cost"]
    with standing(*flags) as bed:
        yield bed
        assert "Traceback" not in bed.log()
        assert bed.malformed() == []


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        (b"GET /health HTTP/1.1\r\n" + HOST + b"X: y\r\n" * 19 + b"\r\n", 200),
        (b"GET /health HTTP/1.1\r\n" + HOST + b"X: y\r\n" * 20 + b"\r\n", 431),
        (b"GET /health HTTP/1.1\r\n" + HOST + b"X: " + b"y" * 4000 + b"\r\n\r\n", 200),
        (b"GET /health HTTP/1.1\r\n" + HOST + b"X: " + b"y" * 4100 + b"\r\n\r\n", 431),
        (b"GET /health HTTP/1.1\r\n" + HOST + b"y" * 5000 + b": x\r\n\r\n", 431),
        (b"GET /health HTTP/1.1\r\n" + HOST + b"X: " + b"y" * 100_000, 431),
        (b"GET /health HTTP/1.1\r\n" + HOST + b"x" * 100_000, 431),
        (b"GET /health?" + b"x" * 4000 + b" HTTP/1.1\r\n" + HOST + b"\r\n", 200),
        (b"GET /health?" + b"x" * 4100 + b" HTTP/1.1\r\n" + HOST + b"\r\n", 414),
        (b"G" * 100_000, 400),
    ],
    ids=[
        "20 headers", "21 headers", "4 KB", "more", "a long name", "an unfinished value", "an unfinished name",
        "a target of 4 KB", "a longer target", "a long method",
    ],
)  # fmt: skip
def test_a_head_has_a_largest_size_and_number_of_headers(small: Standing, raw: bytes, status: int):
    answers = small.ended(raw + (CLOSING_HEALTH if status == 200 else b""))
    assert answers[0].status == status
    assert len(answers) == (2 if status == 200 else 1)


def test_a_body_that_is_too_large_is_refused_before_it_is_sent_or_as_soon_as_it_is(small: Standing):
    small.forget()
    answers = small.ended(length(200_001))
    assert [answer.status for answer in answers] == [413]
    chunk = b"1000\r\n" + b" " * 4096 + b"\r\n"
    answers = small.ended(LINE + b"Transfer-Encoding: chunked\r\n\r\n" + chunk * 60)
    assert [answer.status for answer in answers] == [413]
    assert small.reached() == []
    fits = b'{"prompt":"' + b"x" * 199_987 + b'"}'
    assert small.one(large(fits)).status == 200


def test_bodies_together_have_a_largest_size_which_small_ones_do_not_meet(small: Standing):
    held = [small.wire() for _ in range(3)]
    for wire in held:  # 3 * 150,000 bytes of bodies that are not complete
        wire.send(length(200_000) + b" " * 150_000)
    # How much of them has been read already cannot be seen, so the next one is sent until there is no room for it.
    refused: list[Answer] = []

    def turned_away() -> bool:
        wire = small.wire()
        wire.send(length(200_000) + b" " * 190_000)
        wire.socket.settimeout(1)
        with suppress(TimeoutError):
            refused.extend(read_answers(wire.rest()))
        wire.close()
        return bool(refused)

    until(turned_away, 20, "a body that has no room is refused")
    assert refused[0].status == 503
    assert refused[0].headers["retry-after"] == "1"
    small.serves()
    for wire in held:
        wire.close()
    fits = large(b'{"prompt":"' + b"x" * 190_000 + b'"}')
    until(lambda: small.ended(fits + CLOSING_HEALTH)[0].status == 200, 20, "there is room again")
    for _ in range(10):  # and served ones take no room for ever
        assert small.one(fits).status == 200


@pytest.mark.parametrize(
    ("prompt", "status"),
    [
        (["x"] * 5, 200), (["x"] * 6, 400), ([[1, 2]] * 5, 200), ([[1, 2]] * 6, 400), (["x", [1]] * 3, 400),
        ([1, 2, 3, 4, 5, 6], 200), ([None] * 6, 400), ([{}] * 6, 400),
    ],
)  # fmt: skip
def test_a_request_has_a_largest_number_of_prompts_and_token_ids_are_none(small: Standing, prompt: Any, status: int):
    small.forget()
    assert small.one(post(prompt)).status == status
    assert bool(small.reached()) == (status == 200)


def test_what_a_batch_would_send_once_for_each_prompt_is_bounded(small: Standing):
    small.forget()
    answer = small.one(post(["x"] * 5, user="u" * 50_000))
    assert answer.status == 413
    assert "5 times" in answer.error["message"]
    assert small.reached() == []
    assert small.one(post(["x" * 30_000] * 5, user="u")).status == 200


def nested(depth: int, kind: str) -> bytes:
    """JSON of so many lists or objects within one another, the outermost one among them."""
    inner = {"lists": b"[" * depth + b"]" * depth, "objects": b'{"a":' * depth + b"1" + b"}" * depth}
    return inner[kind]


FIELDS = ["prompt", "messages", "tools", "cache_salt", "model", "user", "stream", "n", "max_tokens", "x"]


@pytest.mark.parametrize("kind", ["lists", "objects"])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/embeddings", "/tokenize"])
def test_json_has_a_greatest_depth_in_whatever_field(small: Standing, path: str, kind: str):
    small.forget()
    for field in FIELDS:
        for depth in (100, 253, 254, 255, 1022, 1023, 1024, 30_000):
            raw = b'{"prompt":"x","%b":%b}' % (field.encode(), nested(depth, kind))
            answer = small.one(large(raw, path))
            assert answer.status == 400, (field, depth)
            assert answer.error["message"].startswith(("The body may have 100", "The body is not valid JSON"))
    assert small.reached() == []
    raw = b'{"prompt":"x","x":%b}' % nested(99, kind)
    assert small.one(large(raw, path)).status == 200
    assert small.reached()[-1].json["x"] == json.loads(nested(99, kind))


def test_json_that_never_ends_is_a_400(small: Standing):
    small.forget()
    for mark in (b"[", b"{", b'{"a":', b"[[],", b'"', b'{"prompt":"\\'):
        assert small.one(large(mark * (190_000 // len(mark)))).status == 400
    assert small.reached() == []


def test_brackets_in_a_text_are_no_depth(small: Standing):
    text = "[{" * 40_000
    small.forget()
    assert small.one(post(text)).status == 200
    assert small.prompts() == [text]


def test_a_key_of_any_length_is_served_and_kept_short(small: Standing):
    for told in (post(user="u" * 150_000), post(headers=f"X-Session-Id: {'s' * 3000}\r\n")):
        assert small.one(told).status == 200
    wire = small.wire(29001)
    wire.send(CLOSING_HEALTH.replace(b"/health", b"/debug/routing"))
    (answer,) = read_answers(wire.rest())
    wire.close()
    assert {one["key_source"] for one in answer.json["decisions"]} >= {"body:user", "header:x-session-id"}
    assert max(len(one["key"]) for one in answer.json["decisions"]) < 60


def test_more_values_than_anybody_needs_are_refused_before_they_are_parsed():
    """64 MiB of `[],` would be two gigabytes of empty lists."""
    with standing() as bed:
        memory = psutil.Process(bed.router.process.pid).memory_info
        for value in (b"[],", b'"",', b"1,", b'{"":0},'):
            many = b'{"prompt":"x","x":[' + value * (60_000_000 // len(value)) + b"0]}"
            answer = bed.one(large(many))
            assert (answer.status, answer.error["message"]) == (400, "The body may have 2,097,152 values.")
        for value in (b"[],", b"{},", b'{"a":1},', b"[[]],"):
            answer = bed.one(large(b'{"prompt":"x","x":[' + value * 33_000 + b"0]}"))
            assert (answer.status, answer.error["message"]) == (400, "The body may have 32,768 objects and lists.")
        bed.serves()
        assert memory().rss < 400 * 1024 * 1024
        assert bed.prompts() == ["ordinary"]
        text = '{"a":[\\"' * 40_000  # brackets inside of a text are none
        for raw in (post(text), post([[1, 2, 3]] * 1000, n=1), post("x", x=[{}] * 30_000)):
            assert bed.one(raw).status == 200


# time


@pytest.fixture(scope="module")
def hasty() -> Iterator[Standing]:
    """A router that waits a second at most for a client."""
    flags = [f"--client-{what}-timeout-secs=1" for what in ("head", "idle", "write")]
    flags.append("--client-body-timeout-secs=0.3")  # and ten times that for a whole body
    with standing(*flags, "--max-connections-per-client", "40") as bed:
        yield bed
        assert "Traceback" not in bed.log()


def trickle(wire: Wire, raw: bytes, done: threading.Event) -> None:
    """Send bytes one at a time, far more often than any limit asks for."""
    for at in range(len(raw)):
        if done.wait(0.1):
            return
        wire.send(raw[at : at + 1])


@pytest.mark.parametrize(
    ("at_once", "slowly", "status"),
    [
        (b"", b"GET /health HTTP/1.1\r\n" + HOST + b"X: " + b"y" * 1000, 408),
        (b"GET /health HTTP/1.1\r\n" + HOST, b"X: y\r\n" * 200, 408),
        (length(1000), b" ", 408),
        (length(1000), b" " * 1000, 408),
        (LINE + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n" * 200, 408),
        (HEALTH + b"GET /he", b"alth" * 200, 408),
    ],
    ids=["a head", "its headers", "a body that stops", "a body", "chunks", "a second request"],
)
def test_what_arrives_too_slowly_is_refused_with_408(hasty: Standing, at_once: bytes, slowly: bytes, status: int):
    wire, done = hasty.wire(), threading.Event()
    wire.send(at_once)
    thread = threading.Thread(target=trickle, args=(wire, slowly, done))
    thread.start()
    answers = read_answers(wire.rest())
    done.set()
    thread.join()
    wire.close()
    assert answers[-1].status == status
    assert answers[-1].headers["connection"] == "close"


@pytest.mark.parametrize("first", [b"", HEALTH, b"\r\n" * 20], ids=["nothing", "a request", "empty lines"])
def test_a_connection_without_a_request_is_closed_without_an_answer(hasty: Standing, first: bytes):
    with closing(hasty.wire()) as wire:
        wire.send(first)
        assert len(read_answers(wire.rest())) == (first == HEALTH)


def test_a_client_that_takes_nothing_of_its_answer_is_cut_and_its_engine_let_go(hasty: Standing):
    event = b'data: {"choices":[{"index":0,"text":"%b"}]}\n\n' % (b"x" * 10_000)
    hasty.decode.answer, hasty.decode.kind, hasty.decode.streams = event * 3000, "text/event-stream", True
    try:
        with closing(hasty.wire(buffer=4096)) as wire:
            wire.send(post("slow", stream=True))
            until(lambda: "took nothing of its answer for 1 s" in hasty.log(), 20, "the client is cut")
            until(lambda: hasty.metric("pd_router_in_flight") == 0, 20, "no engine works for it")
            assert len(wire.rest()) < 30_000_000
    finally:
        hasty.decode.answer, hasty.decode.kind, hasty.decode.streams = None, "application/json", False
    hasty.serves()


def test_a_client_that_leaves_the_end_of_its_answer_is_cut_too(hasty: Standing):
    """Less than what makes a client count as slow may wait when its connection is to be closed."""
    process = psutil.Process(hasty.router.process.pid)
    with ExitStack() as stack:
        ports = set()
        for ending in ("idle", "told to close", "will send no more"):
            headers = "Connection: close\r\n" if ending == "told to close" else ""
            for size in range(100_000, 500_000, 40_000):  # one of them leaves a little, however much the kernel takes
                hasty.decode.answer = b'{"choices":[{"index":0,"text":"%b"}]}' % (b"x" * size)
                wire = stack.enter_context(closing(hasty.wire(buffer=4096)))
                ports.add(wire.socket.getsockname()[1])
                wire.send(post("slow", headers=headers))
                until(lambda: hasty.metric("pd_router_requests_running") == 0, 20, "it is answered")
                if ending == "will send no more":
                    wire.socket.shutdown(socket.SHUT_WR)
        hasty.decode.answer = None
        until(
            lambda: not any(one.raddr and one.raddr.port in ports for one in process.net_connections("tcp")),
            20, "all are closed",
        )  # fmt: skip
    hasty.serves()


def test_answers_that_clients_do_not_take_have_a_largest_size_together():
    with standing("--max-answer-memory", "60000000") as bed:
        bed.decode.answer = b'{"choices":[{"index":0,"text":"%b"}]}' % (b"x" * 20_000_000)
        wires = [bed.wire(buffer=4096) for _ in range(15)]
        for wire in wires:
            wire.send(post("slow", headers="Connection: close\r\n"))
        until(lambda: len(bed.prompts()) == 15, 20, "all are with engines")
        until(lambda: bed.metric("pd_router_requests_running") == 0, 20, "all are answered")
        cut = bed.log().count("clients take too little")
        assert 8 <= cut <= 12, "of each 20 MB wait, less what the kernel took"
        bed.decode.answer = None
        bed.serves()
        whole = [read_answers(wire.rest())[0].complete for wire in wires]
        assert whole.count(False) == cut
        assert bed.log().count("clients take too little") == cut
        for wire in wires:
            wire.close()


def test_a_client_that_only_sends_costs_no_memory():
    """Requests whose answers nobody takes are not even read."""
    with standing() as bed, closing(bed.wire(buffer=4096)) as wire:
        memory = psutil.Process(bed.router.process.pid).memory_info
        before = memory().rss
        wire.socket.settimeout(1)
        sent = 0
        with suppress(TimeoutError):
            while sent < 400_000_000:
                sent += wire.socket.send(HEALTH * 4000)
        assert sent < 400_000_000
        assert memory().rss - before < 40 * 1024 * 1024
        bed.serves()
        wire.socket.settimeout(20)
        wire.socket.shutdown(socket.SHUT_WR)
        wire.rest()
        bed.serves()


def test_requests_far_ahead_of_their_answers_wait_unread_and_are_answered_in_order(hasty: Standing):
    hasty.decode.hold = threading.Event()
    with closing(hasty.wire()) as wire:
        wire.send(post("first") + HEALTH * 5000 + post("last", headers="Connection: close\r\n"))
        until(lambda: "first" in hasty.prompts(), 20, "the first is with an engine")
        hasty.decode.hold.set()
        answers = read_answers(wire.rest())
    assert [answer.status for answer in answers] == [200] * 5002
    assert hasty.prompts()[-2:] == ["first", "last"]
    hasty.decode.hold = None


# connections


def test_a_client_has_a_largest_number_of_connections(hasty: Standing):
    wires = [hasty.wire() for _ in range(40)]
    for wire in wires:
        wire.send(HEALTH[:-2])
    (answer,) = hasty.ended(HEALTH)
    assert (answer.status, answer.headers["retry-after"]) == (503, "1")
    assert "connections" in answer.error["message"]
    for wire in wires:
        wire.close()
    until(lambda: hasty.ended(CLOSING_HEALTH)[0].status == 200, 20, "there is room again")


def test_clients_cannot_use_up_the_open_files_that_engines_are_reached_with():
    few = ["bash", "-c", 'ulimit -n 400; exec "$@"', "bash"]
    with standing("--max-concurrent-requests", "20", before=few) as bed:
        assert "max_connections=200 as files=400 may be open, asked=16384" in bed.log()
        wires = [bed.wire() for _ in range(600)]
        for wire in wires[:150]:
            wire.send(HEALTH)
            wire.until(rb"ok")
        turned_away = [wire.rest() for wire in wires[200:]]
        assert any(b"503" in told for told in turned_away)
        assert {told[:12] for told in turned_away} <= {b"HTTP/1.1 503", b""}
        wires[0].send(post("ordinary"))
        assert b"200 OK" in wires[0].until(rb"\r\n\r\n")
        for wire in wires[:200]:
            wire.close()
        assert "healthy=false" not in bed.log()
        until(lambda: bed.ended(CLOSING_HEALTH)[0].status == 200, 20, "there is room again")


def under_way(bed: Standing, number: int) -> bool:
    return bed.metric("pd_router_requests_running") + bed.metric("pd_router_requests_queued") == number


def test_requests_beyond_the_queue_get_429_at_once_and_those_in_it_are_served():
    flags = ["--max-concurrent-requests", "2", "--queue-size", "3", "--queue-timeout-secs", "60"]
    with standing(*flags) as bed:
        bed.prefill.hold = threading.Event()
        wires = [bed.wire() for _ in range(5)]
        for number, wire in enumerate(wires):
            wire.send(post(f"p{number}"))
            until(partial(under_way, bed, number + 1), 20)
        for path in ("/v1/completions", "/v1/chat/completions", "/v1/embeddings"):
            answer = bed.one(post("more", path))
            assert (answer.status, answer.error["type"]) == (429, "TooManyRequestsError")
            assert 1 <= int(answer.headers["retry-after"]) <= 60
        assert bed.one(HEALTH).status == 200
        assert len(bed.prefill.reached) == 2
        gone = wires.pop()
        gone.close()  # who leaves the queue makes room in it
        until(lambda: bed.metric("pd_router_requests_queued") == 2, 20)
        bed.prefill.hold.set()
        for wire in wires:
            assert b"200 OK" in wire.until(rb"\r\n\r\n")
            wire.close()
        assert sorted(bed.prompts()) == ["p0", "p1", "p2", "p3"]


def test_a_request_that_waits_too_long_in_the_queue_gets_429():
    flags = ["--max-concurrent-requests", "1", "--queue-size", "3", "--queue-timeout-secs", "0.5"]
    with standing(*flags) as bed:
        bed.prefill.hold = threading.Event()
        first = bed.wire()
        first.send(post("first"))
        until(lambda: bed.prefill.reached, 20)
        answer = bed.one(post("second"))
        assert answer.status == 429
        assert int(answer.headers["retry-after"]) >= 1
        bed.prefill.hold.set()
        assert b"200 OK" in first.until(rb"\r\n\r\n")
        first.close()
        assert bed.prompts() == ["first"]


# the API key


@pytest.mark.parametrize("source", ["file", "environment"])
def test_without_the_key_nothing_reaches_an_engine_and_no_large_body_is_read(tmp_path: Path, source: str):
    (tmp_path / "key").write_text("s3cret-key\n", encoding="utf-8")
    flags = ["--api-key-file", str(tmp_path / "key")] if source == "file" else []
    environment = {} if source == "file" else {"PD_ROUTER_API_KEY": "s3cret-key"}
    with standing(*flags, **environment) as bed:
        wrong = [
            "", "Authorization: Bearer wrong\r\n", "Authorization: s3cret-key\r\n", "Authorization: Bearer\r\n",
            "Authorization: Bearer s3cret-key x\r\n", "Authorization: Bearer s3cret-ke\r\n",
            "Authorization: Bearer \xfc\r\n", "Authorization: Basic s3cret-key\r\n",
            "Authorization: wrong\r\nAuthorization: Bearer s3cret-key\r\n", "X-Api-Key: s3cret-key\r\n",
        ]  # fmt: skip
        for headers in wrong:
            for path in ("/v1/completions", "/v1/models", "/tokenize"):
                answer = bed.one(post("x", path, headers))
                assert (answer.status, answer.headers["www-authenticate"]) == (401, "Bearer")
        # Only the head of a large body is sent: the answer does not wait for the body.
        for framing in (b"Content-Length: 60000000\r\n", b"Transfer-Encoding: chunked\r\n"):
            (answer,) = bed.ended(LINE + framing + b"Expect: 100-continue\r\n\r\n")
            assert (answer.status, answer.headers["www-authenticate"]) == (401, "Bearer")
        assert bed.reached() == []
        right = "Authorization: Bearer s3cret-key\r\n"
        assert bed.one(post("x", headers=right)).status == 200
        assert bed.one(post("x" * 100_000, headers=right)).status == 200
        assert "s3cret-key" not in bed.log()
        assert not any("s3cret-key" in word for word in psutil.Process(bed.router.process.pid).cmdline())


# TLS


class Pki:
    """Certificates of an authority that clients trust."""

    def __init__(self, folder: Path) -> None:
        self.cert, self.key = folder / "tls.crt", folder / "tls.key"
        self._authority = trustme.CA()
        self.client = ssl.create_default_context()
        self._authority.configure_trust(self.client)

    def issue(self, name: str) -> trustme.LeafCert:
        return self._authority.issue_cert(name)

    def place(self, cert: trustme.LeafCert, key: trustme.LeafCert | None = None) -> None:
        """Put a certificate and a key, its own or another, where the router looks."""
        for path, blob in ((self.key, (key or cert).private_key_pem), (self.cert, cert.cert_chain_pems[0])):
            new = path.with_suffix(".new")
            new.write_bytes(blob.bytes())
            new.replace(path)

    def asked(self, bed: Standing, name: str, raw: bytes = CLOSING_HEALTH) -> Answer:
        """Ask over TLS, for a certificate with this name."""
        wire = bed.wire()
        wire.socket = self.client.wrap_socket(wire.socket, server_hostname=name)
        with closing(wire):
            wire.send(raw)
            return read_answers(wire.rest())[0]

    def offers(self, bed: Standing, name: str) -> bool:
        try:
            return self.asked(bed, name).status == 200
        except ssl.SSLCertVerificationError:
            return False


def test_a_certificate_is_taken_over_when_it_changes_and_not_when_it_does_not_fit_its_key(tmp_path: Path):
    pki = Pki(tmp_path)
    one, two, three = (pki.issue(f"{name}.example") for name in ("one", "two", "three"))
    pki.place(one)
    flags = ["--tls-cert-file", str(pki.cert), "--tls-key-file", str(pki.key)]
    with standing(*flags, "--client-head-timeout-secs", "1") as bed:
        assert pki.asked(bed, "one.example", post(headers="Connection: close\r\n")).status == 200
        open_one = bed.wire()
        open_one.socket = pki.client.wrap_socket(open_one.socket, server_hostname="one.example")
        open_one.send(HEALTH)
        open_one.until(rb"ok")
        pki.place(two)
        until(lambda: pki.offers(bed, "two.example"), 20, "the new certificate is offered")
        open_one.send(CLOSING_HEALTH)  # what is open goes on
        assert b"200 OK" in open_one.rest()
        pki.place(three, key=one)
        until(lambda: "tls=kept" in bed.log(), 20, "the pair that does not fit is noticed")
        assert pki.offers(bed, "two.example")
        pki.cert.write_bytes(b"no certificate")
        pki.key.unlink()
        until(lambda: bed.log().count("tls=kept") > 1, 20, "files that are none are noticed")
        assert pki.offers(bed, "two.example")
        pki.place(three)
        until(lambda: pki.offers(bed, "three.example"), 20, "a good one is taken over again")
        # What speaks no TLS, or stops in the middle of it, is closed.
        for raw in (HEALTH, b"", b"\x16\x03\x01\x02\x00\x01\x00"):
            with closing(bed.wire()) as wire:
                wire.send(raw)
                assert b"HTTP" not in wire.rest()
        old = ssl.create_default_context()
        old.check_hostname, old.verify_mode = False, ssl.CERT_NONE
        old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_2
        old.set_alpn_protocols(["h2", "http/1.1"])
        with closing(bed.wire()) as wire:
            wire.socket = old.wrap_socket(wire.socket)
            assert wire.socket.selected_alpn_protocol() == "http/1.1"
        assert pki.asked(bed, "three.example", post(headers="Connection: close\r\n")).status == 200


def test_an_encrypted_key_is_refused_at_the_start_and_not_asked_for(tmp_path: Path):
    from cryptography.hazmat.primitives import serialization

    pki = Pki(tmp_path)
    leaf = pki.issue("one.example")
    pki.place(leaf)
    key = serialization.load_pem_private_key(leaf.private_key_pem.bytes(), None)
    pki.key.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.BestAvailableEncryption(b"x")
        )
    )
    flags = ["--tls-cert-file", str(pki.cert), "--tls-key-file", str(pki.key)]
    with pytest.raises(AssertionError, match="cannot use --tls-cert-file"), standing(*flags):
        pass


def test_slow_connections_do_not_keep_a_connection_from_being_used_later(hasty: Standing):
    """What was cut for being slow leaves nothing behind."""
    before = psutil.Process(hasty.router.process.pid).num_fds()
    wires = [hasty.wire() for _ in range(30)]
    for wire in wires:
        wire.send(length(100))
    deadline = time.monotonic() + 20
    for wire in wires:
        wire.socket.settimeout(max(0.1, deadline - time.monotonic()))
        assert [answer.status for answer in read_answers(wire.rest())] == [408]
        wire.close()
    until(lambda: psutil.Process(hasty.router.process.pid).num_fds() <= before, 20, "files are closed")
