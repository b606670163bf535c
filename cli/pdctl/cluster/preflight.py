"""What must be there before anything is changed. Each check asks the API; none changes anything."""

import asyncio
import os
import re
from collections.abc import Awaitable
from dataclasses import dataclass
from typing import Any

import httpx

from pdctl.check import Check, Mark
from pdctl.cluster import paths
from pdctl.cluster.api import ApiError, Cluster
from pdctl.cluster.helm import Helm
from pdctl.cluster.wanted import Wanted, quantity, rooms, without_room

OLDEST = (1, 30)
HUB_SECONDS = 5.0
# What Helm makes and pdctl watches: resource, and verbs.
_RIGHTS = (
    ("deployments", ("create", "patch", "delete", "list")),
    ("services", ("create", "patch", "delete", "list")),
    ("configmaps", ("create", "patch", "delete")),
    ("serviceaccounts", ("create", "patch", "delete")),
    ("secrets", ("create", "patch", "list", "delete")),
    ("roles", ("create", "patch", "delete")),
    ("rolebindings", ("create", "patch", "delete")),
    ("networkpolicies", ("create", "patch", "delete")),
    ("poddisruptionbudgets", ("create", "patch", "delete")),
    ("pods", ("list",)),
    ("events", ("list",)),
    ("replicasets", ("list",)),
)


@dataclass(frozen=True, slots=True)
class Scene:
    """What the checks look at.

    Args:
        space: the namespace as it is; None when it does not exist.
        token: the hub's token, when one was given.
    """

    cluster: Cluster
    helm: Helm
    namespace: str
    space: Any | None
    wanted: Wanted
    token: str | None


async def _version(scene: Scene) -> Check:
    told = scene.cluster.version
    found = re.match(r"v(\d+)\.(\d+)", told)
    old = found is not None and (int(found[1]), int(found[2])) < OLDEST
    fix = "the charts need Kubernetes 1.30 or newer" if old else ""
    return Check("Kubernetes", Mark.FAIL if old else Mark.OK, f"{told} at {scene.cluster.server}", fix)


async def _rights(scene: Scene) -> Check:
    cluster = scene.cluster
    asked = [(what, verb, "") for what, verbs in _RIGHTS for verb in verbs]
    asked += [("pods", "get", "log"), ("pods", "create", "portforward")]
    asked += [("namespaces", "create", "")] if scene.space is None else []

    async def may(what: str, verb: str, part: str) -> bool:
        space = "" if what == "namespaces" else scene.namespace
        return await cluster.allowed(verb, what, space, paths.group_of(what), part)

    missing: dict[str, list[str]] = {}
    for (what, verb, part), allowed in zip(asked, await asyncio.gather(*(may(*one) for one in asked)), strict=True):
        if not allowed:
            missing.setdefault(f"{what}/{part}".rstrip("/"), []).append(verb)
    if not missing:
        return Check("rights", Mark.OK, f"all {len(asked)} that are needed")
    told = "; ".join(f"{what} ({', '.join(verbs)})" for what, verbs in missing.items())
    return Check(
        "rights", Mark.FAIL, f"missing: {told}",
        f"ask who runs the cluster for them in namespace {scene.namespace}, or choose another --context",
    )  # fmt: skip


async def _namespace(scene: Scene) -> Check:
    if scene.space is None:
        return Check("namespace", Mark.OK, f"{scene.namespace} will be made")
    if scene.space["metadata"].get("deletionTimestamp"):
        return Check(
            "namespace", Mark.FAIL, f"{scene.namespace} is being deleted",
            f"wait until it is gone: kubectl get namespace {scene.namespace} --watch",
        )  # fmt: skip
    return Check("namespace", Mark.OK, f"{scene.namespace} exists")


async def _security(scene: Scene) -> Check:
    labels = (scene.space or {}).get("metadata", {}).get("labels") or {}
    level = labels.get("pod-security.kubernetes.io/enforce", "")
    needs = next((pods.privileged for pods in scene.wanted.pods if pods.privileged), "")
    if needs and level in ("restricted", "baseline"):
        return Check(
            "pod security", Mark.FAIL, f"the namespace enforces {level}, and the engines ask for {needs}",
            f"label it: kubectl label namespace {scene.namespace} pod-security.kubernetes.io/enforce=privileged "
            "--overwrite; or, where nodes let any process lock memory, --set engines.rdma.ipcLock=false",
        )  # fmt: skip
    told = f"the engines ask for {needs}" if needs else "the pods keep to the restricted level"
    return Check("pod security", Mark.OK, f"{told}; the namespace enforces {level or 'nothing of its own'}")


def _short(resource: str) -> str:
    return "GPUs" if resource.endswith("gpu") else resource


async def _devices(scene: Scene) -> Check:
    wanted = scene.wanted
    if not (await scene.cluster.allowed("list", "nodes") and await scene.cluster.allowed("list", "pods")):
        asked = ", ".join(f"{wanted.total(one):.0f} {_short(one)}" for one in wanted.devices)
        return Check("room on nodes", Mark.UNKNOWN, f"{asked} wanted; no right to list nodes and all pods")
    nodes, pods = await asyncio.gather(scene.cluster.list(paths.NODES), scene.cluster.list("/api/v1/pods"))
    free = rooms(nodes, pods, scene.namespace)
    told = []
    for name in wanted.devices:
        has = sum(max(0.0, room.free.get(name, 0.0)) for room in free)
        at = sum(1 for room in free if room.free.get(name, 0.0) > 0)
        told.append(f"{wanted.total(name):.0f} {_short(name)} wanted, {has:.0f} free on {at} nodes")
    missing = without_room(wanted, free)
    if not missing:
        return Check("room on nodes", Mark.OK, "; ".join(told))
    lacking = ", ".join(f"{count} {role}" for role, count in missing.items())
    return Check(
        "room on nodes", Mark.WARN, f"{'; '.join(told)}: {lacking} pods find no place now",
        "they wait until nodes come; or ask for less: --prefill, --decode",
    )  # fmt: skip


async def _rdma(scene: Scene) -> Check | None:
    others = [name for name in scene.wanted.devices if not name.endswith("gpu")]
    if not others or not await scene.cluster.allowed("list", "nodes"):
        return None
    nodes = await scene.cluster.list(paths.NODES)
    for name in others:
        if not any(quantity((node["status"].get("allocatable") or {}).get(name, "0")) > 0 for node in nodes):
            known = sorted({one for node in nodes for one in node["status"].get("allocatable") or {} if "/" in one})
            return Check(
                "RDMA", Mark.FAIL, f"no node has {name}; nodes have {', '.join(known) or 'no devices'}",
                "name the device plugin's resource: --set engines.rdma.resourceName=…; or --network none",
            )  # fmt: skip
    return Check("RDMA", Mark.OK, f"nodes have {', '.join(others)}")


async def _secrets(scene: Scene) -> Check | None:
    names = list(scene.wanted.secrets)
    token = scene.wanted.token_secret
    if not names and not scene.token:
        return None
    if scene.token and token is None:
        return Check("token", Mark.OK, "HF_TOKEN is set, but these values name no Secret for it; it is not used")
    told, missing = [], []
    for name in names:
        there = scene.space is not None and await _exists(scene, name)
        if token is not None and name == token[0] and scene.token:
            told.append(f"{name} from HF_TOKEN")
        elif there:
            told.append(f"{name} exists")
        else:
            missing.append(name)
    if not missing:
        return Check("Secrets", Mark.OK, ", ".join(told))
    fix = f"make {', '.join(missing)} in namespace {scene.namespace}"
    if token is not None and token[0] in missing:
        fix = f"set HF_TOKEN in the environment, and pdctl makes {token[0]}; or make it with the key {token[1]}"
    return Check("Secrets", Mark.FAIL, f"there is no {', '.join(missing)}, without which pods do not start", fix)


async def _exists(scene: Scene, name: str) -> bool:
    try:
        return await scene.cluster.find(paths.namespaced("secrets", scene.namespace, name)) is not None
    except ApiError as error:
        if error.status == 403:
            return True  # cannot be told; the pods will tell
        raise


async def _storage(scene: Scene) -> Check | None:
    claims = scene.wanted.claims
    if not claims or not await scene.cluster.allowed("list", "storageclasses", group="storage.k8s.io"):
        return None
    classes = await scene.cluster.list("/apis/storage.k8s.io/v1/storageclasses")
    names = [one["metadata"]["name"] for one in classes]
    mark = "storageclass.kubernetes.io/is-default-class"
    default = [one for one in classes if (one["metadata"].get("annotations") or {}).get(mark) == "true"]
    for claim in claims:
        if claim.storage_class and claim.storage_class not in names:
            return Check(
                "storage", Mark.FAIL, f"there is no storage class {claim.storage_class}; there are {', '.join(names)}",
                "correct engines.cache.storageClassName",
            )  # fmt: skip
        if not claim.storage_class and not default:
            return Check(
                "storage", Mark.FAIL, f"claim {claim.name} names no storage class, and the cluster has no default one",
                f"--set engines.cache.storageClassName=… ({', '.join(names) or 'there is none at all'})",
            )  # fmt: skip
    return Check("storage", Mark.OK, ", ".join(f"{one.name}: {one.access}" for one in claims))


async def _quota(scene: Scene) -> Check | None:
    if scene.space is None or not await scene.cluster.allowed("list", "resourcequotas", scene.namespace):
        return None
    quotas = await scene.cluster.list(f"/api/v1/namespaces/{scene.namespace}/resourcequotas")
    short = []
    for quota in quotas:
        hard = (quota.get("status") or {}).get("hard") or {}
        for name, text in hard.items():
            resource = name.removeprefix("requests.").removeprefix("limits.")
            pods = sum(one.count for one in scene.wanted.pods)
            asked = float(pods) if resource == "pods" else scene.wanted.total(resource)
            if asked > quantity(text):
                short.append(f"{quota['metadata']['name']} allows {text} of {name}, wanted are {asked:g}")
    if short:
        return Check("quota", Mark.WARN, "; ".join(short), "have it raised, or ask for less: --prefill, --decode")
    return Check("quota", Mark.OK, f"{len(quotas)} in the namespace, large enough") if quotas else None


async def _model(scene: Scene) -> Check | None:
    """Ask the hub whether the model is given to the token. The token goes to the hub's own address only, by header."""
    model, hub = scene.wanted.model, os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    if "/" not in model or model.startswith(("/", ".")):
        return None
    headers = {"authorization": f"Bearer {scene.token}"} if scene.token else {}
    try:
        async with httpx.AsyncClient(timeout=HUB_SECONDS) as client:
            answer = await client.head(f"{hub}/{model}/resolve/main/config.json", headers=headers)
    except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError) as error:
        return Check("model", Mark.UNKNOWN, f"{hub} cannot be reached from here ({type(error).__name__})")
    if answer.status_code in (401, 403):
        if not scene.token and scene.wanted.token_secret is not None:
            return Check(
                "model", Mark.UNKNOWN, f"{model} is gated; whether the Secret's token opens it is not known here"
            )
        return Check(
            "model", Mark.FAIL,
            f"the hub does not give {model} {'to this token' if scene.token else 'without a token'} "
            f"({answer.status_code})",
            f"ask for access at {hub}/{model}, then set HF_TOKEN to a token of that account",
        )  # fmt: skip
    if answer.status_code == 404:
        return Check("model", Mark.FAIL, f"the hub has no model {model}", "correct engines.model.name")
    if answer.status_code >= 400:
        return Check("model", Mark.UNKNOWN, f"{hub} answers {answer.status_code}")
    return Check("model", Mark.OK, f"the hub gives {model}")


async def _image(scene: Scene) -> Check | None:
    local = sorted({pods.image for pods in scene.wanted.pods if pods.image.startswith("localhost/")})
    if not local:
        return None
    return Check(
        "images", Mark.WARN, f"{', '.join(local)}: nodes must hold it already, no registry is called localhost",
        "push the image and name it: --set router.image.repository=…",
    )  # fmt: skip


async def preflight(scene: Scene) -> list[Check]:
    """Make all checks at once."""

    async def safe(check: Awaitable[Check | None], name: str) -> Check | None:
        try:
            return await check
        except ApiError as error:
            return Check(name, Mark.UNKNOWN, error.cause)

    version = ".".join(map(str, scene.helm.version))
    found = await asyncio.gather(
        *(
            safe(check(scene), check.__name__.strip("_"))
            for check in (
                _version, _rights, _namespace, _security, _devices, _rdma, _secrets, _storage, _quota, _model, _image,
            )
        )
    )  # fmt: skip
    return [Check("helm", Mark.OK, f"{version} ({scene.helm.program})"), *(one for one in found if one is not None)]
