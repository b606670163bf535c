"""`make e2e`: the charts on real kubelets and containers, where probes, grace, restarts, Services and DNS are real.

The engines are simulated ones in an image that takes vLLM's command line, the router is its image as it ships. The
tests follow one deployment through its life, in their order.
"""

import asyncio
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from support.processes import until
from support.requests import CHAT

from .control_plane import ClusterError
from .real_nodes import RealCluster, left_over, real_cluster, why_not
from .releases import ENGINES, MODEL, ROUTER, Releases
from .served import ENGINES_OF, ROUTER_OF, Served

pytestmark = pytest.mark.timeout(900)  # images are built for it

SMALL: dict[str, Any] = {
    "requests": {"cpu": "10m", "memory": "64Mi"},
    "limits": {"cpu": "2", "memory": "400Mi"},
}
"""Real nodes have this machine's CPUs and memory."""
KINDS = "all,configmaps,secrets,serviceaccounts,roles,rolebindings,networkpolicies,pdb,endpointslices,pvc,hpa"


class OnRealNodes(Served):
    """A deployment that is called by its Service, as a client in the cluster does."""

    @property
    def url(self) -> str:
        """Address of the router's Service."""
        service = self.releases.cluster.api.get(f"/api/v1/namespaces/{self.releases.namespace}/services/{ROUTER_OF}")
        return f"http://{service.json()['spec']['clusterIP']}:10001"

    def knows(self, router: str) -> set[str]:
        """Its admin port listens on the pod's loopback address only, which a port-forward reaches."""
        [name] = [one["metadata"]["name"] for one in self.releases.pods(ROUTER_OF) if one["status"]["podIP"] == router]
        with self.releases.forwarded(f"pod/{name}", 29001) as url:
            workers = httpx.get(f"{url}/list_workers", trust_env=False).json()["workers"]
        return {httpx.URL(one["url"]).host for one in workers if one["healthy"]}


def image(cluster: RealCluster, of: str) -> dict[str, str]:
    repository, _, tag = cluster.images[of].rpartition(":")
    return {"repository": repository, "tag": tag}


def engines(cluster: RealCluster, **values: Any) -> dict[str, Any]:
    roles = {role: {"replicas": 4, "resources": SMALL, "maxUnavailable": 2} for role in ("prefill", "decode")}
    return ENGINES | {"image": image(cluster, "simulator")} | roles | values


@pytest.fixture(scope="module")
def real() -> Iterator[RealCluster]:
    """Give two nodes with real kubelets; where they cannot be had, the reason is told."""
    if reason := why_not():
        pytest.skip(reason)
    try:
        with real_cluster() as cluster:
            yield cluster
    except ClusterError as error:
        pytest.fail(str(error), pytrace=False)
    until(lambda: left_over(cluster.folder, cluster.slot) == [], 60, "no mount, link, control group or process is left")


@pytest.fixture(scope="module")
def served(real: RealCluster) -> OnRealNodes:
    """Give 4 prefill and 4 decode engines and 2 routers, deployed by the charts and Ready."""
    real.api.post("/api/v1/namespaces", json={"metadata": {"name": "e2e"}}).raise_for_status()
    here = Releases(real, "e2e")
    real.until(
        lambda: real.api.get("/api/v1/namespaces/e2e/serviceaccounts/default").is_success, "the namespace is complete"
    )
    here.helm("install", ENGINES_OF, "charts/pd-engines", values=engines(real))
    router = ROUTER | {
        "image": image(real, "router"),
        "replicas": 2,
        "resources": SMALL,
        "engines": {"release": ENGINES_OF},
    }
    here.helm("install", ROUTER_OF, "charts/pd-router", values=router)
    here.until_ready(ENGINES_OF, 8)
    here.until_ready(ROUTER_OF, 2)
    made = OnRealNodes(here)
    made.until_known(4, 4)
    return made


def test_a_chat_by_the_routers_service_is_answered_and_helm_test_sees_kv_move(served: OnRealNodes) -> None:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "return value " * 300}], "max_tokens": 8}
    answer = httpx.post(served.url + CHAT, json=body, timeout=60, trust_env=False)
    assert answer.status_code == 200, answer.text
    told = served.releases.helm("test", ROUTER_OF, "--logs").stdout
    assert "Phase:          Succeeded" in told


def test_a_deleted_decode_pod_costs_no_request(served: OnRealNodes) -> None:
    here = served.releases

    async def work() -> None:
        pod = here.pods(ENGINES_OF, "decode")[0]["metadata"]["name"]
        await asyncio.to_thread(here.kubectl, "delete", "pod", pod)
        await asyncio.to_thread(here.until_ready, ENGINES_OF, 8)
        await asyncio.to_thread(served.until_known, 4, 4)

    served.under_load(work)


def test_a_decode_engine_that_the_system_kills_for_its_memory_costs_no_request(served: OnRealNodes) -> None:
    here = served.releases
    pod = here.pods(ENGINES_OF, "decode")[0]

    async def work() -> None:
        await asyncio.sleep(1)
        fault = {"kind": "allocate", "bytes": 2**30}
        async with httpx.AsyncClient(trust_env=False) as client:
            with pytest.raises(httpx.HTTPError):
                await client.post(f"http://{pod['status']['podIP']}:8200/sim/fault", json=fault)
        await asyncio.to_thread(here.until_restarted, pod, 1, "OOMKilled")
        await asyncio.to_thread(served.until_known, 4, 4)

    served.under_load(work)


def test_a_rollout_of_all_engines_costs_no_request(served: OnRealNodes, real: RealCluster) -> None:
    here = served.releases
    before = {one["metadata"]["uid"] for one in here.pods(ENGINES_OF)}

    async def work() -> None:
        changed = engines(real, args=["--max-num-seqs=512"])
        await asyncio.to_thread(here.helm, "upgrade", ENGINES_OF, "charts/pd-engines", values=changed)
        for role in ("prefill", "decode"):
            rollout = f"deployment/{ENGINES_OF}-pd-engines-{role}"
            await asyncio.to_thread(here.kubectl, "rollout", "status", rollout, seconds=180)
        await asyncio.to_thread(served.until_known, 4, 4)

    served.under_load(work)
    assert not before & {one["metadata"]["uid"] for one in here.pods(ENGINES_OF)}


def test_a_rollout_of_the_routers_costs_no_request(served: OnRealNodes) -> None:
    here = served.releases

    async def work() -> None:
        await asyncio.to_thread(here.kubectl, "rollout", "restart", f"deployment/{ROUTER_OF}")
        await asyncio.to_thread(here.kubectl, "rollout", "status", f"deployment/{ROUTER_OF}", seconds=120)

    served.under_load(work)


def test_an_uninstall_leaves_nothing_in_the_namespace(served: OnRealNodes) -> None:
    here = served.releases
    for release in (ROUTER_OF, ENGINES_OF):
        here.helm("uninstall", release, "--cascade", "foreground")
    left = ["configmap/kube-root-ca.crt", "serviceaccount/default"]
    here.cluster.until(lambda: sorted(here.kubectl("get", KINDS, "-o", "name").split()) == left, "nothing is left")
