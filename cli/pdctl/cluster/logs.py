"""The logs of all pods of a role as one, in order of time."""

import asyncio
import heapq
from collections.abc import AsyncGenerator
from typing import Any

from pdctl.cluster import paths
from pdctl.cluster.api import ApiError, Cluster, Unreachable
from pdctl.cluster.observe import AT_ONCE, PART
from pdctl.cluster.screen import short
from pdctl.podstate import Phase, Pod, read_pod
from pdctl.podstate.state import Container
from pdctl.targets.target import LogQuery

LOOK_SECONDS = 2.0  # between two looks for pods that are new
FROM_START = 10_000_000

Line = tuple[str, str, str]  # time, member, text


async def _pods(cluster: Cluster, namespace: str, member: str | None) -> list[Pod]:
    things = await cluster.list(paths.namespaced("pods", namespace), PART)
    pods = [read_pod(thing) for thing in things]
    return [pod for pod in pods if member in (None, pod.role, pod.name, short(pod))]


def _of_interest(pod: Pod) -> Container | None:
    """Give the container whose log is of interest: an init container only while it is all there is."""
    begun = [one for one in pod.containers if one.running or one.last or one.ready]
    return begun[-1] if begun else None


def _container(pod: Pod) -> dict[str, str]:
    chosen = _of_interest(pod)
    return {"container": chosen.name} if chosen else {}


def _split(text: str, member: str) -> Line:
    at, _, line = text.partition(" ")
    return at, member, line


def _order(at: str) -> str:
    """Give what times are compared by: zeros at their ends may be left out."""
    return at.removesuffix("Z")


async def read(cluster: Cluster, namespace: str, query: LogQuery) -> list[tuple[str, str]]:
    """Read the last lines of each pod, merged by time."""
    gate = asyncio.Semaphore(AT_ONCE)

    async def lines(pod: Pod) -> list[Line]:
        asked: dict[str, Any] = {"timestamps": "true", "tailLines": query.tail, **_container(pod)}
        if query.previous:
            asked["previous"] = "true"
        if query.since is not None:
            asked["sinceSeconds"] = max(1, int(query.since))
        async with gate:
            text = await cluster.log(namespace, pod.name, **asked)
        return [_split(line, short(pod)) for line in text.splitlines()]

    pods = await _pods(cluster, namespace, query.member)
    found = await asyncio.gather(*(lines(pod) for pod in pods))
    return [(member, line) for _, member, line in heapq.merge(*found)]


async def stream(cluster: Cluster, namespace: str, query: LogQuery) -> AsyncGenerator[tuple[str, str], None]:
    """Give lines as they come, also of pods and restarted containers that come later; without end."""
    queue: asyncio.Queue[tuple[str, str]] = asyncio.Queue(10_000)
    following: dict[tuple[str, int], asyncio.Task[None]] = {}
    until: dict[tuple[str, int], str] = {}  # the time of the last line

    async def one(pod: Pod, tail: int) -> None:
        key = (pod.uid, pod.restarts)
        asked: dict[str, Any] = {"timestamps": "true", "tailLines": tail, **_container(pod)}
        if key in until:
            asked |= {"tailLines": FROM_START, "sinceTime": until[key]}
        elif query.since is not None:
            asked["sinceSeconds"] = max(1, int(query.since))
        async for line in cluster.follow(namespace, pod.name, **asked):
            at, member, text = _split(line, short(pod))
            if not at[:1].isdigit():  # the kubelet's own words
                await queue.put((member, line))
            elif _order(at) > _order(until.get(key, "")):  # sinceTime means the whole of that second
                until[key] = at
                await queue.put((member, text))

    async def look() -> None:
        first = True
        while True:
            try:
                pods = await _pods(cluster, namespace, query.member)
            except (ApiError, Unreachable):
                pods = []  # it comes back, or the streams end and Ctrl-C ends this
            for pod in pods:
                begun = any(one.running for one in pod.containers)
                known = following.get((pod.uid, pod.restarts))
                if known is not None:  # a stream also ends when the API is restarted, or something between breaks it
                    chosen = _of_interest(pod)
                    begun = known.done() and chosen is not None and chosen.running
                if begun and pod.phase is not Phase.DONE:
                    tail = query.tail if first else FROM_START
                    following[pod.uid, pod.restarts] = asyncio.ensure_future(one(pod, tail))
            first = False
            await asyncio.sleep(LOOK_SECONDS)

    looking = asyncio.ensure_future(look())
    try:
        while True:
            yield await queue.get()
    finally:
        for task in (looking, *following.values()):
            task.cancel()
