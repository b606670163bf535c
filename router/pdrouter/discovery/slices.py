"""What EndpointSlices say: from their JSON to engines, no I/O.

Kubernetes makes EndpointSlices from a Service: one Service has several when it has many pods, two address families or
pods whose named ports differ, and while it moves an endpoint from one to another both may list it.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from pdrouter.discovery.found import Found, Identity
from pdrouter.fleet.engine import Role

ROLE_LABEL = "llm-d.ai/role"
_FAMILIES = {"IPv4": 0, "IPv6": 1, "FQDN": 2}  # where a pod has several addresses, the first of these is used


@dataclass(frozen=True, slots=True)
class Reading:
    """How slices are read.

    Attributes:
        role: The role of slices that have no label `llm-d.ai/role` of their own; None leaves those out.
        port: The engines' port. A name is that of the Service's port. A number is the pod's own port (the Service's
            `targetPort`), and is used even where the Service does not list it: a pod is reached directly, so an
            engine behind a sidecar can be named. None means the only TCP port of the Service.
        identity: What `Found.name` is: the URL, or the pod's name, by which a pod of a StatefulSet keeps its place on
            a hash ring when it comes back with another address.
    """

    role: Role | None = None
    port: int | str | None = None
    identity: Identity = "address"


@dataclass(frozen=True, slots=True)
class Read:
    """Engines, by name, and what is wrong with the slices."""

    found: tuple[Found, ...]
    problems: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Endpoint:
    """An endpoint with what decides between two of the same pod."""

    pod: str  # unique for one life of one pod; the URL where no pod is named
    family: int
    found: Found


class _Unusable(Exception):  # noqa: N818
    """A slice cannot be read; the message says why."""


def read(slices: Iterable[Mapping[str, Any]], reading: Reading) -> Read:
    """Merge the slices of a selector: each engine once, ordered by name."""
    problems: list[str] = []
    endpoints: list[_Endpoint] = []
    for one in slices:
        try:
            endpoints += _endpoints(one, reading)
        except _Unusable as why:
            problems.append(f"EndpointSlice {_name_of(one)}: {why}")
    found = sorted(_each_name_once(_each_pod_once(endpoints)), key=lambda one: one.name)
    return Read(tuple(found), tuple(sorted(problems)))


def _name_of(one: Mapping[str, Any]) -> str:
    return str((one.get("metadata") or {}).get("name", "without a name"))


def _endpoints(one: Mapping[str, Any], reading: Reading) -> Iterator[_Endpoint]:
    listed = [each for each in one.get("endpoints") or () if _takes_traffic(each)]
    if not listed:
        return  # nothing to find, so nothing to complain about
    role = _role(one, reading.role)
    port = _port(one, reading.port)
    family = _FAMILIES.get(one.get("addressType", "IPv4"), len(_FAMILIES))
    for each in listed:
        addresses = each.get("addresses") or ()
        if not addresses:
            continue
        # The API allows several addresses and says that they are interchangeable and that clients take the first.
        host = f"[{addresses[0]}]" if ":" in addresses[0] else addresses[0]
        url = f"http://{host}:{port}"
        target = each.get("targetRef") or {}
        name = target.get("name") if target.get("kind") == "Pod" else None
        found = Found(
            url=url,
            name=name if name and reading.identity == "name" else url,
            role=role,
            terminating=bool((each.get("conditions") or {}).get("terminating")),
        )
        yield _Endpoint(str(target.get("uid") or name or url), family, found)


def _takes_traffic(endpoint: Mapping[str, Any]) -> bool:
    """Whether an endpoint is ready, or not ready and yet serving (it terminates and still answers)."""
    conditions = endpoint.get("conditions") or {}
    ready = conditions.get("ready")
    return ready is None or bool(ready) or bool(conditions.get("serving"))  # the API: unknown is to be taken for ready


def _role(one: Mapping[str, Any], told: Role | None) -> Role:
    label = ((one.get("metadata") or {}).get("labels") or {}).get(ROLE_LABEL)
    if label in (Role.PREFILL, Role.DECODE):
        return Role(label)
    if told is not None:
        return told
    has = "has no label" if label is None else f"has {label!r} as its label"
    raise _Unusable(
        f"{has} {ROLE_LABEL}; label its Service with {ROLE_LABEL}=prefill or {ROLE_LABEL}=decode (slices take the "
        "labels of their Service, not of its pods), or give one selector for each role"
    )


def _port(one: Mapping[str, Any], wanted: int | str | None) -> int:
    if isinstance(wanted, int):
        return wanted
    ports = {
        each.get("name") or "": each["port"]
        for each in one.get("ports") or ()
        if each.get("port") and each.get("protocol", "TCP") == "TCP"
    }
    listed = ", ".join(f"{name or 'unnamed'}={number}" for name, number in sorted(ports.items())) or "none"
    if wanted is None:
        if len(ports) != 1:
            raise _Unusable(f"the port of the engines is not clear (TCP ports: {listed}); give its name or number")
        return int(next(iter(ports.values())))
    if wanted not in ports:
        raise _Unusable(f"its Service has no TCP port named {wanted!r} (TCP ports: {listed}); give one of these names")
    return int(ports[wanted])


def _each_pod_once(endpoints: Iterable[_Endpoint]) -> Iterator[Found]:
    """Give each pod once: listed in two slices, or with an address of each family.

    What one slice knows of a pod's end holds, since nothing takes an end back: the other slice is older.
    """
    pods: dict[str, list[_Endpoint]] = {}
    for one in endpoints:
        pods.setdefault(one.pod, []).append(one)
    for same in pods.values():
        best = min(same, key=lambda one: (one.family, one.found.url)).found
        ends = any(one.found.terminating for one in same)
        yield replace(best, terminating=ends)


def _each_name_once(founds: Iterable[Found]) -> Iterator[Found]:
    """Give each name once: of two lives of a pod (or of an address that went to another pod) the one that goes on."""
    names: dict[str, Found] = {}
    for one in founds:
        other = names.get(one.name)
        if other is None or (one.terminating, one.url, one.role) < (other.terminating, other.url, other.role):
            names[one.name] = one
    return iter(names.values())
