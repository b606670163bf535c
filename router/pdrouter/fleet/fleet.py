"""All engines, and which of them may be chosen."""

import logging
from collections.abc import Iterable, Iterator, Sequence

from pdrouter.fleet.engine import Engine, Role

_log = logging.getLogger(__name__)


class Fleet:
    """The engines of both roles in their configured order."""

    def __init__(self, prefill: Iterable[str], decode: Iterable[str]) -> None:
        self.engines = {
            Role.PREFILL: tuple(Engine(url, Role.PREFILL) for url in prefill),
            Role.DECODE: tuple(Engine(url, Role.DECODE) for url in decode),
        }
        self._healthy: dict[Role, tuple[Engine, ...]] = {Role.PREFILL: (), Role.DECODE: ()}

    def __iter__(self) -> Iterator[Engine]:
        yield from self.engines[Role.PREFILL]
        yield from self.engines[Role.DECODE]

    def healthy(self, role: Role) -> Sequence[Engine]:
        """Give the healthy engines of a role: the same object until one of them changes, so rings can be kept."""
        return self._healthy[role]

    def ready(self) -> bool:
        """Whether a request could be served by a pair."""
        return bool(self._healthy[Role.PREFILL] and self._healthy[Role.DECODE])

    def mark(self, engine: Engine, healthy: bool, why: str) -> None:
        """Record that an engine answers or does not; a change is logged with its reason."""
        if engine.healthy == healthy:
            return
        engine.healthy = healthy
        self._healthy[engine.role] = tuple(one for one in self.engines[engine.role] if one.healthy)
        level = logging.INFO if healthy else logging.WARNING
        _log.log(level, "engine=%s role=%s healthy=%s why=%s", engine.url, engine.role, str(healthy).lower(), why)
