"""What every policy knows about a request and an engine, and the policies by name."""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Protocol, TypeVar

from pdrouter.policies.fbi_hash import fbi_hash


class Candidate(Protocol):
    """An engine as policies see it."""

    @property
    def url(self) -> str:
        """Its address as configured; hash policies place engines by it."""

    @property
    def in_flight(self) -> int:
        """How many requests of this router it is working on."""


class RoutingKey:
    """What a request is recognised by: requests with equal `text` belong together.

    `source` says where the key was found, for the log: `header:x-session-id`, `body:user`, `request_hash`.
    """

    def __init__(self, text: str, source: str) -> None:
        self.text = text
        self.source = source

    @cached_property
    def place(self) -> int:
        """The key's place on the ring; both roles use the same one."""
        return fbi_hash(self.text)


C = TypeVar("C", bound=Candidate)


class Policy(Protocol):
    """A way to choose one engine out of the healthy ones."""

    name: str
    uses_key: bool

    def choose(self, key: RoutingKey, candidates: Sequence[C]) -> C:
        """Choose one of `candidates`, which is never empty."""


PolicyFactory = Callable[[], Policy]
