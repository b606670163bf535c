"""Why pods are not ready: pure rules over a snapshot. Pods with the same trouble are one finding."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from pdctl.podstate.crashes import ending, guess
from pdctl.podstate.state import Container, Phase, Pod, Snapshot, Workload

NEVER = float("inf")
TAIL = 12  # lines of a crashed container's log that are shown
STARTS = 3  # restarts after which a container is given up


class Kind(StrEnum):
    """Classes of trouble."""

    IMAGE = "image pull"
    CRASH = "crash loop"
    MEMORY = "out of memory"
    UNSCHEDULABLE = "unschedulable"
    QUOTA = "quota"
    REFERENCE = "missing Secret or ConfigMap"
    SECURITY = "pod security"
    ADMISSION = "refused by the API"
    VOLUME = "volume"
    PROBE = "probe"
    DEADLINE = "progress deadline"
    EVICTED = "evicted"
    NODE = "node"
    DOWNLOAD = "download"


@dataclass(frozen=True, slots=True)
class Finding:
    """One trouble and whom it concerns.

    Args:
        pods: names of the pods, or of the workload that cannot make any.
        message: what is wrong, in the words of whoever knows it.
        evidence: lines to show, such as the end of a log.
        fix: what to do.
        patience: seconds that it may last before waiting longer makes no sense.
    """

    kind: Kind
    pods: tuple[str, ...]
    message: str
    fix: str
    evidence: tuple[str, ...] = ()
    patience: float = NEVER

    @property
    def key(self) -> tuple[Kind, str]:
        """What makes two findings of different moments the same."""
        return self.kind, self.message


Tails = Mapping[str, Sequence[str]]
Rule = Callable[[Pod, Snapshot, Tails], Finding | None]


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    return lines[-1] if lines else ""


def _warned(snapshot: Snapshot, name: str, *reasons: str) -> str:
    """Give the newest message of a warning about an object."""
    for warning in snapshot.warnings:
        if warning.name == name and warning.reason in reasons:
            return warning.message
    return ""


def _unschedulable(pod: Pod, snapshot: Snapshot, tails: Tails) -> Finding | None:
    if pod.phase is not Phase.WAITING or not pod.unschedulable:
        return None
    told = re.split(r"\.? (?:no new claims|preemption:)", pod.unschedulable)[0].strip()
    fix = (
        "free or add nodes that have what is asked for, or ask for less (pdctl scale, --set engines.prefill.replicas=…)"
    )
    if "PersistentVolumeClaim" in told or "volume" in told:
        fix = "check the claim and its storage class: kubectl get pvc,storageclass"
    elif "taint" in told and "Insufficient" not in told:
        fix = "tolerate the taint (prefill.tolerations, decode.tolerations), or take it from the nodes"
    elif "Insufficient" in told:
        short = ", ".join(sorted(set(re.findall(r"Insufficient (\S+?)[.,]?(?=\s|$)", told))))
        fix = f"free {short} on the nodes, add nodes, or ask for less (pdctl scale prefill=… decode=…)"
    return Finding(Kind.UNSCHEDULABLE, (pod.name,), told, fix)


_IMAGE = ("ImagePullBackOff", "ErrImagePull", "ErrImageNeverPull", "InvalidImageName", "ImageInspectError")


def _image(pod: Pod, snapshot: Snapshot, tails: Tails) -> Finding | None:
    for container in pod.containers:
        if container.waiting not in _IMAGE:
            continue
        warned = _warned(snapshot, pod.name, "Failed", "ErrImageNeverPull", "InspectFailed")
        told = container.message if "rpc error" in container.message or not warned else warned
        cause, fix, patience = f"{container.image} cannot be pulled", "check image.repository and image.tag", 120.0
        if container.waiting == "InvalidImageName":
            cause, patience = f"{container.image} is no name of an image", 0.0
        elif container.waiting == "ErrImageNeverPull":
            cause, fix, patience = (
                f"{container.image} is not on node {pod.node}, and pullPolicy is Never",
                "load the image onto the nodes, or set image.pullPolicy=IfNotPresent",
                0.0,
            )
        elif re.search(r"not found|manifest unknown|does not exist", told):
            cause, patience = f"the registry has no {container.image}", 5.0
        elif re.search(r"unauthorized|denied|authentication required|forbidden", told, re.I):
            cause, fix, patience = (
                f"the registry does not give {container.image} to these nodes",
                "make a Secret of type kubernetes.io/dockerconfigjson and name it in imagePullSecrets",
                15.0,
            )
        elif re.search(r"toomanyrequests|429", told, re.I):
            cause, fix, patience = (
                f"the registry allows no more pulls of {container.image} for now",
                "wait, or pull with an account (imagePullSecrets), or from a mirror (image.repository)",
                600.0,
            )
        if pod.role == "router" and container.image.startswith("localhost/"):
            fix = "build router/Dockerfile, push it, and deploy with --set router.image.repository=YOUR/pd-router"
        return Finding(Kind.IMAGE, (pod.name,), cause, fix, tuple(filter(None, [_last_line(told)])), patience)
    return None


def _reference(pod: Pod, snapshot: Snapshot, tails: Tails) -> Finding | None:
    for container in pod.containers:
        if container.waiting not in ("CreateContainerConfigError", "CreateContainerError", "RunContainerError"):
            continue
        told = container.message or _warned(snapshot, pod.name, "Failed")
        if found := re.search(r'(secret|configmap) "([^"]+)" not found', told):
            kind = {"secret": "Secret", "configmap": "ConfigMap"}[found[1]]
            fix = f"make the {kind} {found[2]} in the namespace"
            if kind == "Secret" and "hf" in found[2]:
                fix = "set HF_TOKEN and deploy again; pdctl makes the Secret"
            return Finding(Kind.REFERENCE, (pod.name,), f"there is no {kind} {found[2]}", fix, patience=20.0)
        if found := re.search(r"couldn't find key (\S+) in (Secret|ConfigMap) (\S+)", told):
            return Finding(
                Kind.REFERENCE, (pod.name,), f"{found[2]} {found[3].split('/')[-1]} has no key {found[1]}",
                "add that key to it, or name the right one in huggingFace.secretKey", patience=20.0,
            )  # fmt: skip
        return Finding(
            Kind.REFERENCE, (pod.name,), f"the container cannot be made: {_last_line(told) or container.waiting}",
            "see the events: kubectl describe pod " + pod.name, patience=60.0,
        )  # fmt: skip
    return None


def _crash(pod: Pod, snapshot: Snapshot, tails: Tails) -> Finding | None:
    if pod.phase not in (Phase.CRASHING, Phase.FAILED) and not pod.restarts:
        return None
    for container in pod.containers:
        ended = container.last
        if ended is None or (ended.code == 0 and container.waiting != "CrashLoopBackOff") or container.ready:
            continue
        if container.init and container.running:
            continue
        lines = list(tails.get(pod.name) or ended.message.strip().splitlines())[-TAIL:]
        if ended.reason == "OOMKilled":
            return Finding(
                Kind.MEMORY, (pod.name,), f"container {container.name} used more memory than its limit (OOMKilled)",
                f"raise {pod.role}.resources.limits.memory; /dev/shm counts against it", tuple(lines),
                _patience(container, False),
            )  # fmt: skip
        killed = _warned(snapshot, pod.name, "Unhealthy")
        if ended.code in (137, 143) and killed and _warned(snapshot, pod.name, "Killing", "BackOff", "Unhealthy"):
            return Finding(
                Kind.PROBE, (pod.name,), f"the kubelet ended container {container.name}: {_last_line(killed)}",
                "raise startupSeconds when the model loads longer than that; otherwise see why /health fails",
                tuple(lines), _patience(container, False),
            )  # fmt: skip
        known = guess(lines)
        message = f"container {container.name} ends with {ending(ended)}"
        if known is not None:
            message += f": {known.cause}"
        fix = known.fix if known is not None else f"read its log: pdctl logs {pod.name} --previous"
        return Finding(
            Kind.CRASH,
            (pod.name,),
            message,
            fix,
            tuple(lines),
            _patience(container, known is not None and known.hopeless),
        )
    return None


def _patience(container: Container, hopeless: bool) -> float:
    """Give up at once where another start can only end the same way, or after enough of them."""
    return 0.0 if hopeless or container.restarts >= STARTS else NEVER


def _volume(pod: Pod, snapshot: Snapshot, tails: Tails) -> Finding | None:
    if pod.phase is not Phase.PREPARING:
        return None
    told = _warned(snapshot, pod.name, "FailedMount", "FailedAttachVolume")
    if not told:
        return None
    if found := re.search(r'(secret|configmap) "([^"]+)" not found', told):
        kind = {"secret": "Secret", "configmap": "ConfigMap"}[found[1]]
        return Finding(
            Kind.REFERENCE, (pod.name,), f"there is no {kind} {found[2]} to mount", f"make the {kind} {found[2]}",
            patience=20.0,
        )  # fmt: skip
    return Finding(
        Kind.VOLUME, (pod.name,), _last_line(told), "check the claim and its storage: kubectl describe pvc,pv",
        patience=300.0,
    )  # fmt: skip


def _sandbox(pod: Pod, snapshot: Snapshot, tails: Tails) -> Finding | None:
    if pod.phase is not Phase.PREPARING:
        return None
    told = _warned(snapshot, pod.name, "FailedCreatePodSandBox", "NetworkNotReady", "UnexpectedAdmissionError")
    if not told:
        return None
    return Finding(
        Kind.NODE, (pod.name,), f"node {pod.node} cannot start pods: {_last_line(told)}",
        f"look at the node: kubectl describe node {pod.node}", patience=180.0,
    )  # fmt: skip


def _evicted(pod: Pod, snapshot: Snapshot, tails: Tails) -> Finding | None:
    if pod.phase is not Phase.FAILED or not pod.reason:
        return None
    return Finding(
        Kind.EVICTED, (pod.name,), f"{pod.reason}: {_last_line(pod.message)}".rstrip(": "),
        "another pod takes its place; when it happens again, give the node what it lacks",
    )  # fmt: skip


def _probe(pod: Pod, snapshot: Snapshot, tails: Tails) -> Finding | None:
    """A container that came up and stays not ready. A failing startup probe is what one expects while a model loads."""
    if pod.phase is not Phase.STARTING:
        return None
    if not any(one.running and one.started and not one.ready for one in pod.containers if not one.init):
        return None
    told = _warned(snapshot, pod.name, "Unhealthy")
    if pod.role == "router":
        there = {one.role for one in snapshot.pods if one.phase is Phase.READY}
        if not {"prefill", "decode"} <= there:
            return None  # it waits for engines, and they have findings of their own
        return Finding(
            Kind.PROBE, (pod.name,), "engines are ready, and the router does not find them well",
            "see which engines it knows: pdctl logs --role router",
        )  # fmt: skip
    return Finding(
        Kind.PROBE, (pod.name,), _last_line(told) or "it runs, but its readiness probe does not succeed",
        f"see why: pdctl logs {pod.name}",
    ) if told else None  # fmt: skip


_OF_PODS: tuple[Rule, ...] = (
    _evicted, _unschedulable, _image, _reference, _crash, _volume, _sandbox, _probe,
)  # fmt: skip


def _refused(workload: Workload, snapshot: Snapshot) -> Iterator[Finding]:
    told = workload.refused
    if not told:
        return
    who = (workload.name,)
    if "exceeded quota" in told:
        short = re.search(
            r"exceeded quota: (?P<quota>[^,]+), requested: (?P<asked>.+), used: (?P<used>.+), limited: (?P<limit>.+)",
            told,
        )
        message = (
            f"quota {short['quota']} allows {short['limit']}; used are {short['used']}, "
            f"asked for are {short['asked']} more"
            if short
            else _last_line(told)
        )
        fix = "have the quota raised, or ask for less (pdctl scale prefill=… decode=…)"
        yield Finding(Kind.QUOTA, who, message, fix, patience=10.0)
    elif found := re.search(r'violates PodSecurity "([^":]+)[^"]*": (.+)', told):
        fix = "set rdma.ipcLock=false and drop other special rights"
        if "IPC_LOCK" in found[2] or "runAsUser=0" in found[2]:
            fix = (
                "either label the namespace pod-security.kubernetes.io/enforce=privileged, or, where nodes let any "
                "process lock memory, deploy with --set engines.rdma.ipcLock=false"
            )
        message = f"the namespace's pod security level {found[1]} forbids {found[2]}"
        yield Finding(Kind.SECURITY, who, message, fix, patience=5.0)
    elif "serviceaccount" in told and "not found" in told:
        yield Finding(
            Kind.ADMISSION, who, _last_line(told), "let the chart make it (serviceAccount.create=true), or make it",
            patience=30.0,
        )  # fmt: skip
    else:
        webhook = re.search(r'(?:admission webhook|calling webhook) "([^"]+)"', told)
        waits = "failed calling webhook" in told
        fix = (
            f"see that the service of the webhook {webhook[1]} runs"
            if webhook and waits
            else "change what it forbids, or ask who runs the cluster"
        )
        message = _last_line(re.sub(r'^pods "[^"]+" is forbidden: ', "", told))
        yield Finding(Kind.ADMISSION, who, message, fix, patience=180.0 if waits else 20.0)


def _of_workload(workload: Workload, snapshot: Snapshot, tails: Tails) -> Iterator[Finding]:
    yield from _refused(workload, snapshot)
    if workload.overdue and workload.kind == "Job":
        pods = [pod.name for pod in snapshot.of_role(workload.role)]
        lines = next((tails[name] for name in reversed(pods) if tails.get(name)), ())
        known = guess(list(lines))
        message = f"Job {workload.name} failed: {workload.overdue_message}"
        fix = known.fix if known else "read its log: pdctl logs --role download"
        yield Finding(Kind.DOWNLOAD, (workload.name,), message, fix, tuple(lines)[-TAIL:], 0.0)
    elif workload.overdue:
        yield Finding(
            Kind.DEADLINE, (workload.name,), f"{workload.name} made no progress within its deadline",
            "see above why its pods are not ready; raise startupSeconds when the model only loads longer", patience=0.0,
        )  # fmt: skip


def diagnose(snapshot: Snapshot, tails: Tails | None = None) -> tuple[Finding, ...]:
    """Say why a deployment is not ready, the gravest first.

    Args:
        snapshot: what there is.
        tails: last lines of crashed containers' logs by pod name; without them what the pods' status has of them.
    """
    tails = tails or {}
    grouped: dict[tuple[Kind, str], Finding] = {}

    def add(finding: Finding) -> None:
        known = grouped.get(finding.key)
        if known is not None:
            finding = replace(
                known, pods=known.pods + finding.pods, patience=min(known.patience, finding.patience),
                evidence=known.evidence or finding.evidence,
            )  # fmt: skip
        grouped[finding.key] = finding

    for workload in snapshot.workloads:
        for finding in _of_workload(workload, snapshot, tails):
            add(finding)
    for pod in snapshot.pods:
        if pod.phase in (Phase.READY, Phase.STOPPING, Phase.DONE):
            continue
        for rule in _OF_PODS:
            found = rule(pod, snapshot, tails)
            if found is not None:
                add(found)
                break
    return tuple(sorted(grouped.values(), key=lambda one: one.patience))
