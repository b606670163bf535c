"""What DNS answers say: from records to engines, no I/O."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from pdrouter.discovery.found import Found
from pdrouter.fleet.engine import Role

_SHORTEST, _LONGEST = 1.0, 30.0


@dataclass(frozen=True, slots=True)
class Service:
    """An SRV record's target, in lower case and without its last dot."""

    target: str
    port: int


def kept_for(ttl: float) -> float:
    """How long an answer is kept: its TTL, within a second and half a minute.

    Servers that mean "do not keep" send 0, and some send an hour for records that change within minutes.
    """
    return min(_LONGEST, max(_SHORTEST, ttl))


def from_addresses(addresses: Iterable[str], port: int, role: Role) -> tuple[Found, ...]:
    """Give an engine for each address, named by it."""
    places = sorted({_place(address, port) for address in addresses})
    return tuple(Found(f"http://{place}", place, role) for place in places)


def from_services(
    services: Iterable[Service],
    addresses: Mapping[str, Iterable[str]],
    role: Role,
    known: Iterable[Found] = (),
) -> tuple[Found, ...]:
    """Give an engine for each SRV record, named by its target and port.

    A target with several addresses is one engine, at the first of them by order. A target without an address stays
    where it was last known, or is left out when it was not.
    """
    before = {one.name: one for one in known}
    found: dict[str, Found] = {}
    for service in services:
        name = _place(service.target, service.port)
        at = sorted(addresses.get(service.target, ()))
        if at:
            found[name] = Found(f"http://{_place(at[0], service.port)}", name, role)
        elif name in before:
            found[name] = before[name]
    return tuple(found[name] for name in sorted(found))


def _place(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
