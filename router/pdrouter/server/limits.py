"""How much a client may send, and how slowly."""

from dataclasses import dataclass, replace

_OTHER_FILES = 256  # probes, metrics, discovery, sockets of other workers, libraries


@dataclass(frozen=True, slots=True)
class Limits:
    """Sizes are bytes, times seconds.

    `head` bounds request line and headers together; chunk sizes, extensions and trailers may have twice that more than
    the body they carry. `bodies` bounds what bodies over 64 KiB take together, `unsent` what waits for clients that do
    not take it. `head_seconds` is for a whole head, `body_seconds` for the time between two reads of a body and ten
    times that for all of it, `idle_seconds` for a connection between requests, `write_seconds` for a client that takes
    nothing of its answer.
    """

    body: int = 64 * 1024 * 1024
    bodies: int = 1024 * 1024 * 1024
    unsent: int = 256 * 1024 * 1024
    head: int = 32 * 1024
    header_count: int = 128
    head_seconds: float = 15.0
    body_seconds: float = 30.0
    idle_seconds: float = 75.0
    write_seconds: float = 120.0
    connections: int = 16384
    connections_per_client: int = 8192

    def within(self, files: int, requests: int) -> "Limits":
        """Give limits that leave enough of a process's open files for its connections to engines.

        A router that runs out of open files cannot reach engines, and would take all of them for dead.

        Args:
            files: how many files the process may have open.
            requests: how many requests may be under way, each with a connection to an engine.
        """
        room = max(files - requests - _OTHER_FILES, files // 2)
        if self.connections <= room:
            return self
        return replace(self, connections=room, connections_per_client=min(self.connections_per_client, room))
