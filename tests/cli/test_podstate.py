"""Why pods are not ready, told from what the API says of them.

`podstates/` holds what a real API server, scheduler and controllers said of deployments that did not come up, cut
out of pdctl's evidence; its pods' containers were told by the fake kubelet of tests/cluster. Further down are words of
a real kubelet for what that one does not do.
"""

import pathlib
from typing import Any

import pytest
import yaml

from pdctl.podstate import Finding, Kind, Phase, Snapshot, Verdict, Watched, diagnose, read_pod, read_snapshot

RECORDED = pathlib.Path(__file__).parent / "podstates"
NOW = 1_800_000_000.0


def recorded(name: str) -> Snapshot:
    told = yaml.load((RECORDED / f"{name}.yaml").read_text(), yaml.CSafeLoader)
    return read_snapshot(NOW, told["pods"], told["workloads"], told["events"])


def only(snapshot: Snapshot, kind: Kind) -> Finding:
    found = [finding for finding in diagnose(snapshot) if finding.kind is kind]
    assert len(found) == 1, diagnose(snapshot)
    return found[0]


def pod(name: str = "ms-decode-1", role: str = "decode", **status: Any) -> dict[str, Any]:
    labels = {"llm-d.ai/role": role, "app.kubernetes.io/component": role}
    meta = {"name": name, "uid": name, "labels": labels, "creationTimestamp": "2026-11-24T10:00:00Z"}
    return {"metadata": meta, "spec": {"nodeName": "gpu-0"}, "status": {"phase": "Pending", **status}}


def container(name: str = "vllm", **told: Any) -> dict[str, Any]:
    return {"name": name, "image": "vllm/vllm-openai:v0.33.0", "ready": False, "restartCount": 0, **told}


def warning(name: str, reason: str, message: str, at: str = "2026-11-24T10:01:00Z") -> dict[str, Any]:
    about = {"kind": "Pod", "name": name}
    return {"type": "Warning", "reason": reason, "message": message, "involvedObject": about, "lastTimestamp": at,
            "metadata": {"name": "e"}}  # fmt: skip


def deployment(role: str = "decode", wanted: int = 1, **status: Any) -> dict[str, Any]:
    meta = {"name": f"ms-{role}", "generation": 1, "labels": {"llm-d.ai/role": role}}
    return {"kind": "Deployment", "metadata": meta, "spec": {"replicas": wanted},
            "status": {"observedGeneration": 1, **status}}  # fmt: skip


def of(*pods: dict[str, Any], events: list[dict[str, Any]] | None = None, **status: Any) -> Snapshot:
    return read_snapshot(NOW, pods, [deployment(**status)], events or [])


def test_recorded_crashes_of_two_pods_are_one_finding_with_the_logs_end() -> None:
    finding = only(recorded("crash"), Kind.CRASH)
    assert len(finding.pods) == 2
    assert "does not know the argument --no-such-flag" in finding.message
    assert finding.evidence[-1] == "vllm serve: error: unrecognized arguments: --no-such-flag"
    assert finding.patience == 0, "another start can only end the same way"


def test_a_recorded_container_over_its_memory_limit_is_no_plain_crash() -> None:
    finding = only(recorded("memory"), Kind.MEMORY)
    assert "OOMKilled" in finding.message
    assert "decode.resources.limits.memory" in finding.fix


def test_a_recorded_image_that_is_not_there() -> None:
    finding = only(recorded("image"), Kind.IMAGE)
    assert finding.message == "the registry has no vllm/vllm-openai:v0.33.0"
    assert "manifest unknown" in finding.evidence[0]


def test_a_recorded_schedulers_reason_without_its_talk_of_preemption() -> None:
    finding = only(recorded("unschedulable"), Kind.UNSCHEDULABLE)
    assert finding.message.startswith("0/2 nodes are available: ")
    assert "Insufficient nvidia.com/gpu" in finding.message
    assert "preemption" not in finding.message


def test_a_recorded_quota_in_figures() -> None:
    finding = only(recorded("quota"), Kind.QUOTA)
    assert "quota gpus allows requests.nvidia.com/gpu=1" in finding.message


def test_a_recorded_refusal_by_pod_security_names_level_and_cause() -> None:
    finding = only(recorded("security"), Kind.SECURITY)
    assert "restricted" in finding.message
    assert "nfs" in finding.message or 'volume "data"' in finding.message


def test_a_recorded_webhook_that_does_not_answer_is_named_and_may_come_back() -> None:
    finding = only(recorded("webhook"), Kind.ADMISSION)
    assert "slow.pdctl.test" in finding.fix
    assert finding.patience > 60


def test_a_recorded_secret_without_the_key() -> None:
    finding = only(recorded("secret"), Kind.REFERENCE)
    assert finding.message == "Secret llm-d-hf-token has no key HF_TOKEN"
    assert "huggingFace.secretKey" in finding.fix


def test_a_missing_secret() -> None:
    waiting = {"waiting": {"reason": "CreateContainerConfigError", "message": 'secret "llm-d-hf-token" not found'}}
    finding = only(of(pod(containerStatuses=[container(state=waiting)])), Kind.REFERENCE)
    assert finding.message == "there is no Secret llm-d-hf-token"
    assert "set HF_TOKEN" in finding.fix


@pytest.mark.parametrize(
    ("message", "cause", "fix"),
    [
        ("unexpected status from HEAD request: 401 Unauthorized", "does not give", "imagePullSecrets"),
        ("429 Too Many Requests - toomanyrequests: You have reached your pull rate limit", "no more pulls", "wait"),
        ("dial tcp: lookup registry.example: no such host", "cannot be pulled", "image.repository"),
    ],
)
def test_registries_refuse_for_different_reasons(message: str, cause: str, fix: str) -> None:
    waiting = {"waiting": {"reason": "ImagePullBackOff", "message": "Back-off pulling image"}}
    name = "ms-decode-1"
    snapshot = of(pod(containerStatuses=[container(state=waiting)]), events=[warning(name, "Failed", message)])
    finding = only(snapshot, Kind.IMAGE)
    assert cause in finding.message
    assert fix in finding.fix
    assert finding.evidence == (message,)


def test_an_image_that_must_be_on_the_node_already() -> None:
    waiting = {"waiting": {"reason": "ErrImageNeverPull", "message": "Container image is not present"}}
    finding = only(of(pod(containerStatuses=[container(state=waiting)])), Kind.IMAGE)
    assert finding.patience == 0
    assert "not on node gpu-0" in finding.message


def crashed(tail: str, code: int = 1, reason: str = "Error", restarts: int = 1) -> dict[str, Any]:
    ended = {"terminated": {"exitCode": code, "reason": reason, "message": tail}}
    state = {"waiting": {"reason": "CrashLoopBackOff", "message": "back-off 40s"}}
    return pod(containerStatuses=[container(state=state, lastState=ended, restartCount=restarts)], phase="Running")


@pytest.mark.parametrize(
    ("tail", "cause", "hopeless"),
    [
        ("huggingface_hub.errors.GatedRepoError: 403 Client Error.", "does not give the model", True),
        ("OSError: Access to model meta-llama/Llama is restricted.", "does not give the model", True),
        ("huggingface_hub.errors.HfHubHTTPError: 429 Client Error: Too Many Requests", "too many downloads", False),
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB.", "GPU's memory is too small", True),
        ("ValueError: To serve at least one request, 4 GiB KV cache is needed, which is larger than the available KV "
         "cache memory (2 GiB).", "no room for the KV cache", True),
        ("RuntimeError: No CUDA GPUs are available", "sees no usable GPU", False),
        ("OSError: [Errno 28] No space left on device", "the disk is full", True),
        ("PermissionError: [Errno 13] Permission denied: '/model-cache/hub'", "may not write to /model-cache", True),
        ("RuntimeError: NIXL is not available", "has no NIXL", True),
    ],
)  # fmt: skip
def test_the_end_of_a_log_tells_known_causes(tail: str, cause: str, hopeless: bool) -> None:
    finding = only(of(crashed(f"INFO started\n{tail}")), Kind.CRASH)
    assert cause in finding.message
    assert (finding.patience == 0) is hopeless
    assert finding.evidence[-1] == tail


def test_an_unknown_crash_is_given_three_restarts() -> None:
    assert only(of(crashed("what?", restarts=2)), Kind.CRASH).patience == float("inf")
    assert only(of(crashed("what?", restarts=3)), Kind.CRASH).patience == 0


def test_a_log_that_was_read_is_shown_rather_than_the_pods_own_last_words() -> None:
    snapshot = of(crashed("short"))
    [finding] = diagnose(snapshot, {"ms-decode-1": ["a", "b"]})
    assert finding.evidence == ("a", "b")


def test_a_container_that_its_probe_killed_is_told_from_one_that_crashed() -> None:
    told = "Container vllm failed startup probe, will be restarted"
    events = [
        warning("ms-decode-1", "Killing", told),
        warning("ms-decode-1", "Unhealthy", "Startup probe failed: dial tcp 10.0.0.1:8200: connection refused"),
    ]
    finding = only(of(crashed("loading", code=137), events=events), Kind.PROBE)
    assert "Startup probe failed" in finding.message
    assert "startupSeconds" in finding.fix


def test_a_volume_that_cannot_be_mounted() -> None:
    waiting = {"waiting": {"reason": "ContainerCreating"}}
    told = 'MountVolume.SetUp failed for volume "pv-1": rpc error: timed out waiting for the condition'
    events = [warning("ms-decode-1", "FailedMount", told)]
    finding = only(of(pod(containerStatuses=[container(state=waiting)]), events=events), Kind.VOLUME)
    assert finding.message == told


def test_an_evicted_pod_and_a_failed_download() -> None:
    gone = pod(phase="Failed", reason="Evicted", message="The node was low on resource: ephemeral-storage.")
    assert "ephemeral-storage" in only(of(gone), Kind.EVICTED).message
    job = {
        "kind": "Job", "metadata": {"name": "ms-download", "labels": {"app.kubernetes.io/component": "download"}},
        "spec": {}, "status": {"conditions": [{"type": "Failed", "status": "True", "message": "it failed too often"}]},
    }  # fmt: skip
    snapshot = read_snapshot(NOW, [pod("ms-download-1", "download", phase="Failed")], [job])
    tail = {"ms-download-1": ["meta-llama/Llama is not given to this token (403): ask for access"]}
    [finding] = diagnose(snapshot, tail)
    assert finding.kind is Kind.DOWNLOAD
    assert "ask for access" in finding.fix


def test_a_model_that_still_loads_is_no_trouble() -> None:
    loading = pod(
        phase="Running", containerStatuses=[container(state={"running": {}}, started=False)],
        conditions=[{"type": "Ready", "status": "False"}],
    )  # fmt: skip
    events = [warning("ms-decode-1", "Unhealthy", "Startup probe failed: connection refused")]
    snapshot = of(loading, events=events)
    assert snapshot.pods[0].phase is Phase.STARTING
    assert diagnose(snapshot) == ()


def test_a_deployment_is_complete_when_all_new_pods_are_ready_and_no_old_one_is_left() -> None:
    assert of(wanted=2, replicas=2, updatedReplicas=2, availableReplicas=2).complete
    assert not of(wanted=2, replicas=3, updatedReplicas=2, availableReplicas=3).complete, "an old pod is left"
    assert not of(wanted=2, replicas=2, updatedReplicas=2, availableReplicas=1).complete
    assert not of(wanted=2, replicas=4, updatedReplicas=4, availableReplicas=4).complete, "two are too many"
    [rolling] = of(wanted=8, replicas=8, updatedReplicas=1, availableReplicas=7).workloads
    assert (rolling.ready, rolling.others) == (0, 7), "those that are available are old ones"
    assert not read_snapshot(NOW, [], [deployment() | {"status": {"observedGeneration": 0}}]).complete
    assert of(wanted=0).complete, "none are wanted and none are there"
    assert not read_snapshot(NOW, [], []).complete, "nothing is there at all"


def test_a_pod_that_goes_is_stopping_whatever_else_it_is() -> None:
    ready = pod(phase="Running", conditions=[{"type": "Ready", "status": "True"}])
    assert read_pod(ready).phase is Phase.READY
    ready["metadata"]["deletionTimestamp"] = "2026-11-24T10:02:00Z"
    assert read_pod(ready).phase is Phase.STOPPING


def at(snapshot: Snapshot, seconds: float) -> Snapshot:
    return Snapshot(NOW + seconds, snapshot.pods, snapshot.workloads, snapshot.warnings)


def test_patience_ends_only_for_a_trouble_that_lasts() -> None:
    waiting = pod(conditions=[{"type": "PodScheduled", "status": "False", "reason": "Unschedulable",
                               "message": "0/2 nodes are available: 2 Insufficient nvidia.com/gpu."}])  # fmt: skip
    waiting["spec"] = {}
    trouble, well = of(waiting), of(pod())
    watched = Watched(timeout=1000, unschedulable_after=10)

    def judge(snapshot: Snapshot, seconds: float) -> Verdict:
        seen = at(snapshot, seconds)
        return watched.judge(seen, diagnose(seen))

    assert judge(trouble, 0) is Verdict.COMING
    assert judge(trouble, 9) is Verdict.COMING
    assert judge(well, 10) is Verdict.COMING
    assert judge(trouble, 15) is Verdict.COMING, "it begins anew"
    assert judge(trouble, 25) is Verdict.FAILED
    assert [finding.kind for finding in watched.hopeless(NOW + 25)] == [Kind.UNSCHEDULABLE]
    assert judge(well, 1001) is Verdict.LATE
    assert judge(of(wanted=0), 1002) is Verdict.READY
