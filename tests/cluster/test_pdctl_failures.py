"""Whatever keeps a deployment from coming up: pdctl names it, says what to do, and a second deploy recovers."""

import contextlib
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from .commands import TOKEN, Pdctl
from .control_plane import BIN, ROOT, ControlPlane
from .fake_nodes import fake_cluster
from .slots import claimed_slot, folder_of, ports

QUICK = ("--fail-unschedulable-after", "3")


@pytest.fixture
def pdctl(cluster: ControlPlane, tmp_path: pathlib.Path) -> Iterator[Pdctl]:
    """Give pdctl with a namespace of its own, removed afterwards whatever is in it."""
    made = Pdctl(cluster, tmp_path, f"t-{uuid.uuid4().hex[:8]}")
    yield made
    cluster.api.delete(f"/api/v1/namespaces/{made.namespace}")


def post(pdctl: Pdctl, path: str, **thing: Any) -> None:
    pdctl.plane.api.post(path, json=thing).raise_for_status()


def make_namespace(pdctl: Pdctl, **labels: str) -> None:
    post(pdctl, "/api/v1/namespaces", metadata={"name": pdctl.namespace, "labels": labels})


@contextlib.contextmanager
def silent_server() -> Iterator[tuple[int, list[socket.socket]]]:
    """Give the port of a server that takes connections and never answers, and the connections."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:
        held: list[socket.socket] = []

        def take() -> None:
            with contextlib.suppress(OSError):
                while True:
                    held.append(server.accept()[0])

        threading.Thread(target=take, daemon=True).start()
        yield server.getsockname()[1], held
        server.shutdown(socket.SHUT_RDWR)
        for one in held:
            one.close()


@contextlib.contextmanager
def webhook(pdctl: Pdctl, resource: str, group: str, policy: str, seconds: int) -> Iterator[None]:
    """Have the API ask a server that never answers, before it takes objects of a kind in the namespace."""
    name = f"hook-{pdctl.namespace}"
    path = "/apis/admissionregistration.k8s.io/v1/validatingwebhookconfigurations"
    with silent_server() as (port, _):
        hook = {
            "name": "slow.pdctl.test", "failurePolicy": policy, "timeoutSeconds": seconds, "sideEffects": "None",
            "admissionReviewVersions": ["v1"],
            "clientConfig": {"url": f"https://127.0.0.1:{port}/", "caBundle": ""},
            "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": pdctl.namespace}},
            "rules": [
                {
                    "apiGroups": [group], "apiVersions": ["v1"], "operations": ["CREATE", "UPDATE"],
                    "resources": [resource],
                }
            ],
        }  # fmt: skip
        post(pdctl, path, metadata={"name": name}, webhooks=[hook])
        try:
            yield
        finally:
            pdctl.plane.api.delete(f"{path}/{name}").raise_for_status()


def test_an_image_that_the_registry_lacks_is_named_and_evidence_is_kept(pdctl: Pdctl) -> None:
    missing = pdctl.values(**pdctl.fault("image", "manifest unknown: not found"))
    failed = pdctl.deploy(values=missing)
    failed.says(1, "image pull: decode-", "the registry has no vllm/vllm-openai:v0.33.0", "fix: check image.repository")
    kept = pdctl.evidence()
    assert "image pull" in (kept / "summary.txt").read_text()
    assert "ImagePull" in (kept / "pods.yaml").read_text()
    pdctl.run("status").says(1, "image pull: decode-")
    pdctl.deploy().says(0, "ready http://vllm-router-llama31")


def test_a_crash_loop_shows_the_end_of_the_log_and_what_it_means(pdctl: Pdctl) -> None:
    wrong = pdctl.values(engines={"decode": {"args": ["--no-such-flag"]}})
    failed = pdctl.deploy(values=wrong, decode=2)
    failed.says(
        1, "does not know the argument --no-such-flag",
        "| vllm serve: error: unrecognized arguments: --no-such-flag", "fix: remove it from args",
    )  # fmt: skip
    assert re.search("crash loop: (2 of 4 pods|decode-)", failed.out + failed.err), (
        "both, or the one that was seen first"
    )
    assert list((pdctl.evidence() / "logs").glob("*decode*vllm*.log"))
    previous = pdctl.run("logs", "decode", "--previous", "--grep", "unrecognized")
    previous.says(0, "unrecognized arguments: --no-such-flag")
    pdctl.deploy().says(0, "ready ")


def test_a_container_that_needs_more_memory_is_told_from_one_that_crashes(pdctl: Pdctl) -> None:
    failed = pdctl.deploy(values=pdctl.values(**pdctl.fault("out-of-memory", "1")))
    failed.says(1, "out of memory: decode-", "OOMKilled", "fix: raise decode.resources.limits.memory")
    pdctl.deploy().says(0, "ready ")


def test_pods_without_a_node_are_told_in_the_schedulers_words_after_a_warning(pdctl: Pdctl) -> None:
    # All 16 GPUs are to be free: engines of the test before may still be on their way out.
    engines = {"labelSelector": "llm-d.ai/role"}
    pdctl.until(lambda: not pdctl.plane.api.get("/api/v1/pods", params=engines).json()["items"], "no engine is left")
    failed = pdctl.deploy(*QUICK, prefill=8, decode=9)
    failed.says(
        1, "warn  room on nodes", "17 GPUs wanted, 16 free on 2 nodes", "unschedulable: ",
        "0/2 nodes are available: ", "2 Insufficient nvidia.com/gpu", "nvidia.com/gpu on the nodes, add nodes",
    )  # fmt: skip
    pdctl.deploy().says(0, "ready ")


def test_a_quota_is_told_in_figures(pdctl: Pdctl) -> None:
    make_namespace(pdctl)
    hard = {"hard": {"requests.nvidia.com/gpu": "1"}}
    post(pdctl, f"/api/v1/namespaces/{pdctl.namespace}/resourcequotas", metadata={"name": "gpus"}, spec=hard)
    failed = pdctl.deploy(prefill=1, decode=2)
    failed.says(1, "quota: ", "quota gpus allows requests.nvidia.com/gpu=1", "fix: have the quota raised")
    path = f"/api/v1/namespaces/{pdctl.namespace}/resourcequotas/gpus"
    pdctl.plane.api.delete(path).raise_for_status()
    pdctl.deploy().says(0, "ready ")


def test_a_missing_secret_stops_the_deployment_before_anything_is_changed(pdctl: Pdctl) -> None:
    gated = pdctl.values(engines={"huggingFace": {"existingSecret": "llm-d-hf-token"}})
    failed = pdctl.deploy(values=gated)
    failed.says(3, "fail  Secrets", "there is no llm-d-hf-token", "set HF_TOKEN", "nothing was changed")
    assert pdctl.plane.api.get(f"/api/v1/namespaces/{pdctl.namespace}").status_code == 404
    pdctl.deploy(values=gated, HF_TOKEN=TOKEN).says(0, "Secret llm-d-hf-token made from HF_TOKEN", "ready ")


def test_a_secret_that_goes_later_is_named_by_the_pods_that_lack_it(pdctl: Pdctl) -> None:
    gated = pdctl.values(engines={"huggingFace": {"existingSecret": "llm-d-hf-token"}})
    make_namespace(pdctl)
    secrets = f"/api/v1/namespaces/{pdctl.namespace}/secrets"
    post(pdctl, secrets, metadata={"name": "llm-d-hf-token"}, stringData={"HF_TOKEN": TOKEN})
    slow = pdctl.start("deploy", *pdctl.deployment(values=gated))
    slow.until("install")  # its checks have seen the Secret
    pdctl.plane.api.delete(f"{secrets}/llm-d-hf-token").raise_for_status()
    ended = slow.end()
    if ended.code == 0:  # the pods were quicker: then the next ones lack it
        ended = pdctl.run("rollout", "--restart", "decode")
    ended.says(1, "missing Secret or ConfigMap: ", "there is no Secret llm-d-hf-token", "fix: set HF_TOKEN")
    pdctl.deploy(values=gated, HF_TOKEN=TOKEN).says(0, "ready ")


def test_whoever_lacks_rights_is_told_which_before_anything_is_changed(pdctl: Pdctl) -> None:
    plane = pdctl.plane
    plane.certificate("nobody", "nobody", group="nobodies")
    restricted = str(plane.write_kubeconfig("nobody"))
    failed = pdctl.deploy(KUBECONFIG=restricted)
    failed.says(3, "nobody", "cannot")
    assert plane.api.get(f"/api/v1/namespaces/{pdctl.namespace}").status_code == 404
    reader = {"kind": "ClusterRole", "name": "view", "apiGroup": "rbac.authorization.k8s.io"}
    subject = {"kind": "User", "name": "nobody", "apiGroup": "rbac.authorization.k8s.io"}
    post(
        pdctl, "/apis/rbac.authorization.k8s.io/v1/clusterrolebindings", metadata={"name": pdctl.namespace},
        roleRef=reader, subjects=[subject],
    )  # fmt: skip
    failed = pdctl.deploy(KUBECONFIG=restricted)
    failed.says(
        3, "fail  rights", "deployments (create, patch, delete)", "namespaces (create)", "ask who runs the cluster"
    )
    plane.api.delete(f"/apis/rbac.authorization.k8s.io/v1/clusterrolebindings/{pdctl.namespace}").raise_for_status()
    pdctl.deploy().says(0, "ready ")


def test_what_the_namespaces_security_level_forbids_is_told_before_and_after(pdctl: Pdctl) -> None:
    make_namespace(pdctl, **{"pod-security.kubernetes.io/enforce": "restricted"})
    rdma = ("--network", "infiniband")
    failed = pdctl.deploy(*rdma)
    failed.says(3, "fail  pod security", "enforces restricted, and the engines ask for IPC_LOCK", "rdma.ipcLock=false")
    volume = {"volumes": [{"name": "data", "nfs": {"server": "files.example", "path": "/"}}]}
    failed = pdctl.deploy(values=pdctl.values(engines=volume))
    failed.says(1, "pod security: ", "restricted", 'volume "data"')
    pdctl.deploy().says(0, "ready ")


def test_a_webhook_that_does_not_answer_is_named(pdctl: Pdctl) -> None:
    make_namespace(pdctl)
    with webhook(pdctl, "pods", "", "Fail", 1):
        failed = pdctl.deploy("--timeout", "8")
        failed.says(4, "refused by the API: ", "slow.pdctl.test", "see that the service of the webhook")
    pdctl.deploy().says(0, "ready ")
    with webhook(pdctl, "deployments", "apps", "Fail", 1):  # it now has a say in what Helm itself sends
        failed = pdctl.deploy("--set", "engines.args={--max-num-seqs=512}")
        failed.says(1, "while installing ms-llama31", "slow.pdctl.test", "see that the webhook's service runs")
    pdctl.deploy("--set", "engines.args={--max-num-seqs=512}").says(0, "ms-llama31 upgraded", "ready ")


def test_an_api_server_that_is_away_for_half_a_minute_is_waited_for(tmp_path: pathlib.Path) -> None:
    with fake_cluster() as plane:  # one of its own: controllers come back to a new API server in their own time
        pdctl = Pdctl(plane, tmp_path, "away")
        running = pdctl.start("deploy", *pdctl.deployment(values=pdctl.values(**pdctl.fault("start-seconds", "5"))))
        running.until("prefill 0/1")
        plane.stop_api_server()
        running.until("the Kubernetes API does not answer; going on when it does")
        time.sleep(30)  # the outage itself
        plane.start_api_server()
        running.end().says(0, "the API answers again", "ready ")


def test_an_install_that_was_killed_is_finished_by_the_next_deploy(pdctl: Pdctl) -> None:
    make_namespace(pdctl)
    never = ROOT / "charts/pd-engines"
    file = pdctl.folder / "chart.yaml"
    told = yaml.safe_load(pathlib.Path(pdctl.values(**pdctl.fault("start-seconds", "60"))).read_text())["engines"]
    file.write_text(yaml.safe_dump(told))
    command = [BIN / "helm", "install", "ms-llama31", never, "-n", pdctl.namespace, "-f", file, "--wait"]
    with subprocess.Popen(command, env=pdctl.environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as helm:
        pods = f"/api/v1/namespaces/{pdctl.namespace}/pods"
        pdctl.until(lambda: pdctl.plane.items(pods), "the release has pods")
        os.kill(helm.pid, signal.SIGKILL)
    deployed = pdctl.deploy()
    deployed.says(0, "ms-llama31 is pending-install from an earlier run: finishing that first", "ready ")


def test_another_cluster_than_the_deployments_is_refused(pdctl: Pdctl) -> None:
    pdctl.deploy().says(0, "ready ")
    with claimed_slot() as slot, folder_of(slot) as folder, ControlPlane(folder, ports(slot)) as other:
        mine = yaml.safe_load(pdctl.plane.kubeconfig.read_text())
        theirs = yaml.safe_load(other.kubeconfig.read_text())
        for part in ("clusters", "users", "contexts"):
            theirs[part][0]["name"] = "other"
        theirs["contexts"][0]["context"] = {"cluster": "other", "user": "other"}
        both = {part: mine[part] + theirs[part] for part in ("clusters", "users", "contexts")}
        file = pdctl.folder / "both.kubeconfig"
        file.write_text(yaml.safe_dump({"apiVersion": "v1", "kind": "Config", "current-context": "other", **both}))
        for verb in ("cleanup", "deploy"):
            arguments = ["-y"] if verb == "cleanup" else pdctl.deployment()
            refused = pdctl.run(verb, *arguments, KUBECONFIG=str(file))
            refused.says(3, "was deployed to another cluster, through the context local", "--context local")
        before = file.read_text()
        pdctl.run("cleanup", "-y", "--context", "local", KUBECONFIG=str(file)).says(0, "gone: ")
        assert file.read_text() == before, "the kubeconfig is only read"


def test_ctrl_c_says_at_every_stage_what_still_runs(pdctl: Pdctl) -> None:
    values = pdctl.values(**pdctl.fault("start-seconds", "30"))
    with silent_server() as (port, asked):
        checking = pdctl.start("deploy", *pdctl.deployment("--set", "engines.model.name=some/model", values=values),
                               HF_ENDPOINT=f"http://127.0.0.1:{port}")  # fmt: skip
        pdctl.until(lambda: asked, "the checks ask the hub, which they wait 5 s for")
        checking.interrupt()
        checking.end().says(130, "interrupted; nothing was changed")
    assert pdctl.plane.api.get(f"/api/v1/namespaces/{pdctl.namespace}").status_code == 404

    make_namespace(pdctl)
    with webhook(pdctl, "deployments", "apps", "Ignore", 3):
        installing = pdctl.start("deploy", *pdctl.deployment(values=values))
        releases = f"/api/v1/namespaces/{pdctl.namespace}/secrets"
        pdctl.until(lambda: pdctl.plane.items(releases, labelSelector="owner=helm"), "helm is at it")
        installing.interrupt()
        installing.end().says(130, "it was installing ms-llama31", "pdctl cleanup")
    [release] = pdctl.plane.items(releases, labelSelector="owner=helm")
    assert release["metadata"]["labels"]["status"] == "deployed", "the call to Helm came to its end"

    waiting = pdctl.start("deploy", *pdctl.deployment(values=values))
    waiting.until("decode 0/1")
    waiting.interrupt()
    waiting.end().says(130, "goes on starting in the cluster", "pdctl status")
    pdctl.deploy().says(0, "ready ")


def test_ctrl_c_in_changes_and_cleanup_says_what_goes_on_and_a_second_run_ends_it(pdctl: Pdctl) -> None:
    leaving = {"engines": {"shutdown": {"leaveSeconds": 5, "drainSeconds": 10}}}
    pdctl.deploy(values=pdctl.values(**leaving)).says(0, "ready ")
    for verb, arguments, sign in (
        ("scale", ["decode=2"], "decode 1/2"),
        ("rollout", ["--set", "engines.args={--max-num-seqs=512}"], "stopping"),
    ):
        changing = pdctl.start(verb, *arguments)
        changing.until(sign)
        changing.interrupt()
        changing.end().says(130, f"interrupted; the {verb} goes on in the cluster", "pdctl status")
        pdctl.run(verb, *arguments).says(0, "ready ", "decode 2/2")
    cleaning = pdctl.start("cleanup", "-y")
    cleaning.until("pods still stop")
    cleaning.interrupt()
    cleaning.end().says(130, "interrupted; what was told to go still goes in the cluster", "pdctl cleanup")
    pdctl.run("cleanup", "-y").says(0)  # there may be nothing left to do: it waits for whatever still goes
    pods = f"/api/v1/namespaces/{pdctl.namespace}/pods"
    assert not pdctl.plane.items(pods)


def test_two_runs_do_not_deploy_at_once(pdctl: Pdctl) -> None:
    slow = pdctl.values(**pdctl.fault("start-seconds", "20"))
    first = pdctl.start("deploy", *pdctl.deployment(values=slow))
    first.until("prefill 1/1")
    second = pdctl.deploy()
    second.says(3, "pdctl deploy already runs against", "status --namespace")
    os.kill(first.process.pid, signal.SIGKILL)  # its lock runs out
    first.end()
    pdctl.deploy().says(0, "waiting whether that still runs", "ready ")


def test_a_failure_with_rollback_leaves_only_evidence(pdctl: Pdctl) -> None:
    wrong = pdctl.values(engines={"decode": {"args": ["--no-such-flag"]}})
    pdctl.deploy("--rollback", values=wrong).says(1, "rollback: ms-llama31 is uninstalled", "rolled back")
    assert (pdctl.evidence() / "summary.txt").exists()
    assert not (pdctl.state / "namespaces" / pdctl.namespace / "record.json").exists()
    space = f"/api/v1/namespaces/{pdctl.namespace}"
    pdctl.until(lambda: pdctl.plane.api.get(space).status_code == 404, "the namespace is gone")

    pdctl.deploy().says(0, "ready ")
    pdctl.deploy("--rollback", values=wrong).says(1, "is back at revision 1")
    pdctl.until(lambda: pdctl.run("status").code == 0, "what was there before is ready again")


def test_what_cannot_be_is_refused_with_a_sentence_and_status_2(pdctl: Pdctl) -> None:
    pdctl.deploy("--set", "prefill.replicas=2").says(2, "does not say whose value it is", "--set engines.prefill")
    pdctl.deploy("--set", "engines.prefil.replicas=2").says(2, "the values of ms-llama31 cannot be used", "prefil")
    pdctl.deploy("--set", "engines.image.tag=latest").says(2, 'image.tag is "latest"')
    pdctl.deploy("--network", "pigeon").says(2, "there is no network 'pigeon'", "infiniband")
    assert json.loads(pdctl.plane.api.get("/api/v1/namespaces").text)["items"]
    assert pdctl.plane.api.get(f"/api/v1/namespaces/{pdctl.namespace}").status_code == 404
