"""What a source of engines reports, and to whom."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

from pdrouter.fleet.engine import Role

Identity = Literal["address", "name"]
"""What makes an engine the same one after a restart: where it listens, or what it is called."""


@dataclass(frozen=True, slots=True)
class Found:
    """An engine that a source found.

    Attributes:
        url: Where it listens, `http://host:port`.
        name: What the engine is known by for placement, unique within one report of one source. Two reports with one
            name and different URLs mean that the engine came back at another address.
        role: What it is used for.
        terminating: It finishes what it has and must get nothing new.
    """

    url: str
    name: str
    role: Role
    terminating: bool = False


Sink = Callable[[str, tuple[Found, ...]], None]
"""Takes a source's name and the complete set of what it now finds, ordered by name; called on the event loop once at
the source's first success, even with an empty set, and then whenever the set changes."""


class Source(Protocol):
    """Something that reports engines to a sink until it is stopped."""

    @property
    def name(self) -> str:
        """What reports are made under; unique among the sources of one router."""

    @property
    def age(self) -> float:
        """Seconds since the source last heard from its origin; infinite before the first time."""

    def start(self) -> None:
        """Begin to look."""

    async def stop(self) -> None:
        """Look no more; nothing is reported after this."""
