"""The sources of engines that the settings ask for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pdrouter.discovery.found import Sink, Source
from pdrouter.fleet.engine import Role

if TYPE_CHECKING:
    from pdrouter.settings import Settings


class DiscoveryError(Exception):
    """Engines are to be found where they cannot be looked for; the message says what to do."""


def _dns(told: str, role: Role, sink: Sink) -> Source:
    from pdrouter.discovery.dns import DnsSource  # noqa: PLC0415 -- a router with fixed engines needs no resolver

    host, _, port = told.rpartition(":")
    if not host:
        return DnsSource(sink, told, role)
    if not port.isdecimal() or not 1 <= int(port) <= 65535:
        raise DiscoveryError(f"--{role.value}-dns {told}: after the colon must be a port; write NAME:PORT or a name")
    return DnsSource(sink, host, role, int(port))


def _slices(settings: Settings, selectors: list[tuple[Role, str]], sink: Sink) -> list[Source]:
    from pdrouter.discovery.endpoint_slices import EndpointSliceSource  # noqa: PLC0415 -- needs an HTTP client
    from pdrouter.discovery.kubernetes import Account, NotInCluster  # noqa: PLC0415
    from pdrouter.discovery.slices import Reading  # noqa: PLC0415

    try:
        account = Account.of_this_pod()
    except NotInCluster as error:
        raise DiscoveryError(str(error)) from None
    return [
        EndpointSliceSource(
            sink, account, selector, Reading(role, settings.service_discovery_port, settings.identity),
            settings.service_discovery_namespace,
        )
        for role, selector in selectors
    ]  # fmt: skip


def sources(settings: Settings, sink: Sink) -> list[Source]:
    """Make the sources, not yet started.

    Raises:
        DiscoveryError: one cannot work here.
    """
    found = [
        _dns(told, role, sink)
        for role, told in ((Role.PREFILL, settings.prefill_dns), (Role.DECODE, settings.decode_dns))
        if told is not None
    ]
    selectors = [
        (role, told)
        for role, told in ((Role.PREFILL, settings.prefill_selector), (Role.DECODE, settings.decode_selector))
        if told is not None
    ]
    return found + (_slices(settings, selectors, sink) if selectors else [])
