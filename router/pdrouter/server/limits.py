"""How much a client may send, and how slowly."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """Sizes are bytes, times seconds.

    `head` bounds request line and headers together, and what chunk sizes, chunk extensions and trailers may have beyond
    `chunk_overhead` bytes a chunk. `head_seconds` is for a whole head, `body_seconds` for the time between two reads
    of a body and ten times that for all of it, `idle_seconds` for a connection between requests, `write_seconds` for a
    client that takes nothing of its answer.
    """

    body: int = 64 * 1024 * 1024
    head: int = 32 * 1024
    header_count: int = 128
    chunk_overhead: int = 32
    head_seconds: float = 15.0
    body_seconds: float = 30.0
    idle_seconds: float = 75.0
    write_seconds: float = 120.0
    connections: int = 16384
    connections_per_client: int = 8192
