"""What a handoff needs of the client's connection; `pdrouter.server` provides it."""

from typing import Protocol


class Listener(Protocol):
    """Hears what happens at the client's end while its request is served."""

    def client_gone(self) -> None:
        """The client closed the connection before its answer was complete."""

    def client_slow(self) -> None:
        """The client does not keep up: send it no more until `client_ready`."""

    def client_ready(self) -> None:
        """The client keeps up again."""


class Client(Protocol):
    """One request's way back to its client. Exactly one of `respond`, `finish`, `break_off` ends it."""

    listener: Listener | None

    def respond(self, status: int, body: bytes, headers: bytes = b"") -> None:
        """Send a complete answer; `headers` are encoded lines, content-type among them."""

    def start(self, status: int, headers: bytes) -> None:
        """Send the head of an answer whose length is not known."""

    def write(self, data: bytes) -> None:
        """Send a piece of the body."""

    def finish(self) -> None:
        """Send the end of the body."""

    def break_off(self) -> None:
        """Close without the end, so that the client sees that its answer is incomplete."""
