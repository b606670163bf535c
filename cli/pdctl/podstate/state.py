"""Pods, workloads and warnings as dataclasses, read from what the Kubernetes API says. Unknown fields are no error."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any

Object = Mapping[str, Any]  # one object of the API, as JSON

ROLES = ("prefill", "decode", "router")


class Phase(StrEnum):
    """What a pod is doing, in the words of the table."""

    WAITING = "waiting"  # on no node yet
    PREPARING = "preparing"  # on a node: volumes, image, init containers
    STARTING = "starting"  # its container runs and is not ready: the model loads
    READY = "ready"
    CRASHING = "crashing"  # its container ended and will be started again
    STOPPING = "stopping"
    FAILED = "failed"  # over, without success
    DONE = "done"  # over, with success


@dataclass(frozen=True, slots=True)
class Ended:
    """How a container ended.

    Args:
        reason: `OOMKilled`, `Error`, `Completed`, …
        code: its exit status.
        message: the end of its log, where the chart's `FallbackToLogsOnError` puts it.
    """

    reason: str
    code: int
    message: str = ""


@dataclass(frozen=True, slots=True)
class Container:
    """One container of a pod.

    Args:
        waiting: why it is not started (`ImagePullBackOff`, …); empty when it is not waiting.
        message: what the kubelet says about that.
        started: whether its startup probe has succeeded.
        last: how it ended before it was started again, or how it ended for good.
    """

    name: str
    image: str
    init: bool = False
    ready: bool = False
    running: bool = False
    started: bool = False
    waiting: str = ""
    message: str = ""
    restarts: int = 0
    last: Ended | None = None


@dataclass(frozen=True, slots=True)
class Pod:
    """A pod.

    Args:
        role: `prefill`, `decode`, `router`, or another component such as `download`.
        created: seconds since the epoch.
        unschedulable: why the scheduler finds no node, in its own words; empty when it has not said so.
        reason, message: of a pod that failed as a whole, such as `Evicted`.
    """

    name: str
    uid: str
    role: str
    phase: Phase
    created: float
    node: str = ""
    ip: str = ""
    containers: tuple[Container, ...] = ()
    unschedulable: str = ""
    reason: str = ""
    message: str = ""

    @property
    def restarts(self) -> int:
        """Restarts of all its containers."""
        return sum(container.restarts for container in self.containers)

    @property
    def why(self) -> str:
        """Why it is not ready, in a word or two; empty when that says itself."""
        if self.phase is Phase.WAITING:
            return "unschedulable" if self.unschedulable else ""
        if self.reason:
            return self.reason
        for container in self.containers:
            if container.waiting and container.waiting not in ("ContainerCreating", "PodInitializing"):
                ended = container.last
                return f"{container.waiting}: {ended.reason}" if ended and ended.reason else container.waiting
        for container in self.containers:
            if container.init and container.running and not container.ready:
                return f"init: {container.name}"
        return ""


@dataclass(frozen=True, slots=True)
class Warning:
    """An event that warns.

    Args:
        kind, name: the object that it is about.
        seen: when it came last, seconds since the epoch.
    """

    kind: str
    name: str
    reason: str
    message: str
    seen: float


@dataclass(frozen=True, slots=True)
class Workload:
    """A Deployment or a Job.

    Args:
        wanted: pods that it should have.
        ready: pods of its newest template that are ready (Job: that succeeded).
        others: pods that are still there and are to go: of an older template, or too many.
        settled: whether the controller has seen its newest specification.
        refused: why it cannot make pods, in the API's own words; empty when it can.
        overdue: whether its progress deadline is over (Job: whether it failed).
        overdue_message: what the controller says about that.
    """

    kind: str
    name: str
    role: str
    wanted: int
    ready: int = 0
    others: int = 0
    settled: bool = True
    refused: str = ""
    overdue: bool = False
    overdue_message: str = ""

    @property
    def complete(self) -> bool:
        """Whether all that it should have is there, and nothing else."""
        return self.settled and self.ready >= self.wanted and self.others == 0


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All of a deployment at one moment.

    Args:
        at: seconds since the epoch.
    """

    at: float
    pods: tuple[Pod, ...] = ()
    workloads: tuple[Workload, ...] = ()
    warnings: tuple[Warning, ...] = ()

    def of_role(self, role: str) -> tuple[Pod, ...]:
        """The pods of a role."""
        return tuple(pod for pod in self.pods if pod.role == role)

    @property
    def complete(self) -> bool:
        """Whether every workload is."""
        return bool(self.workloads) and all(workload.complete for workload in self.workloads)


def seconds(text: str | None) -> float:
    """Read a time of the API; 0 when there is none."""
    return datetime.fromisoformat(text).timestamp() if text else 0.0


def role_of(thing: Object) -> str:
    """Give an object's role, from the labels that the charts set."""
    labels = thing["metadata"].get("labels") or {}
    role: str = labels.get("llm-d.ai/role") or labels.get("app.kubernetes.io/component") or ""
    return role


def _ended(state: Object | None) -> Ended | None:
    told = (state or {}).get("terminated")
    if not told:
        return None
    code = int(told.get("exitCode", 0))
    return Ended(told.get("reason") or ("Completed" if code == 0 else "Error"), code, told.get("message") or "")


def _container(status: Object, init: bool) -> Container:
    state = status.get("state") or {}
    waiting = state.get("waiting") or {}
    return Container(
        status["name"], status.get("image", ""), init,
        ready=bool(status.get("ready")), running="running" in state, started=bool(status.get("started")),
        waiting=waiting.get("reason") or ("ContainerCreating" if waiting else ""), message=waiting.get("message") or "",
        restarts=int(status.get("restartCount", 0)), last=_ended(state) or _ended(status.get("lastState")),
    )  # fmt: skip


def read_pod(thing: Object) -> Pod:
    """Read a pod."""
    meta, status = thing["metadata"], thing.get("status") or {}
    containers = tuple(
        _container(one, init)
        for init, field in ((True, "initContainerStatuses"), (False, "containerStatuses"))
        for one in status.get(field) or ()
    )
    conditions = {one["type"]: one for one in status.get("conditions") or ()}
    scheduled = conditions.get("PodScheduled") or {}
    unschedulable = scheduled.get("message", "") if scheduled.get("reason") == "Unschedulable" else ""
    node = (thing.get("spec") or {}).get("nodeName") or ""
    return Pod(
        meta["name"], meta.get("uid", ""), role_of(thing), _phase(meta, status, conditions, containers, node),
        seconds(meta.get("creationTimestamp")), node, status.get("podIP") or "", containers, unschedulable,
        status.get("reason") or "", status.get("message") or "",
    )  # fmt: skip


def _phase(
    meta: Object, status: Object, conditions: Mapping[str, Object], containers: tuple[Container, ...], node: str
) -> Phase:
    if meta.get("deletionTimestamp"):
        return Phase.STOPPING
    if over := {"Succeeded": Phase.DONE, "Failed": Phase.FAILED}.get(status.get("phase", "")):
        return over
    if (conditions.get("Ready") or {}).get("status") == "True":
        return Phase.READY
    if not node:
        return Phase.WAITING
    if any(one.waiting == "CrashLoopBackOff" or (one.last and one.last.code and not one.running) for one in containers):
        return Phase.CRASHING
    if any(one.running for one in containers if not one.init):
        return Phase.STARTING
    return Phase.PREPARING


def read_workload(thing: Object) -> Workload:
    """Read a Deployment or a Job."""
    meta, spec, status = thing["metadata"], thing["spec"], thing.get("status") or {}
    conditions = {one["type"]: one for one in status.get("conditions") or ()}
    if thing["kind"] == "Job":
        failed = conditions.get("Failed") or {}
        return Workload(
            "Job", meta["name"], role_of(thing), int(spec.get("completions") or 1), int(status.get("succeeded", 0)),
            overdue=failed.get("status") == "True", overdue_message=failed.get("message", ""),
        )  # fmt: skip
    refused = conditions.get("ReplicaFailure") or {}
    progress = conditions.get("Progressing") or {}
    updated, there = int(status.get("updatedReplicas", 0)), int(status.get("replicas", 0))
    wanted = int(spec.get("replicas", 1))
    overdue = progress.get("status") == "False" and progress.get("reason") == "ProgressDeadlineExceeded"
    return Workload(
        "Deployment", meta["name"], role_of(thing), wanted,
        # availableReplicas counts pods of old templates, too: the total less the updated ones
        ready=max(0, min(updated, int(status.get("availableReplicas", 0)) - max(0, there - updated))),
        others=max(0, there - updated, there - wanted),
        settled=int(status.get("observedGeneration", 0)) >= int(meta.get("generation", 1)),
        refused=refused.get("message", "") if refused.get("status") == "True" else "",
        overdue=overdue, overdue_message=progress.get("message", "") if overdue else "",
    )  # fmt: skip


def _read_warning(event: Object) -> Warning:
    about = event.get("involvedObject") or event.get("regarding") or {}
    series = event.get("series") or {}
    seen = (
        series.get("lastObservedTime") or event.get("lastTimestamp") or event.get("eventTime")
        or event["metadata"].get("creationTimestamp")
    )  # fmt: skip
    message = event.get("message") or event.get("note") or ""
    return Warning(about.get("kind", ""), about.get("name", ""), event.get("reason") or "", message, seconds(seen))


def read_snapshot(
    at: float, pods: Iterable[Object], workloads: Iterable[Object], events: Iterable[Object] = ()
) -> Snapshot:
    """Read lists of pods, Deployments and Jobs, and events. Events older than their object's pods are kept as well."""
    order = {role: place for place, role in enumerate(ROLES)}
    read = sorted(map(read_pod, pods), key=lambda pod: (order.get(pod.role, len(order)), pod.created, pod.name))
    warnings = sorted(
        (_read_warning(one) for one in events if one.get("type") == "Warning"), key=lambda one: (-one.seen, one.name)
    )
    return Snapshot(at, tuple(read), tuple(map(read_workload, workloads)), tuple(warnings))
