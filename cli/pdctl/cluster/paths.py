"""Where objects are in the API."""

PODS, SECRETS, EVENTS = "pods", "secrets", "events"
NODES = "/api/v1/nodes"
NAMESPACES = "/api/v1/namespaces"

_CORE = (
    "namespaces",
    "pods",
    "secrets",
    "services",
    "configmaps",
    "events",
    "serviceaccounts",
    "persistentvolumeclaims",
    "endpoints",
)
_GROUPS = {
    "deployments": "apps/v1",
    "replicasets": "apps/v1",
    "jobs": "batch/v1",
    "leases": "coordination.k8s.io/v1",
    "endpointslices": "discovery.k8s.io/v1",
    "poddisruptionbudgets": "policy/v1",
    "networkpolicies": "networking.k8s.io/v1",
    "roles": "rbac.authorization.k8s.io/v1",
    "rolebindings": "rbac.authorization.k8s.io/v1",
    "horizontalpodautoscalers": "autoscaling/v2",
    "podmonitors": "monitoring.coreos.com/v1",
    "servicemonitors": "monitoring.coreos.com/v1",
    "prometheusrules": "monitoring.coreos.com/v1",
    "scaledobjects": "keda.sh/v1alpha1",
}


def namespaced(plural: str, namespace: str, name: str = "") -> str:
    """Give the path of a namespace's objects of a kind, or of one of them."""
    base = "/api/v1" if plural in _CORE else f"/apis/{_GROUPS[plural]}"
    path = f"{base}/namespaces/{namespace}/{plural}"
    return f"{path}/{name}" if name else path


def group_of(plural: str) -> str:
    """Give the API group of a kind; empty for the core's."""
    return "" if plural in _CORE else _GROUPS[plural].partition("/")[0]


def of(thing: dict[str, object], namespace: str) -> str:
    """Give the path of a rendered object.

    Raises:
        KeyError: its kind is none that the charts make.
    """
    kind, meta = str(thing["kind"]), thing["metadata"]
    assert isinstance(meta, dict)
    plural = kind.lower() + "s"
    if kind.endswith("y"):
        plural = kind.lower()[:-1] + "ies"
    return namespaced(plural, str(meta.get("namespace") or namespace), str(meta["name"]))
