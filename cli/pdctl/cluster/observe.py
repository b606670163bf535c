"""Looks at a deployment in the cluster again and again; what it sees is judged by `podstate`."""

import asyncio
import contextlib
import re
import time
from dataclasses import dataclass, field
from typing import Any

from pdctl.cluster import paths
from pdctl.cluster.api import ApiError, Cluster
from pdctl.cluster.releases import ROUTER
from pdctl.podstate.state import Phase, Pod, Snapshot, read_snapshot

PART = "app.kubernetes.io/part-of=pdctl"
COMPONENT = "app.kubernetes.io/component"
BESIDE = ("test", "eval")  # no parts of a deployment: they stand beside it for a while
_OUR_ROUTER = "app.kubernetes.io/name=pd-router"
TAIL_LINES = 30
LOG_EVERY = 3.0  # seconds between two looks at the last log line of a pod that is not ready
AT_ONCE = 8
_PROGRESS = re.compile(r"(?P<what>[\w.\-/ ]{0,60}):\s*(?P<percent>\d{1,3})%\|")


@dataclass(slots=True)
class Observer:
    """Takes snapshots of a namespace.

    Args:
        tails: last lines of the logs of containers that crashed, by pod.
        last_lines: the newest line of the logs of pods that are not ready, by pod.
        raw: the objects of the last snapshot, for the evidence.
        last: that snapshot.
    """

    cluster: Cluster
    namespace: str
    tails: dict[str, list[str]] = field(default_factory=dict)
    last_lines: dict[str, str] = field(default_factory=dict)
    raw: dict[str, list[Any]] = field(default_factory=dict)
    last: Snapshot = field(default_factory=lambda: Snapshot(0.0))
    _restarts: dict[str, int] = field(default_factory=dict)
    _logged: float = 0.0

    async def snapshot(self) -> Snapshot:
        """Look once."""
        kinds = ("pods", "deployments", "jobs", "replicasets")
        found = await asyncio.gather(
            *(self.cluster.list(paths.namespaced(kind, self.namespace), PART) for kind in kinds), self._events()
        )
        pods, deployments, jobs, sets, events = found
        pods, jobs = ([one for one in some if one["metadata"]["labels"].get(COMPONENT) not in BESIDE]
                      for some in (pods, jobs))  # fmt: skip
        for kind, items in (("Deployment", deployments), ("Job", jobs)):
            for item in items:
                item["kind"] = kind  # the API leaves it out within lists
        self.raw = {"pods": pods, "deployments": deployments, "jobs": jobs, "replicasets": sets, "events": events}
        snapshot = read_snapshot(time.time(), pods, [*deployments, *jobs], events)
        await self._read_logs(snapshot)
        self.last = snapshot
        return snapshot

    async def _events(self) -> list[Any]:
        try:
            return await self.cluster.list(paths.namespaced("events", self.namespace), fields="type=Warning")
        except ApiError:
            return []

    async def _read_logs(self, snapshot: Snapshot) -> None:
        pods = {pod.name: pod for pod in snapshot.pods}
        for known in (self.tails, self.last_lines, self._restarts):
            for name in [name for name in known if name not in pods]:
                del known[name]
        ended = [
            pod for pod in snapshot.pods
            if pod.phase in (Phase.CRASHING, Phase.FAILED) or (pod.restarts and pod.phase is not Phase.READY)
        ]  # fmt: skip
        fresh = [pod for pod in ended if self._restarts.get(pod.name, -1) != pod.restarts or pod.name not in self.tails]
        gate = asyncio.Semaphore(AT_ONCE)

        async def tail(pod: Pod) -> None:
            async with gate:
                previous = any(one.restarts for one in pod.containers) and pod.phase is not Phase.FAILED
                told = await self._log(pod, TAIL_LINES, previous) or await self._log(pod, TAIL_LINES, not previous)
            self._restarts[pod.name] = pod.restarts
            if told:
                self.tails[pod.name] = told

        async def last(pod: Pod) -> None:
            async with gate:
                told = await self._log(pod, 1, False)
            if told:
                self.last_lines[pod.name] = progress(told[-1])

        work = [tail(pod) for pod in fresh]
        if time.monotonic() - self._logged > LOG_EVERY:
            self._logged = time.monotonic()
            work += [last(pod) for pod in snapshot.pods if pod.phase is Phase.STARTING or _runs_init(pod)]
        await asyncio.gather(*work)

    async def _log(self, pod: Pod, lines: int, previous: bool) -> list[str]:
        query: dict[str, Any] = {"tailLines": lines} | ({"previous": "true"} if previous else {})
        running = [one for one in pod.containers if one.running or one.last]
        if running:
            query["container"] = running[-1].name
        try:
            return (await self.cluster.log(self.namespace, pod.name, **query)).splitlines()
        except ApiError:
            return []


async def serving(cluster: Cluster, namespace: str) -> str:
    """Give the release whose router clients reach: that which the selector of our router's Service names."""
    with contextlib.suppress(ApiError):  # no right to see Services: then nobody is told that another one serves
        for service in await cluster.list(paths.namespaced("services", namespace), f"{PART},{_OUR_ROUTER}"):
            release: str = service["spec"]["selector"]["app.kubernetes.io/instance"]
            return release
    return ROUTER


def _runs_init(pod: Pod) -> bool:
    return pod.phase is Phase.PREPARING and any(one.init and one.running for one in pod.containers)


def progress(line: str) -> str:
    """Give what a log line shows on a screen: of a progress bar that overwrites itself, its last state."""
    shown = line.rstrip("\r\n").rsplit("\r", 1)[-1].strip()
    if found := _PROGRESS.search(shown):
        return f"{found['what'].strip()}: {found['percent']} %"
    return shown
