"""A deployment's whole life on Kubernetes by pdctl alone, and what the token never touches."""

import base64
import gzip
import json
import pathlib
import threading
import uuid
from collections.abc import Iterator

import httpx
import psutil
import pytest

from support.requests import CHAT

from .commands import TOKEN, Pdctl
from .control_plane import Cluster, ControlPlane

# Kept by the system itself: signs of life, history of what happened, and what Services are turned into.
PASSING = {"events", "leases", "endpoints", "componentstatuses"}


@pytest.fixture
def pdctl(cluster: ControlPlane, tmp_path: pathlib.Path) -> Iterator[Pdctl]:
    """Give pdctl with a namespace that does not exist yet."""
    made = Pdctl(cluster, tmp_path, f"t-{uuid.uuid4().hex[:8]}")
    yield made
    cluster.api.delete(f"/api/v1/namespaces/{made.namespace}")


def everything(plane: Cluster, mine: str) -> set[str]:
    """Give each object that the API can list, as `kind namespace/name`, but for those of other tests' namespaces."""
    roots = ["/api/v1"]
    roots += [f"/apis/{one['preferredVersion']['groupVersion']}" for one in plane.api.get("/apis").json()["groups"]]
    found = set()
    for root in roots:
        for kind in plane.api.get(root).json()["resources"]:
            if "list" not in kind["verbs"] or "/" in kind["name"] or kind["name"] in PASSING:
                continue
            for thing in plane.items(f"{root}/{kind['name']}"):
                meta = thing["metadata"]
                parent = thing.get("spec", {}).get("parentRef", {})  # of the address of a Service
                space = meta.get("namespace") or parent.get("namespace", "")
                own = meta["name"] if kind["name"] == "namespaces" else space
                if own == mine or not own.startswith("t-"):
                    found.add(f"{kind['name']} {space}/{meta['name']}")
    return found


def of_namespace(plane: ControlPlane, namespace: str) -> set[str]:
    """Give each object of a namespace."""
    roots = ["/api/v1"]
    roots += [f"/apis/{one['preferredVersion']['groupVersion']}" for one in plane.api.get("/apis").json()["groups"]]
    return {
        f"{kind['name']}/{thing['metadata']['name']}"
        for root in roots
        for kind in plane.api.get(root).json()["resources"]
        if kind["namespaced"] and "list" in kind["verbs"] and "/" not in kind["name"] and kind["name"] not in PASSING
        for thing in plane.items(f"{root}/namespaces/{namespace}/{kind['name']}")
    }


@pytest.mark.timeout(900)  # a dozen commands, on a busy machine
def test_the_whole_life_of_a_deployment_costs_no_request_and_leaves_nothing(pdctl: Pdctl) -> None:
    plane = pdctl.plane
    before = everything(plane, pdctl.namespace)
    pdctl.deploy("--dry-run").says(0, "2 GPUs wanted", "dry run: nothing was changed")
    assert everything(plane, pdctl.namespace) == before

    pdctl.deploy(prefill=2, decode=3).says(0, "ready http://vllm-router-llama31", "prefill 2/2  decode 3/3  router 1/1")
    told = pdctl.told("status")
    assert sorted(part["role"] for part in told["parts"]) == ["decode"] * 3 + ["prefill"] * 2 + ["router"]
    assert {part["state"] for part in told["parts"]} == {"ready"}
    assert told["simulated"] is True
    again = pdctl.deploy(prefill=2, decode=3).says(0, "ms-llama31 upgraded", "ready ")
    assert "stopping" not in again.err, "deploying the same again restarts no pod"
    pdctl.run("diff", "-f", pdctl.values(), "--prefill", "2", "--decode", "3").says(0, "no differences")
    more = pdctl.run("diff", "-f", pdctl.values(), "--prefill", "2", "--decode", "4")
    more.says(2, "change Deployment/ms-llama31-llm-d-modelservice-decode", "+  replicas: 4")

    forward = pdctl.start("port-forward", "--port", "0", "--metrics-port", "0")
    forward.until("metrics  http://")
    url = next(line.split()[1] for line in forward.out.splitlines() if line.startswith("router"))
    chat = {"model": "tiny", "messages": [{"role": "user", "content": "return value " * 300}], "max_tokens": 8}
    answer = httpx.post(url.removesuffix("/v1") + CHAT, json=chat, timeout=60, trust_env=False)
    assert answer.status_code == 200, answer.text
    pdctl.run("routing", "--recent", "5").says(0, "last requests", "200 prefill-", "decode-")
    routing = pdctl.told("routing")
    assert [pair["prompts"] for pair in routing["pairs"]] == [1]
    [moved] = routing["transfers"]
    assert moved["prefill"].startswith("prefill-")
    assert moved["decode"].startswith("decode-")
    assert moved["bytes"] > 0

    bench = pdctl.run("bench", "200", "32", "--input-len", "200", "--output-len", "20", "--output", "bench.json")
    bench.says(0, "SIMULATED engines", "Successful requests:                     200")

    load = pdctl.start("bench", "20000", "6", "--input-len", "100", "--output-len", "60", "--output", "load.json")
    load.until("bench: 20000 prompts", 120)
    pdctl.run("scale", "prefill=1", "decode=4").says(0, "prefill: 2 → 1", "prefill 1/1  decode 4/4  router 1/1")
    pdctl.run("scale", "decode=2").says(0, "prefill 1/1  decode 2/2")
    pods = {part["name"] for part in pdctl.told("status")["parts"] if part["role"] != "router"}
    pdctl.run("rollout", "--set", "engines.args={--max-num-seqs=512}").says(0, "ready ")
    engines = {part["name"] for part in pdctl.told("status")["parts"] if part["role"] != "router"}
    assert not pods & engines, "every engine is a new one"
    absent = r"podAnnotations.fault\.pdctl\.test/image=manifest unknown"
    failed = pdctl.run("router", "switch", "llm-d", "--set", absent)
    failed.says(1, "llm-d-router does not become ready: the registry has no ghcr.io/llm-d/", "served goes on")
    pdctl.run("router", "switch", "vllm-router").says(
        0, "clients reach vllm-router", "pd-router, consistent_hash before"
    )
    pdctl.deploy().says(3, "vllm-router serves clients of", "pdctl router switch ours")
    told = pdctl.told("status")["parts"]
    assert engines == {part["name"] for part in told if part["role"] != "router"}, "no engine was touched"
    load.interrupt()
    load.end().says(130, "interrupted after")
    result = json.loads((pdctl.folder / "load.json").read_text())
    assert result["failed"] == 0, result["pdctl"]["errors"]
    assert result["completed"] > 50
    answer = httpx.post(url.removesuffix("/v1") + CHAT, json=chat, timeout=60, trust_env=False)
    assert answer.status_code == 200, "the port-forward has found vllm-router"
    pdctl.run("router", "switch", "ours").says(0, "clients reach vllm-router-llama31", "vllm-router is uninstalled")
    follow = pdctl.start("logs", "router", "--follow", "--tail", "1")
    follow.until("router-")
    pdctl.run("rollout", "--restart", "router").says(0, "ready ")
    follow.until(" listening=")  # of the new router
    follow.interrupt()
    follow.end().says(130)
    answer = httpx.post(url.removesuffix("/v1") + CHAT, json=chat, timeout=60, trust_env=False)
    assert answer.status_code == 200, "the port-forward has found the new router"
    forward.interrupt()
    forward.end()
    pdctl.run("logs", "router", "--tail", "5", "--since", "10m", "--grep", "decode=http").says(0, "router-")
    pdctl.run("metrics", "router", "--grep", "pairs_total").says(0, "pd_router_pairs_total{")

    cleaned = pdctl.run("cleanup", "-y", "--delete-namespace")
    cleaned.says(0, "goes   release ms-llama31", f"gone: {pdctl.namespace}")
    assert everything(plane, pdctl.namespace) == before
    assert not list(pdctl.state.rglob("record.json"))


def test_cleanup_keeps_what_pdctl_did_not_make(pdctl: Pdctl) -> None:
    plane = pdctl.plane
    plane.api.post("/api/v1/namespaces", json={"metadata": {"name": pdctl.namespace}}).raise_for_status()
    space = f"/api/v1/namespaces/{pdctl.namespace}"
    pdctl.until(lambda: plane.api.get(f"{space}/configmaps/kube-root-ca.crt").is_success, "the namespace is complete")
    pdctl.until(lambda: plane.api.get(f"{space}/serviceaccounts/default").is_success, "the namespace is complete")
    plane.api.post(f"{space}/configmaps", json={"metadata": {"name": "theirs"}}).raise_for_status()
    before = of_namespace(plane, pdctl.namespace)
    gated = pdctl.values(engines={"huggingFace": {"existingSecret": "llm-d-hf-token"}})
    pdctl.deploy(values=gated, HF_TOKEN=TOKEN).says(0, "Secret llm-d-hf-token made", "ready ")
    pdctl.run("cleanup", "-y", "--delete-namespace").says(3, "configmaps/theirs", "nothing was removed")
    pdctl.run("cleanup", "-y").says(0, "stays  configmaps/theirs", "gone: ")
    assert of_namespace(plane, pdctl.namespace) == before
    pdctl.run("cleanup", "-y").says(0, "nothing to clean up")


def test_the_token_is_nowhere_but_in_its_secret(pdctl: Pdctl) -> None:
    seen: set[str] = set()
    over = threading.Event()

    def watch() -> None:
        while not over.is_set():
            for process in psutil.process_iter(["cmdline"]):
                seen.add("\0".join(process.info["cmdline"] or ()))
            over.wait(0.02)

    gated = {"huggingFace": {"existingSecret": "llm-d-hf-token"}}
    wrong = pdctl.values(engines=gated | {"decode": {"args": ["--no-such-flag"]}})
    watching = threading.Thread(target=watch)
    watching.start()
    try:
        failed = pdctl.deploy(values=wrong, HF_TOKEN=TOKEN)
        deployed = pdctl.deploy(values=pdctl.values(engines=gated), HF_TOKEN=TOKEN)
        status = pdctl.run("status", "-o", "yaml", HF_TOKEN=TOKEN)
    finally:
        over.set()
        watching.join()
    failed.says(1, "crash loop")
    deployed.says(0, "ready ")
    assert any("helm" in command and "upgrade" in command for command in seen), "the calls were seen"
    assert not [command for command in seen if TOKEN in command]
    for ended in (failed, deployed, status):
        assert TOKEN not in ended.out + ended.err
    files = [path for path in pdctl.folder.rglob("*") if path.is_file()]
    assert any("evidence" in str(path) for path in files)
    assert not [path for path in files if TOKEN.encode() in path.read_bytes()]

    secrets = pdctl.plane.items(f"/api/v1/namespaces/{pdctl.namespace}/secrets")
    releases = [one for one in secrets if one["type"] == "helm.sh/release.v1"]
    assert len(releases) >= 2
    for release in releases:
        text = gzip.decompress(base64.b64decode(base64.b64decode(release["data"]["release"])))
        assert b"llm-d-hf-token" in text or b"router" in text
        assert TOKEN.encode() not in text
    held = {one["metadata"]["name"] for one in secrets
            if any(base64.b64decode(data) == TOKEN.encode() for data in one.get("data", {}).values())}  # fmt: skip
    assert held == {"llm-d-hf-token"}
    for pod in pdctl.plane.items(f"/api/v1/namespaces/{pdctl.namespace}/pods"):
        assert TOKEN not in json.dumps(pod)
    for log in pdctl.plane.folder.rglob("*.log"):
        assert TOKEN.encode() not in log.read_bytes(), log
