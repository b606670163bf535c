"""What rendered objects ask of a cluster: pods, GPUs, Secrets, storage, rights. Pure."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Object = Mapping[str, Any]

_UNITS = {
    "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15,
    "Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40, "Pi": 2.0**50,
}  # fmt: skip


def quantity(text: str | float) -> float:
    """Read a quantity of Kubernetes: `500m`, `100Gi`, `8`."""
    told = str(text)
    for length in (2, 1):
        if told[-length:] in _UNITS:
            return float(told[:-length]) * _UNITS[told[-length:]]
    return float(told)


@dataclass(frozen=True, slots=True)
class Pods:
    """The pods of one role.

    Args:
        requests: resources of one of them, by name.
        privileged: what of it only the privileged pod security level allows; empty when restricted is enough.
    """

    role: str
    count: int
    image: str
    requests: Mapping[str, float]
    secrets: tuple[str, ...] = ()
    privileged: str = ""


@dataclass(frozen=True, slots=True)
class Claim:
    """A PersistentVolumeClaim."""

    name: str
    storage_class: str
    access: str


@dataclass(frozen=True, slots=True)
class Wanted:
    """All that a deployment asks for.

    Args:
        model: as the engines are told it.
        token_secret: the Secret with the hub's token, and its key; empty when none is named.
    """

    pods: tuple[Pods, ...]
    claims: tuple[Claim, ...]
    kinds: tuple[str, ...]
    model: str
    token_secret: tuple[str, str] | None

    def total(self, resource: str) -> float:
        """How much of a resource all pods ask for."""
        return sum(pods.count * pods.requests.get(resource, 0.0) for pods in self.pods)

    @property
    def secrets(self) -> tuple[str, ...]:
        """The Secrets without which pods cannot start."""
        return tuple(sorted({name for pods in self.pods for name in pods.secrets}))

    @property
    def devices(self) -> tuple[str, ...]:
        """The extended resources: GPUs, RDMA."""
        return tuple(sorted({name for pods in self.pods for name in pods.requests if "/" in name}))

    @property
    def gpu(self) -> str:
        """The resource that stands for a GPU."""
        return next((name for name in self.devices if name.endswith(("/gpu", "gpu"))), "nvidia.com/gpu")


def _pods(role: str, count: int, template: Object) -> Pods:
    spec = template["spec"]
    requests: dict[str, float] = {}
    secrets: list[str] = [one["name"] for one in spec.get("imagePullSecrets") or ()]
    reasons: list[str] = []
    for container in spec["containers"]:
        resources = container.get("resources") or {}
        asked = (resources.get("limits") or {}) | (resources.get("requests") or {})
        for name, text in asked.items():
            requests[name] = requests.get(name, 0.0) + quantity(text)
        for variable in container.get("env") or ():
            reference = (variable.get("valueFrom") or {}).get("secretKeyRef")
            if reference and not reference.get("optional"):
                secrets.append(reference["name"])
        added = ((container.get("securityContext") or {}).get("capabilities") or {}).get("add") or ()
        reasons += [one for one in added if one != "NET_BIND_SERVICE"]
    for volume in spec.get("volumes") or ():
        if "secret" in volume and not volume["secret"].get("optional"):
            secrets.append(volume["secret"]["secretName"])
        if "hostPath" in volume:
            reasons.append(f"hostPath {volume['hostPath'].get('path', '')}")
    if any(spec.get(one) for one in ("hostNetwork", "hostIPC", "hostPID")):
        reasons.append("the host's namespaces")
    containers = spec["containers"]
    return Pods(
        role, count, containers[0]["image"], requests, tuple(dict.fromkeys(secrets)), ", ".join(dict.fromkeys(reasons))
    )


def _token(spec: Object) -> tuple[str, str] | None:
    for container in spec["containers"]:
        for variable in container.get("env") or ():
            reference = (variable.get("valueFrom") or {}).get("secretKeyRef")
            if variable["name"] == "HF_TOKEN" and reference:
                return reference["name"], reference["key"]
    return None


def kinds_text(objects: Iterable[Object], most: int | None = None) -> str:
    """Say what there is of each kind: `2 Deployments, 2 NetworkPolicies, 1 Role`."""
    counted = Counter(str(thing["kind"]) for thing in objects)

    def plural(kind: str) -> str:
        return kind[:-1] + "ies" if kind.endswith("y") else kind + "s"

    return ", ".join(f"{count} {plural(kind) if count > 1 else kind}" for kind, count in counted.most_common(most))


def wanted(objects: Iterable[Object]) -> Wanted:
    """Read what rendered objects ask for."""
    pods: list[Pods] = []
    claims: list[Claim] = []
    kinds: list[str] = []
    model, token = "", None
    for thing in objects:
        kind, spec = thing["kind"], thing.get("spec") or {}
        kinds.append(kind)
        if kind in ("Deployment", "Job"):
            labels = thing["metadata"].get("labels") or {}
            role = labels.get("app.kubernetes.io/component", "")
            count = 1 if kind == "Job" else int(spec.get("replicas", 1))
            pods.append(_pods(role, count, spec["template"]))
            token = token or _token(spec["template"]["spec"])
            if role == "prefill":
                model = spec["template"]["spec"]["containers"][0]["args"][0]
        elif kind == "PersistentVolumeClaim":
            name, classes = thing["metadata"]["name"], spec.get("storageClassName") or ""
            claims.append(Claim(name, classes, ", ".join(spec.get("accessModes") or ())))
    return Wanted(tuple(pods), tuple(claims), tuple(dict.fromkeys(kinds)), model, token)


@dataclass(slots=True)
class Room:
    """What a node can still take."""

    node: str
    free: dict[str, float]


def rooms(nodes: Iterable[Object], pods: Iterable[Object], own: str) -> list[Room]:
    """Work out what usable nodes can take; the deployment's own pods, in the namespace `own`, count as gone."""
    found: dict[str, Room] = {}
    for node in nodes:
        conditions = {one["type"]: one["status"] for one in node["status"].get("conditions") or ()}
        if (node.get("spec") or {}).get("unschedulable") or conditions.get("Ready") != "True":
            continue
        free = {name: quantity(text) for name, text in (node["status"].get("allocatable") or {}).items()}
        found[node["metadata"]["name"]] = Room(node["metadata"]["name"], free)
    for pod in pods:
        meta, spec = pod["metadata"], pod["spec"]
        room = found.get(spec.get("nodeName") or "")
        over = (pod.get("status") or {}).get("phase") in ("Succeeded", "Failed")
        ours = meta["namespace"] == own and (meta.get("labels") or {}).get("app.kubernetes.io/part-of") == "pdctl"
        if room is None or over or ours:
            continue
        for name, count in _pods("", 1, pod).requests.items():
            room.free[name] = room.free.get(name, 0.0) - count
        room.free["pods"] = room.free.get("pods", 0.0) - 1
    return list(found.values())


def without_room(asked: Wanted, free: Sequence[Room]) -> dict[str, int]:
    """Put the pods on the nodes, big ones first; give the number of those by role that find no place."""
    left = [Room(room.node, dict(room.free)) for room in free]
    missing: dict[str, int] = {}
    for pods in sorted(asked.pods, key=lambda one: -max(one.requests.get(asked.gpu, 0.0), 0.0)):
        for _ in range(pods.count):
            place = next(
                (room for room in left if all(room.free.get(name, 0.0) >= n for name, n in pods.requests.items())), None
            )
            if place is None:
                missing[pods.role] = missing.get(pods.role, 0) + 1
                continue
            for name, count in pods.requests.items():
                place.free[name] -= count
    return missing
