"""One sequence: a prompt, how to sample from it, what it has generated, and where its KV blocks are."""

import asyncio
import sys
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any

from pdsim.engine.detokenizer import Detokenizer
from pdsim.engine.kv import Block, Context
from pdsim.engine.language import Scored


def token_bytes(ids: list[int]) -> bytes:
    """Pack token ids, 4 bytes each, little endian."""
    packed = array("I", ids)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to generate, in vLLM's names; `seed` is already the one of this choice."""

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    min_tokens: int = 0
    ignore_eos: bool = False
    stop: tuple[str, ...] = ()
    stop_token_ids: frozenset[int] = frozenset()
    include_stop: bool = False
    skip_special: bool = True
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    allowed: frozenset[int] = frozenset()
    bias: Mapping[int, float] = field(default_factory=dict)

    @property
    def plain(self) -> bool:
        """Whether the most likely token alone is enough."""
        return self.temperature == 0 and self.logprobs is None and not self.allowed and not self.bias


class Status(Enum):
    """Where a sequence stands in the scheduler."""

    WAITING = auto()
    FETCHING = auto()  # vLLM's WAITING_FOR_REMOTE_KVS
    RUNNING = auto()
    FINISHED = auto()


@dataclass(frozen=True, slots=True)
class Delta:
    """What one or more steps added to a sequence, as vLLM's RequestOutput delta."""

    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[tuple[Scored, ...], ...]  # per token: the chosen one first, then the ranked
    finish: str | None = None
    stop_reason: str | int | None = None


class EngineDeadError(Exception):
    """The engine core died; every request of it ends with this."""


class RequestFailedError(Exception):
    """One request failed inside the engine (KV load failure under policy `fail`)."""


class Outbox:
    """Deltas of one sequence on their way to its request; a slow reader gets them merged, as from vLLM."""

    __slots__ = ("_deltas", "_error", "_waiter")

    def __init__(self) -> None:
        self._deltas: list[Delta] = []
        self._waiter: asyncio.Future[None] | None = None
        self._error: Exception | None = None

    def put(self, delta: Delta) -> None:
        """Add a delta."""
        self._deltas.append(delta)
        self._wake()

    def fail(self, error: Exception) -> None:
        """End the request with an error."""
        self._error = error
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def get(self) -> Delta:
        """Wait for what came since the last call, merged into one delta.

        Raises:
            EngineDeadError: the engine died.
            RequestFailedError: this request failed.

        """
        if not self._deltas:
            if self._error is None:
                self._waiter = asyncio.get_running_loop().create_future()
                await self._waiter
            if self._error is not None:
                raise self._error
        deltas, self._deltas = self._deltas, []
        if len(deltas) == 1:
            return deltas[0]
        return Delta(
            "".join(delta.text for delta in deltas),
            tuple(token for delta in deltas for token in delta.tokens),
            tuple(scored for delta in deltas for scored in delta.logprobs),
            deltas[-1].finish,
            deltas[-1].stop_reason,
        )


@dataclass(slots=True, eq=False)
class Sequence:
    """A prompt and its continuation.

    Args:
        request_id: vLLM's internal id, unique in the engine.
        prompt: token ids.
        sampling: how to generate.
        params: `kv_transfer_params` of the request, or None.
        salt: `cache_salt`, part of the prefix key.
        arrival: when the request came, event-loop seconds.

    """

    request_id: str
    prompt: list[int]
    sampling: Sampling
    params: dict[str, Any] | None
    salt: str | None
    arrival: float
    choices: int = 1
    outbox: Outbox = field(default_factory=Outbox)
    status: Status = Status.WAITING
    data: bytearray = field(init=False)
    keys: list[int] = field(default_factory=list)
    blocks: list[Block] = field(default_factory=list)
    computed: int = 0  # positions whose KV is in the blocks
    registered: int = 0  # leading blocks already offered to the prefix cache
    context: Context | None = None
    outputs: list[int] = field(default_factory=list)
    detokenizer: Detokenizer | None = None
    text: str = ""
    sent: int = 0  # characters of `text` already in the outbox
    held_back: list[tuple[int, tuple[Scored, ...]]] = field(default_factory=list)
    prompt_scores: list[tuple[Scored, ...] | None] = field(default_factory=list)
    cached_tokens: int = 0
    external_tokens: int = 0
    fetched: bool = False
    ticket: dict[str, Any] | None = None  # what a prefill engine answers for its decode
    scheduled_at: float | None = None
    first_token_at: float | None = None
    last_token_at: float | None = None
    preemptions: int = 0

    def __post_init__(self) -> None:
        self.data = bytearray(token_bytes(self.prompt))

    @property
    def length(self) -> int:
        """Tokens so far, prompt and output."""
        return len(self.prompt) + len(self.outputs)

    @property
    def wants_remote_kv(self) -> bool:
        """Whether the KV cache is to be fetched from a prefill engine."""
        return self.params is not None and bool(self.params.get("do_remote_prefill")) and not self.fetched

    @property
    def for_remote_decode(self) -> bool:
        """Whether the KV cache is to be kept for a decode engine."""
        return self.params is not None and bool(self.params.get("do_remote_decode"))

    @property
    def skips_prefix_cache(self) -> bool:
        """Whether the prompt must be computed here, as scores of the prompt need it."""
        return self.sampling.prompt_logprobs is not None
