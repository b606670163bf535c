"""Which of a client's headers go on to engines."""

import random
import re
from collections.abc import Iterable

# Who asks, and how the request is traced: W3C, Zipkin B3, OpenTracing, and the clouds' own.
FORWARDED = frozenset(
    (b"authorization", b"traceparent", b"tracestate", b"baggage", b"b3", b"uber-trace-id", b"sentry-trace",
     b"x-ot-span-context", b"x-cloud-trace-context", b"x-amzn-trace-id")
)  # fmt: skip
_FORWARDED_FAMILIES = (b"x-b3-", b"x-datadog-")
_CLEAN_ID = re.compile(rb"[A-Za-z0-9._:/=+@-]{1,128}")


def forwarded(headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """Encode the headers that go on; the parser has refused line breaks in them."""
    lines = b""
    for header in headers:
        name = header[0]
        if name in FORWARDED or (name.startswith(b"x-") and name.startswith(_FORWARDED_FAMILIES)):
            lines += b"%b: %b\r\n" % (name, header[1])
    return lines


def request_id(told: bytes | None) -> str:
    """Give the client's request id when it is harmless in headers, ids and logs, else a new one."""
    if told is not None and _CLEAN_ID.fullmatch(told):
        return told.decode()
    return random.randbytes(16).hex()  # unique, not secret: uuid4 would cost a system call


def budget(told: bytes | None, most: float) -> float | None:
    """Read how many seconds the client gives its request (`x-request-timeout`), if it tells a number."""
    if told is None:
        return None
    try:
        seconds = float(told)
    except ValueError:
        return None
    return seconds if 0 < seconds < most else None
