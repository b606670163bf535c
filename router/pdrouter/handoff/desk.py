"""What all handoffs share: the fleet, the policies, the connections, the limits."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from pdrouter.fleet.engine import Engine, Role
from pdrouter.fleet.fleet import Fleet
from pdrouter.observe.metrics import Observer
from pdrouter.policies import Policy, RoutingKey
from pdrouter.upstream.pool import Pool


@dataclass(frozen=True, slots=True)
class Desk:
    """Shared by all requests of one router process. Times are seconds."""

    loop: asyncio.AbstractEventLoop
    fleet: Fleet
    pool: Pool
    policies: dict[Role, Policy]
    observer: Observer
    lease: float
    request_timeout: float

    def choose(self, role: Role, key: RoutingKey, refused: Sequence[Engine] = ()) -> Engine | None:
        """Choose a healthy engine that is not in `refused`, or None when there is none."""
        candidates = self.fleet.healthy(role)
        if refused:
            candidates = [engine for engine in candidates if engine not in refused]
        if not candidates:
            return None
        return self.policies[role].choose(key, candidates)

    def choice_reason(self, role: Role, key: RoutingKey) -> str:
        """Say how a role's engine is chosen, for the log."""
        policy = self.policies[role]
        return f"{policy.name}:{key.source}" if policy.uses_key else policy.name

    def pair_reason(self, key: RoutingKey) -> str:
        """Say how both engines are chosen, for the log."""
        prefill, decode = self.choice_reason(Role.PREFILL, key), self.choice_reason(Role.DECODE, key)
        return prefill if prefill == decode else f"{prefill}/{decode}"
