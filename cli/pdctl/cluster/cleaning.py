"""Taking a deployment out of a cluster: what is there, what of it is pdctl's, and seeing it go."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pdctl.cluster import paths, record
from pdctl.cluster.api import ApiError, Cluster
from pdctl.cluster.helm import Helm
from pdctl.cluster.observe import PART
from pdctl.cluster.releases import ENGINES, OTHERS, ROUTER
from pdctl.cluster.wanted import kinds_text
from pdctl.errors import ExitCode, PdctlError

LOOK_SECONDS = 0.5
_RELEASES = (*OTHERS.values(), ROUTER, ENGINES)  # in the order in which they go
# What Kubernetes itself puts into a namespace, or keeps of others' objects.
_OF_THE_SYSTEM = ("events", "endpoints", "endpointslices", "leases", "localsubjectaccessreviews", "bindings")


@dataclass(frozen=True, slots=True)
class Found:
    """What is in a namespace.

    Args:
        releases: of Helm that are the deployment's, with the number of their objects by kind.
        secrets: made by pdctl.
        kept: claims that stay with their data, because the values say so.
        pods: of the deployment.
        others: objects that are not the deployment's, `Kind name`.
        made_namespace: whether pdctl made the namespace.
    """

    releases: dict[str, str]
    secrets: tuple[str, ...]
    kept: tuple[str, ...]
    pods: int
    others: tuple[str, ...]
    made_namespace: bool

    @property
    def empty(self) -> bool:
        """Whether nothing of it is pdctl's."""
        return not (self.releases or self.secrets or self.pods)


def _managed(thing: Any) -> bool:
    return (thing["metadata"].get("labels") or {}).get("app.kubernetes.io/managed-by") == "pdctl"


async def look(cluster: Cluster, helm: Helm, namespace: str, space: Any) -> Found:
    """See what is there."""
    releases, kept = {}, []
    for name in _RELEASES:
        state = await helm.state(name)
        if not state.exists:
            continue
        things = await helm.manifest(name)
        releases[name] = kinds_text(things)
        for thing in things:
            policy = (thing["metadata"].get("annotations") or {}).get("helm.sh/resource-policy")
            if policy == "keep":
                kept.append(f"{thing['kind']} {thing['metadata']['name']}")
    secrets = await cluster.list(paths.namespaced("secrets", namespace), "app.kubernetes.io/managed-by=pdctl")
    pods = await cluster.list(paths.namespaced("pods", namespace), PART)
    known = record.load(namespace)
    return Found(
        releases, tuple(one["metadata"]["name"] for one in secrets), tuple(kept), len(pods),
        tuple(await _others(cluster, namespace)),
        _managed(space) or (known is not None and known.made_namespace),
    )  # fmt: skip


async def _listable(cluster: Cluster) -> list[str]:
    """Give the paths, below a namespace, of all kinds that can be listed there: `/api/v1`, `pods` as a pair."""
    roots = ["/api/v1"]
    for group in (await cluster.get("/apis"))["groups"]:
        roots.append(f"/apis/{group['preferredVersion']['groupVersion']}")
    told = await asyncio.gather(*(cluster.find(root) for root in roots))
    return [
        f"{root} {one['name']}"
        for root, found in zip(roots, told, strict=True)
        for one in (found or {}).get("resources", ())
        if one["namespaced"] and "list" in one["verbs"] and "/" not in one["name"] and one["name"] not in _OF_THE_SYSTEM
    ]


def _ours(thing: Any) -> bool:
    meta = thing["metadata"]
    labels = meta.get("labels") or {}
    if labels.get("app.kubernetes.io/part-of") == "pdctl" or labels.get("app.kubernetes.io/managed-by") == "pdctl":
        return True
    if meta["name"] in ("default", "kube-root-ca.crt"):  # each namespace has them
        return True
    if labels.get("owner") == "helm" and labels.get("name") in _RELEASES:
        return True
    return bool(meta.get("ownerReferences"))


async def _others(cluster: Cluster, namespace: str) -> list[str]:
    async def of(kind: str) -> list[str]:
        root, _, plural = kind.partition(" ")
        try:
            things = await cluster.list(f"{root}/namespaces/{namespace}/{plural}")
        except ApiError:
            return []
        return [f"{plural}/{one['metadata']['name']}" for one in things if not _ours(one)]

    found = await asyncio.gather(*(of(kind) for kind in await _listable(cluster)))
    return sorted({one for some in found for one in some})


async def remove(
    cluster: Cluster, helm: Helm, namespace: str, found: Found, timeout: float, tell: Callable[[str], None]
) -> None:
    """Uninstall the releases, router first, wait until the pods are gone, remove what pdctl made beside them.

    Raises:
        PdctlError: something is still there after `timeout` seconds; exit code TIMEOUT.
    """
    deadline = time.monotonic() + timeout
    for name in found.releases:
        await helm.uninstall(name)
        tell(f"{name} is uninstalled")
    # Hooks, such as the pod of helm test, belong to no release; nor does what measuring put beside them.
    for kind in ("pods", "jobs", "configmaps", "networkpolicies"):
        for thing in await cluster.list(paths.namespaced(kind, namespace), PART):
            if not thing["metadata"].get("ownerReferences") and not thing["metadata"].get("deletionTimestamp"):
                await cluster.delete(paths.namespaced(kind, namespace, thing["metadata"]["name"]))
    told = -1
    while True:
        pods = await cluster.list(paths.namespaced("pods", namespace), PART)
        if not pods:
            break
        if len(pods) != told:
            told = len(pods)
            tell(f"{told} pods still stop")
        if time.monotonic() > deadline:
            names = ", ".join(one["metadata"]["name"] for one in pods[:5])
            raise PdctlError(
                f"{len(pods)} pods are still there after {timeout:g} s: {names}",
                "see what holds them: kubectl describe pod; run cleanup again, it goes on",
                ExitCode.TIMEOUT,
            )
        await asyncio.sleep(LOOK_SECONDS)
    for name in found.secrets:
        await cluster.delete(paths.namespaced("secrets", namespace, name))
        tell(f"Secret {name} is removed")


async def remove_namespace(cluster: Cluster, namespace: str, timeout: float, tell: Callable[[str], None]) -> None:
    """Remove the namespace and wait until it is gone.

    Raises:
        PdctlError: it is still there after `timeout` seconds; exit code TIMEOUT.
    """
    path = f"{paths.NAMESPACES}/{namespace}"
    await cluster.delete(path)
    tell(f"namespace {namespace} goes")
    deadline = time.monotonic() + timeout
    while (there := await cluster.find(path)) is not None:
        if time.monotonic() > deadline:
            conditions = (there.get("status") or {}).get("conditions") or ()
            why = next((one["message"] for one in conditions if one.get("status") == "True"), "no reason is given")
            raise PdctlError(
                f"the namespace {namespace} is still there after {timeout:g} s: {why}",
                f"see kubectl get namespace {namespace} -o yaml", ExitCode.TIMEOUT,
            )  # fmt: skip
        await asyncio.sleep(LOOK_SECONDS)
