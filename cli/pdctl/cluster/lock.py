"""One change at a time: a Lease in the namespace, renewed while a command changes the deployment."""

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from typing import Any

from pdctl.cluster import paths
from pdctl.cluster.api import ApiError, Cluster, Unreachable
from pdctl.cluster.identity import user
from pdctl.errors import ExitCode, PdctlError
from pdctl.podstate.state import seconds

NAME = "pdctl"
LASTS = 15  # seconds after which a lock that is not renewed is free
RENEW = 5.0
GIVE_BACK_SECONDS = 5.0  # it ends by itself
CONFLICT = 409


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def _who() -> str:
    return f"{user()}@{socket.gethostname()}, process {os.getpid()}"


def _lease(namespace: str, verb: str, version: str | None = None) -> dict[str, Any]:
    meta: dict[str, Any] = {
        "name": NAME, "namespace": namespace, "labels": {"app.kubernetes.io/managed-by": "pdctl"},
        "annotations": {"pdctl/command": verb},
    }  # fmt: skip
    if version is not None:
        meta["resourceVersion"] = version
    spec = {"holderIdentity": _who(), "leaseDurationSeconds": LASTS, "acquireTime": _now(), "renewTime": _now()}
    return {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": meta, "spec": spec}


async def _take(cluster: Cluster, namespace: str, verb: str, say: Callable[[str], None]) -> Any:
    path, one = paths.namespaced("leases", namespace), paths.namespaced("leases", namespace, NAME)
    deadline = time.monotonic() + LASTS + 2
    seen = ""
    while True:
        try:
            return await cluster.create(path, _lease(namespace, verb))
        except ApiError as error:
            if error.status != CONFLICT:
                raise
        try:
            held = await cluster.get(one)
        except ApiError as error:
            if error.status == 404:
                continue
            raise
        spec = held["spec"]
        if time.time() - seconds(spec.get("renewTime")) > int(spec.get("leaseDurationSeconds") or 0):
            with contextlib.suppress(ApiError):  # somebody else was quicker
                return await cluster.replace(one, _lease(namespace, verb, held["metadata"]["resourceVersion"]))
            await asyncio.sleep(0.1)
            continue
        who = spec.get("holderIdentity") or "somebody"
        what = (held["metadata"].get("annotations") or {}).get("pdctl/command", "another command")
        if (seen and seen != spec["renewTime"]) or time.monotonic() > deadline:
            raise PdctlError(
                f"pdctl {what} already runs against {namespace}: {who}, since {spec.get('acquireTime', '?')[:19]}",
                f"wait until it is done, or end it; look on with pdctl status --namespace {namespace} --watch",
                ExitCode.PREFLIGHT,
            )
        if not seen:
            say(f"{namespace} is locked by pdctl {what} ({who}); waiting whether that still runs")
        seen = spec["renewTime"]
        await asyncio.sleep(0.5)


async def _ours(cluster: Cluster, namespace: str) -> str | None:
    """Give the version of our lock as it is now; None when it is gone, or somebody else's."""
    there = await cluster.find(paths.namespaced("leases", namespace, NAME))
    if there is None or there["spec"].get("holderIdentity") != _who():
        return None
    return str(there["metadata"]["resourceVersion"])


async def _renewed(cluster: Cluster, namespace: str, verb: str, version: str) -> str | None:
    """Renew our lock and give its version; None when it is lost."""
    try:
        told = await cluster.replace(paths.namespaced("leases", namespace, NAME), _lease(namespace, verb, version))
    except ApiError as error:
        if error.status not in (404, CONFLICT):
            raise
        return await _ours(cluster, namespace)  # ours when the answer to an earlier renewal did not arrive
    return str(told["metadata"]["resourceVersion"])


@contextlib.asynccontextmanager
async def locked(
    cluster: Cluster, namespace: str, verb: str, say: Callable[[str], None] = lambda text: None
) -> AsyncIterator[None]:
    """Hold the lock of a namespace, which must exist.

    Raises:
        PdctlError: another pdctl holds it and renews it; exit code PREFLIGHT.
    """
    if not await cluster.allowed("create", "leases", namespace, "coordination.k8s.io"):
        say("no right to make a Lease here: nothing keeps a second pdctl from doing the same at once")
        yield
        return
    held = await _take(cluster, namespace, verb, say)

    async def renew() -> None:
        version: str | None = held["metadata"]["resourceVersion"]
        while version is not None:
            await asyncio.sleep(RENEW)
            with contextlib.suppress(ApiError, Unreachable):  # the next time, perhaps; it lasts a while
                version = await _renewed(cluster, namespace, verb, version)
        say(f"the lock of {namespace} is lost: another pdctl may change the same at once")

    renewal = asyncio.ensure_future(renew())
    try:
        yield
    finally:
        renewal.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await renewal
        with contextlib.suppress(ApiError, Unreachable, TimeoutError):
            async with asyncio.timeout(GIVE_BACK_SECONDS):
                if (version := await _ours(cluster, namespace)) is not None:
                    await cluster.delete(paths.namespaced("leases", namespace, NAME), version)
