"""What is asked of a fleet: requests as a trace tells them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random

from pdrouter.policies import RoutingKey
from pdrouter.policies.block_chain import BlockChain


class Asked:
    """One request of a trace. To policies it is what `pdrouter.openai.features.Prompt` is in a router."""

    __slots__ = ("_prefix", "arrival", "chain", "key", "keys", "max_tokens", "output", "session", "tokens")

    def __init__(
        self, arrival: float, tokens: int, output: int, blocks: list[int], block_tokens: int, session: str | None,
        name: str, max_tokens: int = 0,
    ) -> None:  # fmt: skip
        """Prepare.

        Args:
            arrival: seconds from the trace's beginning.
            tokens: of the prompt.
            output: tokens that will be generated, which no policy knows.
            blocks: a number for each of the prompt's blocks and all before it; the last may be of a block not full.
            block_tokens: tokens of a full block.
            session: what the client names as its session.
            name: what stands for the whole prompt where there is no session.
            max_tokens: the client's limit, 0 without.
        """
        self.arrival = arrival
        self.tokens = tokens
        self.output = output
        self.chain = BlockChain(blocks, tokens, block_tokens)
        self.keys = self.chain.full(len(blocks))
        self.session = session
        self.max_tokens = max_tokens
        self.key = RoutingKey(name, "request_hash") if session is None else RoutingKey(session, "session")
        self._prefix: bytes | None = None

    @property
    def prefix(self) -> bytes:
        """Four bytes a token, alike where blocks are alike."""
        if self._prefix is None:
            size = self.chain.unit * 4
            whole = b"".join(number.to_bytes(8, "little") * (size // 8) for number in self.chain.numbers)
            self._prefix = whole[: self.tokens * 4]
        return self._prefix


@dataclass(frozen=True)
class Workload:
    """Requests in the order of their arrival.

    Args:
        name: where they are from.
        requests: all of them.
        block_tokens: tokens of a full block in their chains.
        resolution: seconds to which arrivals are rounded in the source.
    """

    name: str
    requests: Sequence[Asked]
    block_tokens: int
    resolution: float = 0.0

    @property
    def seconds(self) -> float:
        """From the first to the last arrival."""
        return self.requests[-1].arrival - self.requests[0].arrival if self.requests else 0.0

    def part(self, begin: float, end: float) -> "Workload":
        """Give what arrives within two shares (0 to 1) of the time."""
        first, length = self.requests[0].arrival, self.seconds
        low, high = first + begin * length, first + end * length
        kept = [one for one in self.requests if low <= one.arrival < high or (end >= 1 and one.arrival == high)]
        return replace(self, requests=kept)

    def arrivals(self, speed: float, seed: int) -> list[tuple[float, int]]:
        """Give when each request comes, seconds from the first, and its place, in the order of time.

        Where the source rounds its times, requests are spread over the rounding's length, each seed otherwise: in
        truth they did not come at once.
        """
        draw, first = Random(seed).random, self.requests[0].arrival if self.requests else 0.0
        width = self.resolution
        times = [(one.arrival - first + (draw() * width if width else 0.0)) / speed for one in self.requests]
        return sorted(zip(times, range(len(times)), strict=True))
