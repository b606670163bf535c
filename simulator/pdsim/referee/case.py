"""What a case is, and how one ends."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pdsim.referee.bench import Bench


class Verdict(StrEnum):
    """How a case ended."""

    PASS = "pass"
    FAIL = "fail"
    NOT_APPLICABLE = "not applicable"


class FailedError(Exception):
    """The router does not do what the case asks; the message is the evidence, one line."""


class NotApplicableError(Exception):
    """The case asks for something that this router never promised, or that cannot be tried here."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The engines that a case needs.

    Args:
        prefills: how many prefill engines.
        decodes: how many decode engines.
        lease_seconds: how long a prefill engine keeps KV that nobody collects, in real seconds.
        prefill_blocks: KV blocks of a prefill engine; None for as many as an H200 has.
        decode_lease_seconds: the decode engines' own `kv_lease_duration`, by which they keep leases of what waits in
            their queue; None for the prefill engines'.
        decode_seats: how many requests a decode engine runs at once; None for vLLM's default.
    """

    prefills: int = 2
    decodes: int = 4
    lease_seconds: float = 30.0
    prefill_blocks: int | None = None
    decode_lease_seconds: float | None = None
    decode_seats: int | None = None

    @property
    def stall_seconds(self) -> float:
        """How long an engine may be silent before a router that can be told so gives it up."""
        return min(3.0, self.lease_seconds / 2)


@dataclass(frozen=True, slots=True)
class Case:
    """One thing that a router has to do.

    Args:
        group: wire, batch, abort, failover, fairness or security.
        name: short, unique.
        sentence: what a good router does.
        run: tries it; gives the evidence.
        own_only: what it takes that no published router but ours has; empty when nothing.
        alone: it disturbs engines, so the router is started anew before and after.
        keyed: it holds only for routers that choose engines by a key of the request.
        plan: the engines it needs.
        limit: seconds after which it has failed.
    """

    group: str
    name: str
    sentence: str
    run: Callable[["Bench"], Awaitable[str]]
    own_only: str = ""
    alone: bool = False
    keyed: bool = False
    plan: Plan = field(default_factory=Plan)
    limit: float = 20.0


Run = Callable[["Bench"], Awaitable[str]]


@dataclass(slots=True)
class Group:
    """Cases of one kind, in the order in which they are written down."""

    name: str
    alone: bool = False
    cases: list[Case] = field(default_factory=list)

    def case(
        self, *, own_only: str = "", keyed: bool = False, plan: Plan | None = None, limit: float = 20.0
    ) -> Callable[[Run], Run]:
        """Make a case of a function: its name is the case's, its docstring the sentence."""

        def add(run: Run) -> Run:
            name = getattr(run, "__name__", "").replace("_", "-")
            sentence = " ".join((run.__doc__ or "").split())
            made = Case(self.name, name, sentence, run, own_only, self.alone, keyed, plan or Plan(), limit)
            self.cases.append(made)
            return run

        return add
