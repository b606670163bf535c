"""What is no HTTP/1.1 is refused, and nothing can be smuggled past the router: each case with its section.

Sections are those of RFC 9112, or of RFC 9110 where they begin with `9110`. Every case is sent over a socket to a
router process. What counts is not only the answer but what the engines saw: `MARKER` is the prompt of a request that
the router must not have understood as one.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from router.standing import CLOSING_HEALTH, HEALTH, MARKER, SMUGGLED, Standing, post, read_answers, standing

HOST = b"Host: router\r\n"
LINE = b"POST /v1/completions HTTP/1.1\r\n"
OLD = b"POST /v1/completions HTTP/1.0\r\n"
BODY = b'{"prompt":"hi"}'
LENGTH = b"Content-Length: 15\r\n"
CHUNKED = b"Transfer-Encoding: chunked\r\n"
CHUNK = b"f\r\n" + BODY + b"\r\n"
LAST = b"0\r\n\r\n"
CHUNKS = CHUNK + LAST
H2C = "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQ\r\n"


def head(*lines: bytes, line: bytes = LINE) -> bytes:
    """A head with a Host."""
    return b"".join((line, HOST, *lines, b"\r\n"))


def sized(*lines: bytes, line: bytes = LINE) -> bytes:
    """A request whose length is told, with lines of its own."""
    return head(*lines, LENGTH, line=line) + BODY


def chunked(body: bytes) -> bytes:
    return head(CHUNKED) + body


def hiding(method: str, path: str = "/health", *lines: bytes) -> bytes:
    """A request whose body is another request."""
    line = f"{method} {path} HTTP/1.1\r\n".encode()
    return head(*lines, b"Content-Length: %d\r\n" % len(SMUGGLED), line=line) + SMUGGLED


@dataclass
class Case:
    """Bytes, and what has to become of them: statuses, whether the connection stays open, prompts that arrive."""

    section: str
    name: str
    raw: bytes
    statuses: Sequence[int]
    prompts: Sequence[Any] = ()
    stays: bool = False
    methods: Sequence[str] = field(default=(), kw_only=True)

    def __str__(self) -> str:
        return f"{self.section} {self.name}".replace(" ", "-")


def refused(section: str, name: str, raw: bytes, status: int = 400) -> Case:
    """A case that is answered once, with an error, and whose connection is closed.

    A whole request follows, so that one that is left over in the router's buffer is noticed.
    """
    return Case(section, name, raw + SMUGGLED, [status])


def refused_each(section: str, told: Sequence[bytes], make: Any, status: int = 400) -> list[Case]:
    return [refused(section, repr(one)[1:].strip("'"), make(one), status) for one in told]


def served(section: str, name: str, raw: bytes, *prompts: Any, status: int = 200, method: str = "POST") -> Case:
    """A case that is answered once, after which the connection is good for another request."""
    return Case(section, name, raw, [status], prompts, True, methods=[method])


def then(section: str, name: str, raw: bytes, statuses: Sequence[int], *prompts: Any) -> Case:
    """A case that is answered so often, after which the connection is closed."""
    return Case(section, name, raw, statuses, prompts)


BOTH_LENGTHS = [
    refused("6.1", "content-length, chunked", head(b"Content-Length: 6\r\n", CHUNKED) + b"0\r\n\r\nG"),
    refused("6.1", "chunked, content-length", head(CHUNKED, b"Content-Length: 4\r\n") + CHUNKS),
    refused("6.1", "chunked in HTTP/1.0", head(CHUNKED, line=OLD) + CHUNKS),
    refused("6.1", "chunked and kept in HTTP/1.0", head(b"Connection: keep-alive\r\n", CHUNKED, line=OLD) + CHUNKS),
]


def _coding(told: bytes) -> bytes:
    return head(b"Transfer-Encoding: ", told, b"\r\n") + CHUNKS


CODINGS = [
    *refused_each("6.1", [b"chunked, gzip", b"chunked, chunked", b"chunked,", b""], _coding),
    *refused_each("6.1", [b"gzip, chunked", b"identity, chunked", b",chunked", b"identity", b"gzip"], _coding, 501),
    *refused_each("7", [b"xchunked", b"chunkedx", b'"chunked"', b"chunked;q=1", b"chunk"], _coding, 501),
    *refused_each("9110-5.5", [b"\x0bchunked", b"chunked\x00", b"\x0cchunked"], _coding),
    refused("6.1", "identity and chunked", head(b"Transfer-Encoding: identity\r\n", CHUNKED) + CHUNKS, 501),
    refused("6.1", "chunked and identity", head(CHUNKED, b"Transfer-Encoding: identity\r\n") + CHUNKS),
    refused("5.1", "space before the colon of a coding", head(b"Transfer-Encoding : chunked\r\n") + CHUNKS),
    refused("5.2", "a coding on a folded line", head(b"Transfer-Encoding:\r\n chunked\r\n") + CHUNKS),
    refused("2.2", "a coding behind a bare LF", head(b"X: y\n", CHUNKED) + CHUNKS),
    served("6.1", "capitals after a tab", head(b"Transfer-Encoding:\tCHUNKED\r\n") + CHUNKS, "hi"),
    served("5.1", "an underscore makes another header", sized(b"Transfer_Encoding: chunked\r\n"), "hi"),
]


def _length(told: bytes) -> bytes:
    return head(b"Content-Length: ", told, b"\r\n") + BODY


LENGTHS = [
    *refused_each("6.2", [b"+15", b"-15", b"0xf", b"1 5", b"1_5", b"15.0", b"1e1", b"", b"15;", b"\xc2\xb2"], _length),
    *refused_each("6.3", [b"15, 15", b"15,16", b"18446744073709551631"], _length),
    *refused_each("9110-5.5", [b"\x0b15", b"15\x00"], _length),
    *refused_each("6.2", [b"18446744073709551615", b"67108865"], _length, 413),
    refused("6.3", "two lengths, the same", sized(LENGTH)),
    refused("6.3", "two lengths, not the same", sized(b"Content-Length: 0\r\n")),
    refused("6.3", "two lengths, other letters", sized(b"content-length: 0\r\n")),
    refused("5.1", "space before the colon of a length", head(b"Content-Length : 15\r\n") + BODY),
    refused("5.2", "a length on a folded line", head(b"Content-Length:\r\n 15\r\n") + BODY),
    served("6.2", "zeros before the length", _length(b"0015"), "hi"),
    served("5.1", "blanks around the length", _length(b" \t 15 \t"), "hi"),
    served("6.3", "no length is no body", head(line=b"GET /health HTTP/1.1\r\n")),
    then("6.3", "less body than announced", head(b"Content-Length: 1000\r\n") + SMUGGLED, [408]),
]


def _size(told: bytes) -> bytes:
    return chunked(told + b"\r\n" + BODY + b"\r\n" + LAST)


def _extended(told: bytes) -> bytes:
    return _size(b"f" + told)


def _trailed(told: bytes) -> bytes:
    return chunked(CHUNK + b"0\r\n" + told + b"\r\n\r\n")


TINY = b"1;%b\r\n \r\n" % (b"x" * 400)

CHUNKING = [
    *refused_each("7.1", [b"0xf", b"+f", b"-f", b" f", b"f ", b"f\t", b"", b"g", b"f,", b"f_", b"\xef\xbc\x91"], _size),
    *refused_each("7.1", [b"10000000000000000f", b"e", b"10"], _size),
    refused("7.1", "no line end after a chunk", chunked(b"f\r\n" + BODY + LAST)),
    refused("2.2", "bare LF after a chunk size", chunked(b"f\n" + BODY + b"\r\n" + LAST)),
    refused("2.2", "bare LF after a chunk", chunked(b"f\r\n" + BODY + b"\n" + LAST)),
    refused("2.2", "bare CR after a chunk size", chunked(b"f\r" + BODY + b"\r\n" + LAST)),
    refused("2.2", "bare LF after the last chunk", chunked(CHUNK + b"0\n\n")),
    refused("2.2", "bare LF at the end", chunked(CHUNK + b"0\r\n\n")),
    refused("2.2", "bare CR at the end", chunked(CHUNK + b"0\r\n\r")),
    then("7.1", "a chunk of 2^64-1 bytes", _size(b"ffffffffffffffff") + SMUGGLED, [408]),
    then("7.1", "no last chunk", chunked(CHUNK), [408]),
    served("7.1", "zeros before chunk sizes", chunked(b"0000f\r\n" + BODY + b"\r\n000\r\n\r\n"), "hi"),
    served("7.1.1", "chunk extensions", chunked(b'f;a=b;c="d e";f\r\n' + BODY + b"\r\n0;g\r\n\r\n"), "hi"),
    *refused_each("7.1.1", [b";", b" ;a", b";\x00", b';a="b', b";a\x7f"], _extended),
    *refused_each("2.2", [b";a\nb", b";a\rb", b";a\n", b';a="\n"'], _extended),
    refused("7.1.1", "an extension over the limit", chunked(b"f;" + b"x" * 300_000), 413),
    refused("7.1.1", "many extensions over the limit", chunked(TINY * 2000), 413),
    refused("7.1", "bytes in chunks of their own", chunked(b"1\r\n \r\n" * 100_000), 413),
    served("7.1.2", "trailers are dropped", _trailed(b"X-Request-Id: forged\r\nAuthorization: Bearer forged"), "hi"),
    *refused_each("7.1.2", [b"Content-Length: 9", b"Transfer-Encoding: chunked", b"X", b"POST / HTTP/1.1"], _trailed),
    *refused_each("5.1", [b"X : y", b" X: y"], _trailed),
    *refused_each("2.2", [b"X: y\nZ: 1", b"X: y\rZ: 1"], _trailed),
    refused("7.1.2", "trailers over the limit", chunked(CHUNK + b"0\r\nX: " + b"y" * 300_000), 413),
]

BODIES = [
    served("6", "the body of a GET is its body", hiding("GET")),
    served("6", "the body of a HEAD is its body", hiding("HEAD"), method="HEAD"),
    served("6", "the body of OPTIONS is its body", hiding("OPTIONS"), status=204),
    served("6", "the body for an unknown path is its body", hiding("POST", "/nothing"), status=404),
    served("6", "the body of an unwanted method is its body", hiding("PUT", "/v1/completions"), status=405),
    served(
        "6", "the chunks of a GET are its body",
        head(CHUNKED, line=b"GET /health HTTP/1.1\r\n") + b"%x\r\n%b\r\n0\r\n\r\n" % (len(SMUGGLED), SMUGGLED),
    ),
    served("6", "a request inside a prompt is a prompt", post(SMUGGLED.decode()), SMUGGLED.decode()),
]  # fmt: skip

ENDS_OF_LINES = [
    refused("2.2", "bare LF after the request line", sized(line=LINE.replace(b"\r", b""))),
    refused("2.2", "bare LF after a header", sized(b"X: y\n")),
    refused("2.2", "bare LF after the head", LINE + HOST + LENGTH + b"\n" + BODY),
    refused("2.2", "bare LF everywhere", sized().replace(b"\r", b"")),
    refused("2.2", "bare CR after the request line", sized(line=LINE.replace(b"\n", b""))),
    refused("2.2", "bare CR in a header", sized(b"X: a\rY: b\r\n")),
    refused("2.2", "bare CR before the end of a header", sized(b"X: a\r\r\n")),
    refused("2.2", "bare CR before the end of the head", LINE + HOST + LENGTH + b"\r\r\n" + BODY),
    refused("2.2", "a blank before the first header", LINE + b" " + HOST + LENGTH + b"\r\n" + BODY),
    served("2.2", "empty lines before a request", b"\r\n\r\n" + sized(), "hi"),
]

HEADERS = [
    *refused_each("5.1", [b"X : y", b"X\t: y"], lambda told: sized(told + b"\r\n")),
    *refused_each("5", [b": y", b"X", b"=", b"\x00"], lambda told: sized(told + b"\r\n")),
    *refused_each(
        "9110-5.1", [b"(", b"\x00", b"\xc3\xa9", b" ", b'"', b"\x7f", b"/", b"@"],
        lambda told: sized(b"X" + told + b"Y: z\r\n"),
    ),
    *refused_each("5.2", [b"X: y\r\n z", b"X: y\r\n\tz", b"X:\r\n "], lambda told: sized(told + b"\r\n")),
    *refused_each(
        "9110-5.5", [b"\x00", b"\x01", b"\x08", b"\x0b", b"\x1b", b"\x7f"], lambda told: sized(b"X: a" + told + b"\r\n")
    ),
    served("9110-5.5", "bytes above ASCII in a value", sized(b"X: \xff\x80\r\n"), "hi"),
    refused("3.2", "no Host", LINE + LENGTH + b"\r\n" + BODY),
    refused("3.2", "two Hosts", sized(HOST)),
    refused("3.2", "two Hosts, not the same", sized(b"Host: elsewhere\r\n")),
    *refused_each(
        "3.2", [b"a b", b"a/b", b"a@b", b"a?b", b"a#b", b"http://a", b"a\xff", b"a\\"],
        lambda told: LINE + b"Host: " + told + b"\r\n" + LENGTH + b"\r\n" + BODY,
    ),
    served("3.2", "an empty Host", LINE + b"Host:\r\n" + LENGTH + b"\r\n" + BODY, "hi"),
    served("3.2", "a Host with a port", LINE + b"Host: [::1]:80\r\n" + LENGTH + b"\r\n" + BODY, "hi"),
]  # fmt: skip


def _line(told: bytes) -> bytes:
    return sized(line=told + b"\r\n")


def _target(told: bytes) -> bytes:
    return _line(b"POST " + told + b" HTTP/1.1")


def _version(told: bytes) -> bytes:
    return _line(b"POST /v1/completions" + told)


REQUEST_LINES = [
    *refused_each("3", [b"nonsense", b"POST", b" POST / HTTP/1.1", b"POST\t/\tHTTP/1.1", b"POST / x HTTP/1.1"], _line),
    *refused_each("3.1", [b"post / HTTP/1.1", b"FETCH / HTTP/1.1", b"POST: / HTTP/1.1", b"P\x00ST / HTTP/1.1"], _line),
    *refused_each("2.3", [b" http/1.1", b" HTTP/1.2", b" HTTP/1.10", b" HTTP/1", b" HTTPS/1.1"], _version),
    *refused_each("3", [b" HTTP/1.1 ", b" HTTP/1.1 x", b" HTTP/1.1\x00"], _version),
    *refused_each("2.3", [b" HTTP/2.0", b" HTTP/0.9", b""], _version, 505),
    *refused_each("3.2", [b"v1/completions", b"?x", b"\\v1", b"/v1/\x00", b"/v1/\x7f", b"/v1/\xc3\xa9"], _target),
    *refused_each("3.2", [b"/v1/completions#x", b"/v1/completions?a#b"], _target),
    then("2.3", "HTTP/2 with prior knowledge", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9) + SMUGGLED, [400]),
    then("2.3", "a TLS hello", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200), [400]),
    served("3.2.2", "an absolute target", _target(b"http://elsewhere/v1/completions?a=b"), "hi"),
    served("3.2.2", "an absolute target without a path", _target(b"HTTP://elsewhere:80?x"), status=404),
    *refused_each(
        "3.2.2", [b"ftp://elsewhere/", b"http://me@elsewhere/", b"http:///v1/models", b"file:///etc/passwd"], _target
    ),
    then("3.2.3", "CONNECT", b"CONNECT elsewhere:80 HTTP/1.1\r\n" + HOST + b"\r\n" + SMUGGLED, [501]),
    then("3.2.3", "CONNECT sent ahead", post("a") + b"CONNECT a:1 HTTP/1.1\r\n\r\n" + SMUGGLED, [200, 501], "a"),
    served("3.2.4", "an asterisk", head(line=b"OPTIONS * HTTP/1.1\r\n"), status=404),
    served("9110-9.3.8", "TRACE", sized(line=b"TRACE /v1/models HTTP/1.1\r\n"), status=405),
]  # fmt: skip

CLOSE = "Connection: close\r\n"
OFFER = "Connection: Upgrade, close\r\nUpgrade: h2c\r\n"
EXPECT = b"Expect: 100-continue\r\n"
CONNECTIONS = [
    Case("9.3.2", "requests sent ahead", post("a") + post("b") + HEALTH + post("c"), [200] * 4, ["a", "b", "c"], True),
    then("9.3.2", "the second is malformed", post("a") + head(b"X : y\r\n") + SMUGGLED, [200, 400], "a"),
    then("9.3.2", "the second is too large", post("a") + _length(b"99999999999") + SMUGGLED, [200, 413], "a"),
    then("9.3", "HTTP/1.0 needs no Host and is closed", OLD + LENGTH + b"\r\n" + BODY, [200], "hi"),
    then("9.3", "HTTP/1.0 sends nothing ahead", OLD + LENGTH + b"\r\n" + BODY + SMUGGLED, [200], "hi"),
    then("9.3", "HTTP/1.0 that is to be kept and closed is closed",
         OLD + b"Connection: keep-alive\r\nConnection: close\r\n" + LENGTH + b"\r\n" + BODY + SMUGGLED, [200], "hi"),
    then("9.6", "nothing is served after close", post("a", headers=CLOSE) + SMUGGLED, [200], "a"),
    then("9.6", "nothing is served after close and a quick answer", CLOSING_HEALTH + SMUGGLED, [200]),
    then("9.6", "close among others", post("a", headers="Connection: keep-alive, Close\r\n") + SMUGGLED, [200], "a"),
    served("9110-7.8", "an offer of h2c", post("a", headers=H2C), "a"),
    served("9110-7.8", "an offer of a websocket", hiding("GET", "/health", H2C.replace("h2c", "websocket").encode())),
    then("9110-7.8", "an offer and close", post("a", headers=OFFER) + SMUGGLED, [200], "a"),
    refused("9110-7.8", "an offer with two Hosts", sized(H2C.encode(), HOST)),
    refused("9110-7.8", "an offer in HTTP/2.0", sized(H2C.encode(), line=LINE.replace(b"1.1", b"2.0")), 505),
    served("9110-9.3.2", "HEAD of what engines serve", head(line=b"HEAD /v1/models HTTP/1.1\r\n"), method="HEAD"),
    refused("9110-10.1.1", "an unknown expectation", sized(b"Expect: 200-ok\r\n"), 417),
    refused("9110-10.1.1", "100-continue over the limit", head(EXPECT, b"Content-Length: 99999999999\r\n"), 413),
    served("9110-10.1.1", "100-continue with the body at once", sized(EXPECT), "hi"),
    served("9110-10.1.1", "100-continue of a GET", hiding("GET", "/health", EXPECT)),
    served("9110-8.4", "a content coding", sized(b"Content-Encoding: gzip\r\n"), status=415),
]  # fmt: skip

CASES = [
    *BOTH_LENGTHS, *CODINGS, *LENGTHS, *CHUNKING, *BODIES, *ENDS_OF_LINES, *HEADERS, *REQUEST_LINES, *CONNECTIONS,
]  # fmt: skip


@pytest.fixture(scope="module")
def bed() -> Iterator[Standing]:
    with standing("--client-body-timeout-secs", "1") as found:
        yield found
        assert found.malformed() == []
        assert "Traceback" not in found.log()


def judge(bed: Standing, case: Case, raw: bytes) -> None:
    """Compare what came back and what reached the engines with what has to."""
    answers = read_answers(raw, case.methods)
    statuses = [answer.status for answer in answers]
    if case.stays:
        assert answers[-1].body == b'{"status":"ok"}', f"the connection was not good for another request: {statuses}"
        del answers[-1], statuses[-1]
    assert statuses == list(case.statuses)
    assert all(answer.complete for answer in answers)
    assert bed.prompts() == list(case.prompts)
    for reached in bed.reached():
        assert reached.header("host") != ["elsewhere"]
        assert reached.body.count(MARKER.encode()) == str(case.prompts).count(MARKER)
    if not case.stays and statuses[-1] >= 400:
        assert answers[-1].headers["connection"] == "close"
        assert answers[-1].error["code"] == statuses[-1]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_only_http_as_the_rfcs_have_it_is_served(bed: Standing, case: Case):
    bed.forget()
    wire = bed.wire()
    wire.send(case.raw + (CLOSING_HEALTH if case.stays else b""))
    judge(bed, case, wire.rest())
    wire.close()


def test_requests_that_arrive_byte_by_byte_get_the_same_answers(bed: Standing):
    for case in CASES:
        raw = case.raw + (CLOSING_HEALTH if case.stays else b"")
        if len(raw) > 1000 or 408 in case.statuses:
            continue
        bed.forget()
        wire = bed.wire()
        for at in range(len(raw)):
            wire.send(raw[at : at + 1])
        judge(bed, case, wire.rest())
        wire.close()


def test_an_answer_to_http_1_0_is_neither_announced_nor_in_chunks(bed: Standing):
    """RFC 9112 section 6.1 and RFC 9110 section 10.1.1."""
    bed.decode.streams = True
    wire = bed.wire()
    wire.send(OLD + EXPECT + LENGTH + b"\r\n" + BODY)
    raw = wire.rest()
    bed.decode.streams = False
    assert raw.startswith(b"HTTP/1.1 200 ")
    assert b"transfer-encoding" not in raw.partition(b"\r\n\r\n")[0]
    wire.close()


def test_trace_and_errors_show_nothing_of_a_request(bed: Standing):
    """RFC 9110 section 9.3.8: a TRACE that is answered with the request would tell scripts what they may not read."""
    secret = b"Cookie: s3cret\r\nAuthorization: Bearer s3cret\r\n"
    for raw in [
        sized(secret, line=b"TRACE /v1/models HTTP/1.1\r\n"),
        sized(secret, line=b"POST /nothing HTTP/1.1\r\n"),
        sized(secret, b"X : y\r\n"),
        head(secret, b"Content-Length: s3cret\r\n"),
    ]:
        wire = bed.wire()
        wire.send(raw + CLOSING_HEALTH)
        assert b"s3cret" not in wire.rest()
        wire.close()
    assert "s3cret" not in bed.log()


def test_the_page_about_security_names_tests_that_there_are():
    root = Path(__file__).parents[2]
    page = (root / "docs" / "security.md").read_text(encoding="utf-8")
    there = {
        name for path in (root / "tests").rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    }  # fmt: skip
    named = set(re.findall(r"`(test_\w+)`", page))
    assert len(named) > 40
    assert named <= there
    assert f"{len(CASES)} cases" in page
