"""What every place where a deployment can live offers to the commands."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class Health:
    """One process or pod as `status` shows it.

    Args:
        name: its name.
        role: `prefill`, `decode` or `router`.
        url: where it answers.
        pid: its process.
        state: `ready`, `starting`, `not answering`, or how it ended.
        uptime_seconds: since its start.
        details: what it tells about itself (`/sim/state`, or the router's `/ready`).
    """

    name: str
    role: str
    url: str
    pid: int | None
    state: str
    uptime_seconds: float | None
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Edge:
    """One way from a prefill to a decode engine, as the router knows it.

    Args:
        handoffs: tickets that decode collected over it.
        seconds: mean time from a ticket to decode's first byte, recent ones counting more.
        closed: whether requests are kept off it.
    """

    handoffs: int = 0
    seconds: float = 0.0
    closed: bool = False


@dataclass(frozen=True, slots=True)
class Routing:
    """Who served whom.

    Args:
        pairs: prompts by (prefill, decode) names; `none` stands for a decode engine alone.
        transfers: KV transfers by (prefill, decode) names: count and bytes.
        edges: every way that was used, by (prefill, decode) names.
        violations: breaches of the handoff protocol, each with the engine that saw it.
        silent: engines that did not answer.
    """

    pairs: dict[tuple[str, str], int]
    transfers: dict[tuple[str, str], tuple[int, int]]
    edges: dict[tuple[str, str], Edge]
    violations: list[dict[str, Any]]
    silent: list[str]


class Target(Protocol):
    """A deployment somewhere."""

    name: str
    simulated: bool
    router_url: str
    model: str

    def health(self) -> list[Health]:
        """Tell how each part is."""

    def routing(self) -> Routing:
        """Tell who served whom."""

    def logs(self, role: str | None, tail: int, follow: bool) -> Iterator[tuple[str, str]]:
        """Give (member, line) pairs of the logs; with `follow` without end."""

    def stop(self) -> list[str]:
        """Stop everything; give the names of what could not be stopped."""
