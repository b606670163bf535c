"""Pure choices: (request, engines) -> engine. One module a policy."""

from pdrouter.policies.choice import Candidate, Features, Policy, PolicyFactory, RoutingKey
from pdrouter.policies.consistent_hash import ConsistentHash
from pdrouter.policies.random_choice import RandomChoice
from pdrouter.policies.round_robin import RoundRobin

POLICIES: dict[str, PolicyFactory] = {
    "consistent_hash": lambda role: ConsistentHash(),
    "random": lambda role: RandomChoice(),
    "round_robin": lambda role: RoundRobin(),
}

__all__ = ["POLICIES", "Candidate", "ConsistentHash", "Features", "Policy", "RandomChoice", "RoundRobin", "RoutingKey"]
