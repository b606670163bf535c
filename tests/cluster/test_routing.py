"""The router beside a real API: it finds the engines of its release and follows what becomes of them."""

import asyncio

import httpx
import pytest

from support.requests import CHAT

from .control_plane import Cluster
from .releases import ENGINES, MODEL, ROUTER, Releases
from .served import ENGINES_OF, ROUTER_OF, Served


@pytest.fixture
def served(cluster: Cluster, namespace: str) -> Served:
    """Give 2 prefill and 3 decode engines behind a router, all from the charts, all Ready."""
    releases = Releases(cluster, namespace)
    releases.engines(ENGINES_OF, 2, 3)
    releases.router(ROUTER_OF, ENGINES_OF, config=ROUTER["config"] | {"log_level": "debug"})
    releases.until_ready(ENGINES_OF, 5)
    releases.until_ready(ROUTER_OF, 1)
    made = Served(releases)
    made.until_known(2, 3)
    return made


def test_a_chat_through_the_router_moves_kv_between_two_pods(served: Served) -> None:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "return value " * 300}], "max_tokens": 8}
    answer = httpx.post(served.url + CHAT, json=body, timeout=60, trust_env=False)
    assert answer.status_code == 200, answer.text
    moved = []
    for address in served.releases.addresses(ENGINES_OF, "decode"):
        moved += httpx.get(f"http://{address}:8200/sim/state", trust_env=False).json()["transfers"]
    assert [one["host"] in served.releases.addresses(ENGINES_OF, "prefill") for one in moved] == [True]
    served.releases.helm("test", ROUTER_OF, "--logs")


def test_deleted_pods_and_scaling_cost_no_request(served: Served) -> None:
    here = served.releases

    async def work() -> None:
        for role in ("decode", "prefill"):
            pod = here.pods(ENGINES_OF, role)[0]["metadata"]["name"]
            await asyncio.to_thread(here.kubectl, "delete", "pod", pod)
            await asyncio.to_thread(served.until_known, 2, 3)
        await asyncio.to_thread(here.kubectl, "scale", "deployment/ms-tiny-pd-engines-decode", "--replicas=5")
        await asyncio.to_thread(served.until_known, 2, 5)
        await asyncio.to_thread(here.kubectl, "scale", "deployment/ms-tiny-pd-engines-decode", "--replicas=2")
        await asyncio.to_thread(served.until_known, 2, 2)

    served.under_load(work)


def test_a_rollout_of_all_engines_costs_no_request(served: Served) -> None:
    here = served.releases
    before = {one["metadata"]["uid"] for one in here.pods(ENGINES_OF)}

    async def work() -> None:
        changed = ENGINES | {"args": ["--max-num-seqs=512"]}
        await asyncio.to_thread(here.engines, ENGINES_OF, 2, 3, **changed)
        for role in ("prefill", "decode"):
            await asyncio.to_thread(
                here.kubectl, "rollout", "status", f"deployment/ms-tiny-pd-engines-{role}", seconds=120
            )
        await asyncio.to_thread(served.until_known, 2, 3)

    served.under_load(work)
    assert not before & {one["metadata"]["uid"] for one in here.pods(ENGINES_OF)}


def test_decode_engines_that_are_killed_cost_no_request(served: Served) -> None:
    """Unlike an engine at a fixed address, such an engine also leaves the router's list, and comes back to it."""
    here = served.releases

    async def work() -> None:
        for _ in range(3):
            pod = here.pods(ENGINES_OF, "decode")[0]
            restarts = pod["status"]["containerStatuses"][0]["restartCount"]
            served.kill(pod)
            await asyncio.to_thread(here.until_restarted, pod, restarts + 1)
            await asyncio.to_thread(served.until_known, 2, 3)

    served.under_load(work)


def test_an_api_server_that_is_away_costs_no_request_and_what_changed_is_learned_afterwards(served: Served) -> None:
    here = served.releases
    plane = here.cluster

    async def work() -> None:
        plane.stop_api_server()
        plane.forget_history()  # so the router's watch cannot go on where it was: 410 Gone, list anew
        await asyncio.sleep(2)
        await asyncio.to_thread(plane.start_api_server)
        pod = here.pods(ENGINES_OF, "decode")[0]["metadata"]["name"]
        await asyncio.to_thread(here.kubectl, "delete", "pod", pod)
        await asyncio.to_thread(served.until_known, 2, 3)

    served.under_load(work)
    assert "no longer has the changes since the last one; reading all anew" in here.kubectl(
        "logs", f"deploy/{ROUTER_OF}"
    )


def test_a_router_without_its_role_says_which_rule_is_missing_and_is_not_ready(
    cluster: Cluster, namespace: str
) -> None:
    here = Releases(cluster, namespace)
    here.router(ROUTER_OF, ENGINES_OF, rbac={"create": False})

    def told() -> bool:
        done = cluster.run("kubectl", "-n", namespace, "logs", "-l", "app.kubernetes.io/component=router")
        return "resources: [endpointslices], verbs: [list, watch]" in done.stdout

    cluster.until(told, "the router's log names the rule")
    assert here.addresses(ROUTER_OF) == set()


def test_the_routers_account_may_read_endpointslices_of_its_namespace_and_nothing_else(
    cluster: Cluster, namespace: str
) -> None:
    here = Releases(cluster, namespace)
    here.router(ROUTER_OF, ENGINES_OF)
    account = f"system:serviceaccount:{namespace}:{ROUTER_OF}"
    assert here.own_rights(ROUTER_OF) == {("endpointslices.discovery.k8s.io", "[list", "watch]")}
    for question in (["get", "pods"], ["get", "secrets"], ["list", "endpointslices", "-n", "default"]):
        refused = cluster.run("kubectl", "-n", namespace, "auth", "can-i", *question, f"--as={account}")
        assert refused.stdout == "no\n"


def test_two_releases_in_one_namespace_keep_their_pods_apart(cluster: Cluster, namespace: str) -> None:
    here = Releases(cluster, namespace)
    here.engines("ms-one", 1, 1)
    here.engines("ms-two", 1, 2)
    here.router("router-one", "ms-one")
    here.until_ready("ms-one", 2)
    here.until_ready("ms-two", 3)
    here.until_ready("router-one", 1)
    [router] = here.addresses("router-one")
    workers = httpx.get(f"http://{router}:29001/list_workers", trust_env=False).json()["workers"]
    assert {httpx.URL(one["url"]).host for one in workers} == here.addresses("ms-one")
    sets = cluster.items(f"/apis/apps/v1/namespaces/{namespace}/replicasets")
    owners = {one["metadata"]["uid"]: one["metadata"]["labels"]["app.kubernetes.io/instance"] for one in sets}
    for release in ("ms-one", "ms-two"):
        for pod in here.pods(release):
            assert owners[pod["metadata"]["ownerReferences"][0]["uid"]] == release
    here.helm("uninstall", "ms-two", "--wait")
    assert len(here.pods("ms-one")) == 2
