"""What Kubernetes' NetworkPolicies let through, by the rules of the API.

A flow passes when the egress rules of its source and the ingress rules of its target both allow it. A pod that no
policy selects for a direction is open in that direction.
"""

import ipaddress
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

Policy = Mapping[str, Any]


@dataclass(frozen=True)
class End:
    """One end of a flow: a pod, or an address outside of the cluster (no labels, no namespace)."""

    labels: Mapping[str, str] = field(default_factory=dict)
    namespace: str | None = None
    namespace_labels: Mapping[str, str] = field(default_factory=dict)
    address: str = "10.0.0.1"
    named_ports: Mapping[str, int] = field(default_factory=dict)


def allowed(policies: Iterable[Policy], source: End, target: End, port: int, protocol: str = "TCP") -> bool:
    """Whether a connection from source to a port of target passes."""
    policies = list(policies)
    return all(
        _passes(policies, one, other, direction, port, protocol, target)
        for one, other, direction in ((source, target, "Egress"), (target, source, "Ingress"))
    )


def _passes(policies: list[Policy], pod: End, peer: End, direction: str, port: int, protocol: str, target: End) -> bool:
    selecting = [
        policy["spec"] for policy in policies
        if pod.namespace == policy["metadata"]["namespace"]
        and direction in policy["spec"].get("policyTypes", ["Ingress"])
        and _matches(policy["spec"].get("podSelector", {}), pod.labels)
    ]  # fmt: skip
    if not selecting:
        return True
    key = {"Egress": "egress", "Ingress": "ingress"}[direction]
    side = {"Egress": "to", "Ingress": "from"}[direction]
    return any(
        _ports(rule.get("ports"), port, protocol, target) and _peers(rule.get(side), peer, pod.namespace)
        for spec in selecting
        for rule in spec.get(key) or ()
    )


def _ports(ports: list[Mapping[str, Any]] | None, port: int, protocol: str, target: End) -> bool:
    if not ports:
        return True
    for one in ports:
        if one.get("protocol", "TCP") != protocol:
            continue
        first = one.get("port")
        if isinstance(first, str):
            first = target.named_ports.get(first)
            if first is None:
                continue
        if first is None or int(first) <= port <= int(one.get("endPort", first)):
            return True
    return False


def _peers(peers: list[Mapping[str, Any]] | None, peer: End, own_namespace: str | None) -> bool:
    if not peers:
        return True
    return any(_peer(one, peer, own_namespace) for one in peers)


def _peer(one: Mapping[str, Any], peer: End, own_namespace: str | None) -> bool:
    if "ipBlock" in one:
        # The API leaves it to the network whether a block means pods, too. Here it does: what is forbidden is then
        # forbidden everywhere.
        block = one["ipBlock"]
        address = ipaddress.ip_address(peer.address)
        inside = address in ipaddress.ip_network(block["cidr"])
        return inside and not any(address in ipaddress.ip_network(other) for other in block.get("except", ()))
    if peer.namespace is None:
        return False
    if "namespaceSelector" in one:
        if not _matches(one["namespaceSelector"], peer.namespace_labels):
            return False
    elif peer.namespace != own_namespace:
        return False
    return _matches(one.get("podSelector", {}), peer.labels)


def _matches(selector: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    assert set(selector) <= {"matchLabels"}, f"not understood: {selector}"
    return all(labels.get(name) == value for name, value in selector.get("matchLabels", {}).items())
