"""`make e2e`: a deployment's life by pdctl on real kubelets, where probes, grace, restarts, Services and DNS are real.

The engines are simulated ones in an image that takes vLLM's command line, the router is its image as it ships. The
tests follow one deployment through its life, in their order.
"""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from pdctl.cluster.releases import ENGINES, ROUTER
from support.processes import until
from support.requests import CHAT

from .commands import VALUES, Pdctl
from .control_plane import ClusterError
from .fake_nodes import fake_nodes
from .real_nodes import RealCluster, left_over, real_cluster, why_not
from .releases import ENGINES as TINY
from .releases import MODEL, Releases
from .served import ENGINES_OF, ROUTER_OF, Served
from .slots import beyond
from .test_pdctl_story import everything

pytestmark = pytest.mark.timeout(900)  # images are built for it

NAMESPACE = "e2e"
SMALL: dict[str, Any] = {
    "requests": {"cpu": "10m", "memory": "64Mi"},
    "limits": {"cpu": "2", "memory": "400Mi"},
}
"""Real nodes have this machine's CPUs and memory."""
OF_ROLE = {role: f"{ENGINES}-llm-d-modelservice-{role}" for role in ("prefill", "decode")}
PORTS = {"prefill": 8000, "decode": 8200}


class OnRealNodes(Served):
    """A deployment that is called by its Service, as a client in the cluster does."""

    @property
    def url(self) -> str:
        """Address of the router's Service."""
        service = self.releases.cluster.api.get(f"/api/v1/namespaces/{self.releases.namespace}/services/{self.router}")
        return f"http://{service.json()['spec']['clusterIP']}:10001"

    def knows(self, router: str) -> set[str]:
        """Its admin port listens on the pod's loopback address only, which a port-forward reaches."""
        [name] = [
            one["metadata"]["name"] for one in self.releases.pods(self.router) if one["status"]["podIP"] == router
        ]
        with self.releases.forwarded(f"pod/{name}", 29001) as url:
            workers = httpx.get(f"{url}/list_workers", trust_env=False).json()["workers"]
        return {httpx.URL(one["url"]).host for one in workers if one["healthy"]}

    def chat(self, text: str = "return value ", **more: Any) -> httpx.Response:
        """Ask as a client does."""
        body = {"model": MODEL, "messages": [{"role": "user", "content": text * 300}], "max_tokens": 8, **more}
        return httpx.post(self.url + CHAT, json=body, timeout=60, trust_env=False)

    def fault(self, role: str, address: str | None = None, **fault: Any) -> None:
        """Ask for a fault of one engine, or of all of a role."""
        for one in [address] if address else self.releases.addresses(self.engines, role):
            told = httpx.post(f"http://{one}:{PORTS[role]}/sim/fault", json=fault, timeout=10, trust_env=False)
            assert told.status_code == 200, told.text

    def alter(self, role: str, **container: Any) -> None:
        """Give a role's pods another container behind the back of Helm, and wait until all have it."""
        told = {"spec": {"template": {"spec": {"containers": [{"name": "vllm", **container}]}}}}
        self.patch(f"deployment/{OF_ROLE[role]}", told)
        self.releases.kubectl("rollout", "status", f"deployment/{OF_ROLE[role]}", seconds=120)
        self.until_known(4, 4)

    def patch(self, what: str, patch: Any, kind: str = "strategic") -> None:
        """Change an object behind the back of Helm."""
        self.releases.kubectl("patch", what, f"--type={kind}", "-p", json.dumps(patch))


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
def before(real: RealCluster) -> set[str]:
    """Give each object that there is before the deployment."""
    return everything(real, NAMESPACE)


@pytest.fixture(scope="module")
def pdctl(real: RealCluster, before: set[str], tmp_path_factory: pytest.TempPathFactory) -> Pdctl:
    """Give pdctl with 4 prefill and 4 decode engines and 2 routers deployed."""
    made = Pdctl(real, tmp_path_factory.mktemp("pdctl"), NAMESPACE)
    images = {of: dict(zip(("repository", "tag"), real.images[of].rsplit(":", 1), strict=True)) for of in real.images}
    roles = {role: {"resources": SMALL, "maxUnavailable": 2} for role in PORTS}
    values = made.values(
        engines={"image": images["simulator"], **roles},
        router={
            "image": images["router"],
            "replicas": 2,
            "resources": SMALL,
            # Until kube-proxy has heard of it, on a busy machine.
            "shutdown": VALUES["router"]["shutdown"] | {"leaveSeconds": 3},
        },
    )
    deployed = made.deploy(prefill=4, decode=4, values=values)
    deployed.says(0, f"ready http://{ROUTER}", "prefill 4/4 decode 4/4 router 2/2")
    return made


@pytest.fixture(scope="module")
def served(pdctl: Pdctl) -> OnRealNodes:
    """Give the deployment as clients see it, when the routers know all engines."""
    made = OnRealNodes(Releases(pdctl.plane, NAMESPACE), ENGINES, ROUTER)
    made.until_known(4, 4)
    return made


def test_a_chat_by_the_routers_service_is_answered_and_helm_test_sees_kv_move(served: OnRealNodes) -> None:
    answer = served.chat()
    assert answer.status_code == 200, answer.text
    told = served.releases.helm("test", ROUTER, "--logs").stdout
    assert "Phase:          Succeeded" in told


def test_a_bench_through_a_forward_and_doctor_find_all_well(pdctl: Pdctl, served: OnRealNodes) -> None:
    bench = pdctl.run("bench", "80", "8", "--input-len", "200", "--output-len", "10", "--output", "bench.json")
    bench.says(0, "SIMULATED engines", "Successful requests:                     80")
    pdctl.run("doctor").says(
        0, "ok versions all engines are vLLM", "ok router → engines all 2 routers find all 8 well",
        "ok RDMA no pod asks for it", "ok Services", "ok KV moves", "ok transfers", "ok ways", "ok logs", "ok restarts",
        "ok router's rights",
    )  # fmt: skip


def test_a_deleted_decode_pod_costs_no_request(served: OnRealNodes) -> None:
    here = served.releases

    async def work() -> None:
        pod = here.pods(ENGINES, "decode")[0]["metadata"]["name"]
        await asyncio.to_thread(here.kubectl, "delete", "pod", pod)
        await asyncio.to_thread(here.until_ready, ENGINES, 8)
        await asyncio.to_thread(served.until_known, 4, 4)

    served.under_load(work)


def test_a_decode_engine_that_the_system_kills_for_its_memory_costs_no_request(served: OnRealNodes) -> None:
    pod = served.releases.pods(ENGINES, "decode")[0]

    async def work() -> None:
        await asyncio.sleep(1)
        await asyncio.to_thread(_out_of_memory, served, "decode", pod)
        await asyncio.to_thread(served.until_known, 4, 4)

    served.under_load(work)


def _out_of_memory(served: OnRealNodes, role: str, pod: dict[str, Any]) -> None:
    with pytest.raises(httpx.HTTPError):
        served.fault(role, pod["status"]["podIP"], kind="allocate", bytes=2**30)
    served.releases.until_restarted(pod, 1, "OOMKilled")


def test_scaling_and_a_rollout_of_all_engines_cost_no_request(pdctl: Pdctl, served: OnRealNodes) -> None:
    here = served.releases
    before = {one["metadata"]["uid"] for one in here.pods(ENGINES)}

    async def work() -> None:
        fewer = await asyncio.to_thread(pdctl.run, "scale", "decode=3")
        fewer.says(0, "decode: 4 → 3", "decode 3/3")
        more = await asyncio.to_thread(pdctl.run, "rollout", "--set", "engines.args={--max-num-seqs=512}")
        more.says(0, "ready ")
        (await asyncio.to_thread(pdctl.run, "scale", "decode=4")).says(0, "decode 4/4")
        await asyncio.to_thread(served.until_known, 4, 4)

    served.under_load(work)
    assert not before & {one["metadata"]["uid"] for one in here.pods(ENGINES)}


def test_a_rollout_of_the_routers_costs_no_request(pdctl: Pdctl, served: OnRealNodes) -> None:
    before = {one["metadata"]["uid"] for one in served.releases.pods(ROUTER)}

    async def work() -> None:
        (await asyncio.to_thread(pdctl.run, "rollout", "--restart", "router")).says(0, "ready ", "router 2/2")

    served.under_load(work)
    assert not before & {one["metadata"]["uid"] for one in served.releases.pods(ROUTER)}


def test_doctor_finds_a_restarted_prefill_engine_that_decode_engines_no_longer_reach(
    pdctl: Pdctl, served: OnRealNodes
) -> None:
    _out_of_memory(served, "prefill", served.releases.pods(ENGINES, "prefill")[0])
    served.until_known(4, 4)
    for number in range(16):  # of one user, so both routers send them the same way, and learn how long it takes
        assert served.chat(f"return {number} ", user="ann", stream=True).status_code == 200
    for address in served.releases.addresses(ENGINES, "prefill"):
        served.fault("decode", kind="edge", host=address, seconds=4)
    for number in range(16, 24):
        assert served.chat(f"return {number} ", user="ann", stream=True).status_code == 200
    pdctl.run("doctor").says(
        1, "warn restarts prefill-", "fail stale agents prefill-", "warn transfers decode-", "failed_transfers",
        "warn logs", "NIXL transfer failure: handshake_failed", "fail ways", "closed: prefill-", "slow: ",
        "rollout --namespace e2e --restart decode",
    )  # fmt: skip
    served.fault("decode", kind="none")


def test_doctor_finds_engines_that_the_router_does_not_reach(pdctl: Pdctl, served: OnRealNodes) -> None:
    address = served.releases.pods(ENGINES, "decode")[0]["status"]["podIP"]
    served.fault("decode", address, kind="refuse", seconds=45)
    router = next(iter(served.releases.addresses(ROUTER)))
    served.releases.cluster.until(lambda: address not in served.knows(router), "the router finds it ill")
    pdctl.run("doctor").says(1, "fail router → engines decode-", "does not answer", "NetworkPolicy")
    unready = served.releases.cluster.until
    unready(lambda: address not in served.releases.addresses(ENGINES, "decode"), "its probe has failed")
    pdctl.run("doctor").says(1, "fail parts decode-")
    served.until_known(4, 4)


def test_doctor_finds_a_service_without_pods_and_a_router_without_rights(pdctl: Pdctl, served: OnRealNodes) -> None:
    service = f"service/{OF_ROLE['decode']}"
    served.patch(service, {"spec": {"selector": {"planted": "yes"}}})
    served.releases.kubectl("delete", "role", ROUTER)
    pdctl.run("doctor").says(
        1, f"fail Services {OF_ROLE['decode']} has 0 of 4 ready decode pods", "fail router's rights",
        f"{ROUTER} may not watch EndpointSlices",
    )  # fmt: skip
    served.patch(service, {"spec": {"selector": {"planted": None}}})


def test_doctor_finds_pods_without_their_rdma_devices_slow_transfers_and_a_namespace_that_lets_none_in(
    pdctl: Pdctl, served: OnRealNodes
) -> None:
    pdctl.run("rollout", "--restart", "router").says(0, "ready ")  # and the router's rights are back
    api = served.releases.cluster.api
    for node in ("gpu-0", "gpu-1"):  # a device plugin that gives out what is not there
        patch = [
            {"op": "add", "path": f"/status/{part}/rdma~1ib", "value": "8"} for part in ("capacity", "allocatable")
        ]
        kind = {"Content-Type": "application/json-patch+json"}
        api.patch(f"/api/v1/nodes/{node}/status", json=patch, headers=kind).raise_for_status()
    served.alter("decode", resources={"limits": {"rdma/ib": "1"}})
    served.fault("decode", kind="link", factor=50)
    bench = pdctl.run("bench", "24", "4", "--input-len", "1000", "--output-len", "2")
    bench.says(0, "Successful requests:                     24")
    # What the next pods would have: none comes while the Deployment is paused.
    locking = {"name": "vllm", "securityContext": {"capabilities": {"add": ["IPC_LOCK"]}}}
    served.patch(
        f"deployment/{OF_ROLE['prefill']}",
        {"spec": {"paused": True, "template": {"spec": {"containers": [locking]}}}},
    )
    served.releases.kubectl("label", "namespace", NAMESPACE, "pod-security.kubernetes.io/enforce=restricted")
    pdctl.run("doctor").says(
        1, "fail RDMA decode-", "of 8 asked for rdma/ib and have nothing in /sys/class/infiniband",
        "warn speed of KV 0.", "rdma/ib is asked for, and this is what TCP does", "UCX_NET_DEVICES",
        "fail pod security the namespace enforces restricted", "asks for IPC_LOCK",
    )  # fmt: skip
    served.releases.kubectl("label", "namespace", NAMESPACE, "pod-security.kubernetes.io/enforce-")


def test_doctor_finds_decode_engines_that_read_no_kv_and_engines_of_another_version(
    pdctl: Pdctl, served: OnRealNodes
) -> None:
    flags = VALUES["engines"]["env"]["PD_SIM_FLAGS"]
    served.alter("decode", env=[{"name": "PD_SIM_FLAGS", "value": f"{flags} --no-kv-connector"}])
    assert served.chat("def no(): ").status_code == 200
    pdctl.run("doctor").says(
        1, "fail KV moves", "decode engines read no KV: they compute all again", "logs decode --namespace e2e --grep"
    )
    served.alter("decode", env=[{"name": "PD_SIM_FLAGS", "value": f"{flags} --vllm-version=0.31.0"}])
    pdctl.run("doctor").says(1, "fail versions engines differ", "0.31.0: decode-")


def test_cleanup_leaves_nothing_of_it_in_the_cluster(pdctl: Pdctl, before: set[str]) -> None:
    cleaned = pdctl.run("cleanup", "-y", "--delete-namespace")
    cleaned.says(0, f"goes   release {ENGINES}", f"gone: {NAMESPACE}")
    assert everything(pdctl.plane, NAMESPACE) == before


def test_engines_on_fake_and_on_real_nodes_serve_under_one_control_plane(real: RealCluster) -> None:
    image = {of: dict(zip(("repository", "tag"), real.images[of].rsplit(":", 1), strict=True)) for of in real.images}
    releases = Releases(real, "mixed")
    releases.kubectl("create", "namespace", "mixed")
    served = OnRealNodes(releases, ENGINES_OF, ROUTER_OF)
    on = {
        role: {"replicas": 1, "resources": SMALL, "nodeSelector": {"kubernetes.io/hostname": node}}
        for role, node in (("prefill", "fake-0"), ("decode", "gpu-0"))
    }
    with fake_nodes(real, real.slot, ["fake-0"], beyond(real.slot)):
        releases.helm("install", ENGINES_OF, "charts/pd-engines", values=TINY | {"image": image["simulator"]} | on)
        releases.router(ROUTER_OF, ENGINES_OF, image=image["router"], resources=SMALL)
        releases.until_ready(ENGINES_OF, 2)
        releases.until_ready(ROUTER_OF, 1)
        served.until_known(1, 1)
        assert served.chat().status_code == 200
        [decode] = releases.addresses(ENGINES_OF, "decode")
        transfers = httpx.get(f"http://{decode}:8200/sim/state", trust_env=False).json()["transfers"]
        assert [way["transfers"] for way in transfers] == [1], "KV went from the fake node to the real one"
        for pod in releases.pods(ENGINES_OF):
            assert releases.kubectl("logs", pod["metadata"]["name"])
        releases.kubectl("delete", "namespace", "mixed")
