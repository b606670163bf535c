"""How much a client may send."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """Bytes, except `header_count`."""

    body: int = 64 * 1024 * 1024
    head: int = 32 * 1024
    header_count: int = 128
