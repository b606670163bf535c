"""The last decisions of the policies, for `/debug/routing`."""

import time
from collections import deque
from collections.abc import Iterator, Sequence

from pdrouter.fleet.engine import Engine
from pdrouter.policies import RoutingKey

_SHOWN_KEY = 120


class Decisions:
    """Keeps the last decisions: cheap to add, written out only when somebody asks."""

    __slots__ = ("_kept",)

    def __init__(self, most: int) -> None:
        self._kept: deque[tuple[float, str, str, RoutingKey, str, Sequence[Engine], list[float] | None]] = deque(
            maxlen=most
        )

    def add(
        self, role: str, policy: str, key: RoutingKey, chosen: str, among: Sequence[Engine], scores: list[float] | None
    ) -> None:
        """Keep a decision."""
        self._kept.append((time.time(), role, policy, key, chosen, among, scores))

    def shown(self) -> Iterator[dict[str, object]]:
        """Give each decision, the newest first."""
        for at, role, policy, key, chosen, among, scores in reversed(self._kept):
            told: dict[str, object] = {
                "time": round(at, 3), "role": role, "policy": policy, "key": key.text[:_SHOWN_KEY],
                "key_source": key.source, "chosen": chosen,
            }  # fmt: skip
            if scores is None:
                told["candidates"] = [engine.url for engine in among]
            else:
                told["scores"] = {engine.url: score for engine, score in zip(among, scores, strict=True)}
            yield told
