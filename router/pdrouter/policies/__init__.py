"""Pure choices: (request, engines) -> engine. One module a policy."""

from collections.abc import Callable

from pdrouter.policies.bounded_hash import BoundedHash
from pdrouter.policies.cache_aware import CacheAware
from pdrouter.policies.choice import (
    Bypassing,
    Candidate,
    Commons,
    Features,
    Learning,
    Policy,
    PolicyFactory,
    RoleName,
    Scoring,
    Timed,
)
from pdrouter.policies.consistent_hash import ConsistentHash
from pdrouter.policies.kv_aware import KvAware
from pdrouter.policies.least_tokens import LeastTokens
from pdrouter.policies.llmd import LlmdDefault, LlmdPdGuide, LlmdPdSample
from pdrouter.policies.pd_cost import PdCost
from pdrouter.policies.power_of_two import PowerOfTwo
from pdrouter.policies.prefix_index import PrefixIndex
from pdrouter.policies.random_choice import RandomChoice
from pdrouter.policies.rendezvous_hash import RendezvousHash
from pdrouter.policies.round_robin import RoundRobin
from pdrouter.policies.routing_key import RoutingKey
from pdrouter.policies.sticky_least_loaded import StickyLeastLoaded


def _factory(make: Callable[[RoleName, Commons], Policy]) -> PolicyFactory:
    def factory(role: RoleName, commons: Commons | None = None) -> Policy:
        return make(role, Commons() if commons is None else commons)

    return factory


POLICIES: dict[str, PolicyFactory] = {
    "cache_aware": _factory(lambda _, commons: CacheAware(commons.clock)),
    "chwbl": _factory(lambda _, __: BoundedHash()),
    "consistent_hash": _factory(lambda _, __: ConsistentHash()),
    "kv_aware": _factory(lambda role, commons: KvAware(role, commons.clock, index=PrefixIndex(commons.block_tokens))),
    "least_tokens": _factory(lambda role, commons: LeastTokens(role, commons.draw())),
    "llmd_default": _factory(LlmdDefault),
    "llmd_pd_guide": _factory(LlmdPdGuide),
    "llmd_pd_sample": _factory(LlmdPdSample),
    "pd_cost": _factory(PdCost.of),
    "power_of_two": _factory(lambda _, commons: PowerOfTwo(commons.draw())),
    "random": _factory(lambda _, commons: RandomChoice(commons.seed)),
    "rendezvous_hash": _factory(lambda _, __: RendezvousHash()),
    "round_robin": _factory(lambda _, __: RoundRobin()),
    "sticky_least_loaded": _factory(lambda _, commons: StickyLeastLoaded(commons.clock)),
}

# Policies that look at what engines say of themselves; for any other reading `/metrics` would be wasted.
READ_METRICS = frozenset(("llmd_default", "llmd_pd_sample", "pd_cost", "kv_aware"))

__all__ = [
    "POLICIES",
    "READ_METRICS",
    "Bypassing",
    "Candidate",
    "Commons",
    "ConsistentHash",
    "Features",
    "Learning",
    "Policy",
    "PolicyFactory",
    "RandomChoice",
    "RoleName",
    "RoundRobin",
    "RoutingKey",
    "Scoring",
    "Timed",
]
