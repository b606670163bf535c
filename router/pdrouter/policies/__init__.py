"""Pure choices: (request, engines) -> engine. One module a policy."""

from pdrouter.policies.choice import Candidate, Policy, PolicyFactory, RoutingKey
from pdrouter.policies.consistent_hash import ConsistentHash
from pdrouter.policies.random_choice import RandomChoice
from pdrouter.policies.round_robin import RoundRobin

POLICIES: dict[str, PolicyFactory] = {
    "consistent_hash": ConsistentHash,
    "random": RandomChoice,
    "round_robin": RoundRobin,
}

__all__ = ["POLICIES", "Candidate", "ConsistentHash", "Policy", "RandomChoice", "RoundRobin", "RoutingKey"]
