"""What a policy knows of a request and of an engine, and what it is asked."""

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, TypeVar, runtime_checkable

from pdrouter.policies.block_chain import BLOCK_TOKENS, BlockChain
from pdrouter.policies.routing_key import RoutingKey

RoleName = Literal["prefill", "decode"]


class Features(Protocol):
    """What a policy may know of a request. Everything but the key is computed when it is first read."""

    @property
    def key(self) -> RoutingKey:
        """By which it is recognised."""

    @property
    def prefix(self) -> bytes:
        """The prompt as bytes: requests whose prompts begin alike have equal beginnings here."""

    @property
    def chain(self) -> BlockChain:
        """The prompt as blocks: prompts that begin alike have equal numbers there."""

    @property
    def tokens(self) -> int:
        """How many tokens the prompt has, estimated where only its text is known."""

    @property
    def max_tokens(self) -> int:
        """How many tokens may be generated; 0 when the client set no limit."""

    @property
    def session(self) -> str | None:
        """The session that the request names (a header or a field of the body), or None."""


class Candidate(Protocol):
    """An engine as policies see it: its identity and its load row.

    The first group is counted by the router, over all of its worker processes, and is exact at once. The second comes
    from the engine's `/metrics` and is `metrics_age` seconds old (infinite before the first scrape).
    """

    @property
    def name(self) -> str:
        """Its identity, which outlives a restart; hash policies place engines by it."""

    @property
    def in_flight(self) -> int:
        """Requests that it is working on."""

    @property
    def queued_tokens(self) -> int:
        """Uncached prompt tokens (as the policy estimated them) of requests whose prefill has not ended."""

    @property
    def held_tokens(self) -> int:
        """Prompt tokens of all requests that it is working on: what they hold of its KV cache."""

    @property
    def waiting(self) -> float:
        """`vllm:num_requests_waiting`."""

    @property
    def running(self) -> float:
        """`vllm:num_requests_running`."""

    @property
    def kv_usage(self) -> float:
        """`vllm:kv_cache_usage_perc`, 0 to 1."""

    @property
    def kv_tokens(self) -> int:
        """How many tokens its KV cache holds (`num_gpu_blocks` times `block_size`); 0 when unknown."""

    @property
    def metrics_age(self) -> float:
        """Seconds since the second group was read."""


C = TypeVar("C", bound=Candidate)


class Policy(Protocol):
    """A way to choose one engine of one role out of the healthy ones."""

    name: str
    uses_key: bool

    def choose(self, request: Features, candidates: Sequence[C]) -> C:
        """Choose one of `candidates`, which is never empty and stays the same object while the fleet does."""


@runtime_checkable
class Scoring(Protocol):
    """A policy that can say why: `/debug/routing` shows it."""

    def scores(self, request: Features, candidates: Sequence[C]) -> list[float]:
        """Give each candidate's score as `choose` would compare it, without side effects.

        The highest wins: `choose` takes one of the candidates that have it. Costs are therefore negative.
        """


@runtime_checkable
class Learning(Protocol):
    """A policy that remembers what engines hold. For each request `uncached` is asked before `routed` is told."""

    def uncached(self, request: Features, candidate: Candidate) -> int:
        """Estimate how many of the prompt's tokens the engine would have to compute."""

    def routed(self, request: Features, candidate: Candidate) -> None:
        """The request went to this engine."""

    def answered(self, request: Features, candidate: Candidate, generated: bytes) -> None:
        """The engine generated this; it continues `request.prefix` as the next turn's prefix will."""

    def gone(self, candidate: Candidate) -> None:
        """The engine restarted or left: it holds nothing any more."""


@runtime_checkable
class Timed(Protocol):
    """A policy that learns what work takes. Times are seconds."""

    def prefilled(self, uncached: int, seconds: float) -> None:
        """A prefill engine that had nothing else to do when it came computed so many tokens of a prompt."""

    def handed_over(self, uncached: int, seconds: float) -> None:
        """A decode engine that lacked so many tokens of a prompt gave its first token so long after the ticket."""

    def generated(self, held: float, tokens: int, seconds: float) -> None:
        """An answer took so long from its first to its last token, on an engine that held so many tokens meanwhile."""


@runtime_checkable
class Bypassing(Protocol):
    """A policy that can tell when a prompt is better computed where its answer is generated."""

    def bypass(self, request: Features, prefill: Candidate, decode: Candidate) -> bool:
        """Say whether `decode` should do the whole request rather than wait for `prefill` and the transfer."""


@dataclass(frozen=True)
class Commons:
    """What the policies of one router have in common.

    Args:
        seed: makes random choices repeat; None draws afresh at each start.
        clock: seconds from any beginning, for what expires.
        shared: by a policy's name, what its two roles share (llm-d keeps one prefix index for both).
        block_tokens: tokens of a full block in `Features.chain`.
        workers: processes of the router, each of which has policies of its own.
    """

    seed: int | None = None
    clock: Callable[[], float] = time.monotonic
    shared: dict[str, object] = field(default_factory=dict)
    block_tokens: int = BLOCK_TOKENS
    workers: int = 1

    def draw(self) -> random.Random:
        """Give a source of random numbers of its own to a policy."""
        return random.Random(self.seed)


class PolicyFactory(Protocol):
    """Makes one role's policy."""

    def __call__(self, role: RoleName, commons: Commons | None = None) -> Policy:
        """Make it.

        Args:
            role: whose engines it will choose from.
            commons: the same object for both roles of a router; without it nothing is shared.
        """
