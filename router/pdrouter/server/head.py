"""What is wrong with a request's head that llhttp lets through.

Sections are those of RFC 9112, or of RFC 9110 where that is named.
"""

import re

from pdrouter.server.limits import Limits
from pdrouter.server.request import ClientRequest

Refusal = tuple[int, str]

_JUDGED = frozenset((b"content-length", b"expect", b"host", b"transfer-encoding"))
_HOST = re.compile(rb"[A-Za-z0-9._~%!$&'()*+,;=:\[\]-]*")
_ABSOLUTE = re.compile(rb"https?://[A-Za-z0-9._~%!$&'()*+,;=:\[\]-]+(?=[/?]|$)", re.IGNORECASE)


def judge(request: ClientRequest, limits: Limits, known: bytes) -> Refusal | None:
    """Say with which status and why a head is refused, or None; note in the request what its head announces.

    Args:
        request: its head is complete.
        limits: what a client may not exceed.
        known: a value of Host that was found good before.
    """
    headers = request.headers
    if len(headers) > limits.header_count:
        return 431, f"A request may have {limits.header_count} headers."
    hosts = 0
    for name, value in headers:
        if name not in _JUDGED:
            continue
        if name == b"host":
            hosts += 1
            request.host = value
            if value != known and not _HOST.fullmatch(value):
                return 400, "The Host header is no host."
        elif name == b"content-length":
            request.length = int(value)
            if request.length > limits.body:
                return too_large(limits)
        elif name == b"transfer-encoding":
            if request.old:
                return 400, "HTTP/1.0 knows no Transfer-Encoding."  # 6.1
            if value.lower() != b"chunked":
                return 501, "The only Transfer-Encoding known here is chunked."  # 6.1
            request.chunked = True
        elif request.old:
            pass  # RFC 9110 10.1.1: HTTP/1.0 has no expectations
        elif value.lower() == b"100-continue":
            request.expects_continue = True
        else:
            return 417, "Only Expect: 100-continue is known."
    if hosts > 1 or (hosts == 0 and not request.old):
        return 400, "A request has one Host header."  # 3.2
    target = request.target
    if b"#" in target:
        return 400, "A target has no fragment."  # 3.2
    if not target.startswith(b"/") and target != b"*":
        found = _ABSOLUTE.match(target)
        if found is None:
            return 400, "The target is neither a path nor an http URL."  # 3.2
        # 3.2.2: the name in the URL replaces Host; here neither decides anything.
        rest = target[found.end() :]
        request.target = rest if rest.startswith(b"/") else b"/" + rest
    return None


def too_large(limits: Limits) -> Refusal:
    """Refuse a body over the limit."""
    return 413, f"A request body may have {limits.body} bytes."


def head_too_large(target: bytes, limits: Limits) -> Refusal:
    """Refuse a head over the limit, as far as it is known."""
    if len(target) > limits.head:
        return 414, f"Request line and headers may have {limits.head} bytes; the target alone has more."
    return 431, f"Request line and headers may have {limits.head} bytes."
