"""Requests and engines as policies see them, with every figure at hand."""

from dataclasses import dataclass, field
from functools import cached_property

from pdrouter.policies import RoutingKey
from pdrouter.policies.block_chain import BlockChain, block_chain


@dataclass(eq=False)
class Row:
    name: str
    in_flight: int = 0
    queued_tokens: int = 0
    held_tokens: int = 0
    waiting: float = 0.0
    running: float = 0.0
    kv_usage: float = 0.0
    kv_tokens: int = 0
    metrics_age: float = 0.0


@dataclass(eq=False)
class Ask:
    """A request whose prompt is `prefix`; four bytes are a token."""

    prefix: bytes = b""
    session: str | None = None
    max_tokens: int = 0
    text: str = "key"
    key: RoutingKey = field(init=False)

    def __post_init__(self) -> None:
        self.key = RoutingKey(self.text, "")

    @cached_property
    def chain(self) -> BlockChain:
        return block_chain(self.prefix)

    @property
    def tokens(self) -> int:
        return max(1, len(self.prefix) // 4)


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def blocks(count: int, name: str = "a") -> bytes:
    """Give a prompt of so many 64-token blocks, all different."""
    return b"".join(f"{name}{number}".encode().ljust(256, b".") for number in range(count))


def rows(*figures: dict[str, float], **same: float) -> list[Row]:
    """Give engines named e0, e1, … with these figures."""
    return [Row(f"e{number}", **{**same, **one}) for number, one in enumerate(figures)]
