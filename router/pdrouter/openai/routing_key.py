r"""The key that keeps the requests of one session, user or tenant together.

The sources and their order are vllm-router 0.1.17's (vllm-project/router `src/policies/hash_key.rs`): the first
non-empty header of `KEY_HEADERS`, then of the body `session_params.session_id`, `user`, `session_id`, `user_id`, then
the body as a whole. vllm-router finds the body's fields by searching its text; here they come from the parsed JSON.
Therefore it differs, each case on purpose, in this:

* A chat message with `"role": "user"` hides the field `user` from vllm-router, which then hashes the body: one user's
  conversations are spread over all engines. Here `user` counts.
* `user: bob` anywhere in a prompt is a key `user:bob` to vllm-router, and all such prompts meet on one pair of
  engines. Here only fields of the request are keys.
* A quote inside a value ends the value for vllm-router (`a\"b` becomes `a\`). Here it is part of the value.
* A `user_id` that is null, a `user` that is empty and a number with a fraction are keys to vllm-router (`user:null`,
  `user:`, `user:1.5`), and all who send them share one pair. Here the next source is asked.
* Without any key vllm-router hashes the JSON that it forwards: the client's fields in the order of its own structure
  plus five to eight fields of its own (`ignore_eos`, `no_stop_trim`, …). Nobody can rely on that text, so here the
  client's bytes are hashed, by XXH3: MurmurHash64A in Python takes 20 ms for a prompt of 400 KB.
  `forwarded_text_key` gives vllm-router's key for a text it forwards.
* A key of more than 1,024 characters is replaced by its XXH3 hash: keys are hashed in Python and remembered, and a
  client could have megabytes of them hashed and kept.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import xxhash

from pdrouter.policies.fbi_hash import fbi_hash
from pdrouter.policies.routing_key import RoutingKey

KEY_HEADERS = (b"x-session-id", b"x-user-id", b"x-tenant-id", b"x-correlation-id", b"x-request-id", b"x-trace-id")
_FIELDS = (("user", "user"), ("session_id", "session"), ("user_id", "user"))
_LONG_TEXT = 100
_LONGEST_KEY = 1024


def _digest(raw: bytes) -> str:
    return xxhash.xxh3_64_hexdigest(raw)


def _text(value: Any) -> str | None:
    if isinstance(value, str):
        if len(value) > _LONGEST_KEY:
            return _digest(value.encode())
        return value or None
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return None


def body_key(body: Mapping[str, Any]) -> RoutingKey | None:
    """Find the key in the fields of a parsed body."""
    params = body.get("session_params")
    if isinstance(params, dict):
        value = _text(params.get("session_id"))
        if value is not None:
            return RoutingKey(f"session:{value}", "body:session_params.session_id")
    for field, kind in _FIELDS:
        if field in body:
            value = _text(body[field])
            if value is not None:
                return RoutingKey(f"{kind}:{value}", f"body:{field}")
    return None


def bytes_key(raw: bytes) -> RoutingKey:
    """Make a key of a body that has none: equal bytes belong together."""
    digest: int = xxhash.xxh3_64_intdigest(raw)
    # Evenly spread already: hashing the hash again, as vllm-router does, would cost more than all else about a request.
    return RoutingKey(f"request_hash:{_digest(raw)}", "request_hash", digest)


def forwarded_text_key(text: str) -> str:
    """Give vllm-router's key for the JSON text it forwards when a request has no key of its own."""
    return f"request_hash:{fbi_hash(text):016x}" if len(text.encode()) > _LONG_TEXT else f"request:{text}"


class KeySources:
    """Where a request's key is looked for."""

    __slots__ = ("_names", "_none", "_rank")

    def __init__(self, header: str | None = None) -> None:
        """Prepare.

        Args:
            header: a header that goes before all others.
        """
        own = (header.lower().encode(),) if header is not None else ()
        self._names = own + tuple(name for name in KEY_HEADERS if name not in own)
        self._rank = {name: rank for rank, name in enumerate(self._names)}
        self._none = len(self._names)

    def header_key(self, headers: Iterable[tuple[bytes, bytes]]) -> RoutingKey | None:
        """Find the key in headers (lower-case names); of a repeated header the last one counts.

        Values with anything but visible ASCII are passed over, as vllm-router passes over them.
        """
        best, found, ranks = self._none, b"", self._rank
        for name, value in headers:
            if name in ranks and value and value.isascii():
                rank = ranks[name]
                if rank <= best:
                    best, found = rank, value
        if best == self._none:
            return None
        source = f"header:{self._names[best].decode()}"
        text = found.decode() if len(found) <= _LONGEST_KEY else _digest(found)
        return RoutingKey(f"{source}:{text}", source)

    def routing_key(self, headers: Iterable[tuple[bytes, bytes]], body: Mapping[str, Any], raw: bytes) -> RoutingKey:
        """Find a request's key: headers, then fields of the body, then the body's bytes."""
        return self.header_key(headers) or body_key(body) or bytes_key(raw)
