"""What every place where a deployment can live offers to the commands."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

from rich.text import Text

from pdctl.check import Check
from pdctl.routers.choice import Choice
from pdctl.routers.programs import Programs


@dataclass(frozen=True, slots=True)
class Health:
    """One process or pod as `status` shows it.

    Args:
        name: its name.
        role: `prefill`, `decode` or `router`.
        url: where it answers.
        pid: its process, on this machine.
        state: `ready`, `starting`, `not answering`, or how it ended.
        uptime_seconds: since its start.
        details: what it tells about itself (`/sim/state`, or the router's `/ready`), or what the router knows of it.
        node: where it runs, in a cluster.
        restarts: how often its container was started again.
        reason: why it is not ready, where that is known.
    """

    name: str
    role: str
    url: str
    pid: int | None
    state: str
    uptime_seconds: float | None
    details: dict[str, Any] = field(default_factory=dict)
    node: str = ""
    restarts: int = 0
    reason: str = ""


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
        transfers: KV transfers by (prefill, decode) names: count and bytes. The prefill side is `any` where engines
            only tell what they read, not from whom.
        edges: every way that was used, by (prefill, decode) names.
        violations: breaches of the handoff protocol, each with the engine that saw it; only simulated engines see them.
        silent: engines that did not answer.
    """

    pairs: dict[tuple[str, str], int]
    transfers: dict[tuple[str, str], tuple[int, int]]
    edges: dict[tuple[str, str], Edge]
    violations: list[dict[str, Any]]
    silent: list[str]


@dataclass(frozen=True, slots=True)
class LogQuery:
    """Which lines of logs.

    Args:
        member: only of this role, or of this process or pod.
        tail: last lines of each.
        follow: go on as lines come.
        previous: of the container before its last restart.
        since: only of the last so many seconds.
    """

    member: str | None = None
    tail: int = 20
    follow: bool = False
    previous: bool = False
    since: float | None = None


class Target(Protocol):
    """A deployment somewhere.

    Attributes:
        name: what it is called: its name here, or its namespace.
        flags: how commands name it, with a space before: ` --namespace x`; may be empty.
    """

    name: str
    flags: str

    @property
    def router_url(self) -> str:
        """Where clients in its place find the router."""

    @property
    def router(self) -> Choice:
        """Which router stands before the engines."""

    def switch(self, router: Choice, programs: Programs, timeout: float, tell: Callable[[str], None]) -> None:
        """Let another router stand before the same engines, none of which is restarted.

        The other one serves before the old one ends, and the old one finishes what it has; the address stays.

        Args:
            router: the other one.
            programs: llm-d's programs, where they run on this machine.
            timeout: seconds until it must serve; when it does not, the old one stays.
            tell: told what takes a while.

        Raises:
            PdctlError: it cannot be, or does not serve in time.
        """

    @property
    def model(self) -> str:
        """Served model name."""

    @property
    def simulated(self) -> bool:
        """Whether its engines are simulated."""

    @property
    def settings(self) -> dict[str, Any]:
        """How it was set up: where, engines of each role, image or policy, as far as that is known."""

    def reached(self, port: int = 0) -> AbstractContextManager[str]:
        """Give a URL of the router that this machine reaches, for as long as the context lasts."""

    def health(self) -> list[Health]:
        """Tell how each part is."""

    def troubles(self) -> list[Text]:
        """Say why parts are not ready, as of the last look at them; lines for a screen."""

    def routing(self) -> Routing:
        """Tell who served whom."""

    def pages(self, path: str, member: str | None) -> list[tuple[str, str, str | None]]:
        """Give (member, role, answer) for a path of each engine, or of one role or member; None: no answer.

        Of the router only `/metrics` is asked.
        """

    def post(self, path: str) -> dict[str, int | None]:
        """Send each engine an empty POST; give the statuses of their answers by member, None where there is none."""

    def urls(self) -> dict[str, str]:
        """Give the URL by which the router knows each engine, by member."""

    def admin(self, path: str) -> list[Any]:
        """Give what the admin port of each router answers that can be asked."""

    def checks(self) -> list[Check]:
        """Make the checks that only this place can make."""

    @property
    def rdma(self) -> str | None:
        """The resource by which engines ask for RDMA, empty for TCP; None where KV stays on one machine."""

    def logs(self, query: LogQuery) -> Iterator[tuple[str, str]]:
        """Give (member, line) pairs of the logs; with `follow` without end."""

    def close(self) -> None:
        """Let go of connections; the deployment itself stays."""
