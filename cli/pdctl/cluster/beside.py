"""Objects that measuring puts beside a deployment for as long as it lasts. Pure."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

ROUTER_PODS = {"app.kubernetes.io/part-of": "pdctl", "app.kubernetes.io/component": "router"}
_LONGEST = 52  # of a Job's name, so that its pods' have room


def object_name(run: str) -> str:
    """Give the name that objects of a run have."""
    return "pdctl-" + re.sub(r"[^a-z0-9-]+", "-", run.lower())[: _LONGEST - 6].strip("-")


def labels(component: str) -> dict[str, str]:
    """Give the labels by which cleanup knows them."""
    return {
        "app.kubernetes.io/part-of": "pdctl",
        "app.kubernetes.io/managed-by": "pdctl",
        "app.kubernetes.io/component": component,
    }


def kept_in(policies: Iterable[Mapping[str, Any]], pod: Mapping[str, str]) -> bool:
    """Whether a NetworkPolicy says where a pod of these labels may connect to."""
    for policy in policies:
        spec = policy["spec"]
        selector = spec.get("podSelector") or {}
        chosen = (selector.get("matchLabels") or {}).items() <= pod.items() and not selector.get("matchExpressions")
        if chosen and "Egress" in (spec.get("policyTypes") or ()):
            return True
    return False


def way_to_router(run: str, pods: dict[str, str], port: int) -> dict[str, Any]:
    """Give a NetworkPolicy that lets engines' pods call the router and resolve its name, which they may not otherwise.

    Policies add up: where none keeps the engines in, this one must not be there, for it would.

    Args:
        run: name of the run.
        pods: labels of the pods that are let through.
        port: the router's.
    """
    names = [{"port": 53, "protocol": "UDP"}, {"port": 53, "protocol": "TCP"}]
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": object_name(run), "labels": labels("bench")},
        "spec": {
            "podSelector": {"matchLabels": pods},
            "policyTypes": ["Egress"],
            "egress": [
                {"to": [{"podSelector": {"matchLabels": ROUTER_PODS}}], "ports": [{"port": port, "protocol": "TCP"}]},
                {"ports": names},
            ],
        },
    }
