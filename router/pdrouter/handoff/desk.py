"""What all handoffs share: the fleet, the policies, the connections, the limits."""

import asyncio
from collections.abc import Sequence

from pdrouter.deadlines import Deadlines
from pdrouter.fleet.engine import Engine, Role
from pdrouter.fleet.fleet import Fleet
from pdrouter.observe.metrics import Observer
from pdrouter.policies import Features, Policy, RoutingKey
from pdrouter.upstream.pool import Pool


class Desk:
    """Shared by all requests of one router process. Times are seconds."""

    __slots__ = ("_reasons", "deadlines", "fleet", "lease", "loop", "observer", "policies", "pool")

    def __init__(
        self, loop: asyncio.AbstractEventLoop, fleet: Fleet, pool: Pool, policies: dict[Role, Policy],
        observer: Observer, lease: float, request_timeout: float,
    ) -> None:  # fmt: skip
        self.loop = loop
        self.fleet = fleet
        self.pool = pool
        self.policies = policies
        self.observer = observer
        self.lease = lease
        self.deadlines = Deadlines(loop, request_timeout)
        self._reasons: dict[str, str] = {}

    def choose(self, role: Role, request: Features, refused: Sequence[Engine] = ()) -> Engine | None:
        """Choose a healthy engine that is not in `refused`, or None when there is none."""
        candidates = self.fleet.healthy(role)
        if refused:
            candidates = [engine for engine in candidates if engine not in refused]
        if not candidates:
            return None
        return self.policies[role].choose(request, candidates)

    def _choice_reason(self, role: Role, source: str) -> str:
        policy = self.policies[role]
        return f"{policy.name}:{source}" if policy.uses_key else policy.name

    def pair_reason(self, key: RoutingKey) -> str:
        """Say how both engines are chosen, for the log."""
        reason = self._reasons.get(key.source)
        if reason is None:
            prefill, decode = (self._choice_reason(role, key.source) for role in (Role.PREFILL, Role.DECODE))
            reason = self._reasons[key.source] = prefill if prefill == decode else f"{prefill}/{decode}"
        return reason
