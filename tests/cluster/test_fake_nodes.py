"""The fake nodes are a fair stand-in: what the other tests of this folder rely on."""

import httpx

from .control_plane import Cluster
from .releases import Releases, is_ready

PODS = "/api/v1/namespaces/{}/pods"


def test_sixteen_engines_of_the_shipped_size_fit_and_answer_at_their_pods_addresses(
    cluster: Cluster, namespace: str
) -> None:
    here = Releases(cluster, namespace)
    here.engines("ms-tiny", 8, 8)
    here.until_ready("ms-tiny", 16)
    for role, port in (("prefill", 8000), ("decode", 8200)):
        addresses = here.addresses("ms-tiny", role)
        assert len(addresses) == 8
        for address in addresses:
            state = httpx.get(f"http://{address}:{port}/sim/state", trust_env=False).json()
            assert (state["role"], state["model"], state["side_channel"]["host"]) == (role, "tiny", address)
    nodes = {one["spec"]["nodeName"] for one in here.pods("ms-tiny")}
    assert nodes == {"gpu-0", "gpu-1"}
    here.kubectl("scale", "deployment/ms-tiny-pd-engines-decode", "--replicas=9")
    cluster.until(lambda: "Insufficient nvidia.com/gpu" in here.kubectl("get", "events"), "there is no 17th GPU")


def test_an_engine_that_refuses_its_flags_restarts_and_its_last_words_are_in_the_pods_status(
    cluster: Cluster, namespace: str
) -> None:
    here = Releases(cluster, namespace)
    here.engines("ms-tiny", 0, 1, args=["--no-such-flag"])

    def crashing() -> bool:
        told = [one for pod in here.pods("ms-tiny") for one in pod["status"].get("containerStatuses", ())]
        return any(one["state"].get("waiting", {}).get("reason") == "CrashLoopBackOff" for one in told)

    cluster.until(crashing, "the engine is in CrashLoopBackOff")
    [pod] = here.pods("ms-tiny")
    [container] = pod["status"]["containerStatuses"]
    assert container["restartCount"] >= 1
    assert container["lastState"]["terminated"]["exitCode"] == 2
    assert "unrecognized arguments: --no-such-flag" in container["lastState"]["terminated"]["message"]
    assert "unrecognized arguments: --no-such-flag" in here.kubectl("logs", pod["metadata"]["name"])
    assert not is_ready(pod)


def test_logs_and_port_forwarding_work_as_on_a_real_node(cluster: Cluster, namespace: str) -> None:
    here = Releases(cluster, namespace)
    here.engines("ms-tiny", 1, 1)
    here.until_ready("ms-tiny", 2)
    told = here.kubectl("logs", "-l", "llm-d.ai/role=prefill", "--prefix")
    assert "simulated prefill engine on http://10.250." in told
    [pod] = here.pods("ms-tiny", "decode")
    with here.forwarded(f"pod/{pod['metadata']['name']}", 8200) as url:
        assert httpx.get(f"{url}/sim/state", trust_env=False).json()["role"] == "decode"
