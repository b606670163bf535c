"""What only a cluster can have wrong: Services without endpoints, levels of security, rights, RDMA devices."""

import asyncio
from typing import Any

from pdctl.check import Check, Mark
from pdctl.cluster import paths
from pdctl.cluster.api import ApiError, Cluster, Unreachable
from pdctl.cluster.execute import execute
from pdctl.cluster.observe import PART
from pdctl.cluster.screen import short
from pdctl.errors import PdctlError
from pdctl.podstate import Phase, Pod, read_pod

_DEVICES = "/sys/class/infiniband"  # where drivers of InfiniBand, RoCE and EFA name their devices
_LIST = "import os, sys; there = sys.argv[1]; print(*(os.listdir(there) if os.path.isdir(there) else ()))"


async def _endpoints(cluster: Cluster, namespace: str) -> Check:
    """Compare each Service's ready endpoints with the ready pods of its role."""
    slices, pods = await asyncio.gather(
        cluster.list(paths.namespaced("endpointslices", namespace), PART),
        cluster.list(paths.namespaced("pods", namespace), PART),
    )
    ready: dict[str, set[str]] = {}
    for one in slices:
        service = one["metadata"]["labels"].get("kubernetes.io/service-name", "")
        those = ready.setdefault(service, set())
        for endpoint in one.get("endpoints") or ():
            if (endpoint.get("conditions") or {}).get("ready"):
                those |= set(endpoint["addresses"])
    there: dict[str, set[str]] = {}
    for pod in map(read_pod, pods):
        if pod.phase is Phase.READY:
            there.setdefault(pod.role, set()).add(pod.ip)
    wrong = []
    for service, addresses in sorted(ready.items()):
        role = next((role for role in ("prefill", "decode") if service.endswith(role)), "router")
        missing = there.get(role, set()) - addresses
        if missing or not addresses:
            wrong.append(f"{service} has {len(addresses)} of {len(there.get(role, set()))} ready {role} pods")
    if not slices:
        wrong = ["there are no EndpointSlices at all"]
    if wrong:
        return Check(
            "Services", Mark.FAIL, "; ".join(wrong),
            f"see kubectl get endpointslices -n {namespace}: controllers make them of the Services' selectors",
        )  # fmt: skip
    told = ", ".join(f"{service} {len(addresses)}" for service, addresses in sorted(ready.items()))
    return Check("Services", Mark.OK, f"all ready pods are behind them: {told}")


async def _security(cluster: Cluster, namespace: str, deployments: list[Any]) -> Check:
    space = await cluster.get(f"{paths.NAMESPACES}/{namespace}")
    level = (space["metadata"].get("labels") or {}).get("pod-security.kubernetes.io/enforce", "")
    for thing in deployments:
        container = thing["spec"]["template"]["spec"]["containers"][0]
        added = ((container.get("securityContext") or {}).get("capabilities") or {}).get("add") or ()
        if added and level in ("restricted", "baseline"):
            return Check(
                "pod security", Mark.FAIL, f"the namespace enforces {level}, and {thing['metadata']['name']} asks for "
                f"{', '.join(added)}: no new pod is let in",
                f"kubectl label namespace {namespace} pod-security.kubernetes.io/enforce=privileged --overwrite",
            )  # fmt: skip
    return Check("pod security", Mark.OK, f"the namespace enforces {level or 'nothing of its own'}")


async def _router_rights(cluster: Cluster, namespace: str, deployments: list[Any]) -> Check:
    for thing in deployments:
        if thing["metadata"]["labels"].get("app.kubernetes.io/name") != "pd-router":
            continue
        if thing["spec"].get("replicas") == 0:
            return Check("router's rights", Mark.OK, "another router serves")
        account = thing["spec"]["template"]["spec"].get("serviceAccountName", "default")
        review = {
            "apiVersion": "authorization.k8s.io/v1", "kind": "SubjectAccessReview", "metadata": {"name": ""},
            "spec": {
                "user": f"system:serviceaccount:{namespace}:{account}",
                "groups": ["system:serviceaccounts", f"system:serviceaccounts:{namespace}", "system:authenticated"],
                "resourceAttributes": {
                    "verb": "watch", "resource": "endpointslices", "group": "discovery.k8s.io", "namespace": namespace,
                },
            },
        }  # fmt: skip
        try:
            told = await cluster.create("/apis/authorization.k8s.io/v1/subjectaccessreviews", review)
        except ApiError:
            return Check("router's rights", Mark.UNKNOWN, "no right to ask for them")
        if told["status"].get("allowed"):
            return Check("router's rights", Mark.OK, f"{account} may watch EndpointSlices")
        return Check(
            "router's rights", Mark.FAIL, f"{account} may not watch EndpointSlices, so no engine is found",
            "let the chart make its Role (router.rbac.create=true), or bind one",
        )  # fmt: skip
    return Check("router's rights", Mark.FAIL, "there is no router", f"pdctl deploy --namespace {namespace}")


def rdma_resource(deployments: list[Any]) -> str:
    """Give the resource by which engines ask for RDMA devices, empty for none."""
    for thing in deployments:
        if thing["metadata"]["labels"].get("llm-d.ai/role"):
            limits = (thing["spec"]["template"]["spec"]["containers"][0].get("resources") or {}).get("limits") or {}
            for name in limits:
                if "/" in name and not name.endswith("gpu"):
                    return str(name)
    return ""


async def _rdma(cluster: Cluster, namespace: str, deployments: list[Any]) -> Check:
    """Look into each engine for the devices that its pod asks for."""
    resource = rdma_resource(deployments)
    if not resource:
        return Check("RDMA", Mark.OK, "no pod asks for it: KV goes over TCP")
    pods = [
        pod for pod in map(read_pod, await cluster.list(paths.namespaced("pods", namespace), PART))
        if pod.phase is Phase.READY and pod.role in ("prefill", "decode")
    ]  # fmt: skip

    async def devices(pod: Pod) -> list[str] | PdctlError:
        try:
            said = await execute(cluster, namespace, pod.name, "vllm", ("python3", "-c", _LIST, _DEVICES))
        except (ApiError, Unreachable) as error:
            return error
        return said.split()

    found = dict(zip(pods, await asyncio.gather(*map(devices, pods)), strict=True))
    without = [short(pod) for pod, told in found.items() if told == []]
    if without:
        return Check(
            "RDMA", Mark.FAIL, f"{', '.join(without[:4])} of {len(pods)} asked for {resource} and have nothing in "
            f"{_DEVICES}: KV does not go over RDMA", "see that the device plugin of that resource mounts its devices: "
            f"kubectl describe node, kubectl logs of the plugin; or --network none (namespace {namespace})",
        )  # fmt: skip
    seen = [told for told in found.values() if isinstance(told, list)]
    if len(seen) < len(pods) or not pods:
        why = next((told.cause for told in found.values() if isinstance(told, PdctlError)), "no engine is ready")
        return Check("RDMA", Mark.UNKNOWN, f"{resource} is asked for; the pods cannot be looked into: {why}")
    return Check("RDMA", Mark.OK, f"{resource}: all {len(pods)} engines see {len(seen[0])} devices: {seen[0][0]}, …")


async def look(cluster: Cluster, namespace: str, deployments: list[Any]) -> list[Check]:
    """Make all checks at once."""
    return list(
        await asyncio.gather(
            _endpoints(cluster, namespace),
            _security(cluster, namespace, deployments),
            _router_rights(cluster, namespace, deployments),
            _rdma(cluster, namespace, deployments),
        )
    )
