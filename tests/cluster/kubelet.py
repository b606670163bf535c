"""A kubelet for fake nodes: runs their pods as local processes and says in the API how they fare.

    python -m cluster.kubelet FOLDER URL NODE…

It follows a pod as a real kubelet does: address, volumes and environment, init containers, containers, readiness by
the pod's own probes, restarts with back-off, preStop sleep, SIGTERM, grace, end. What it leaves out is in
docs/clusters.md. Faults are asked for by annotations of a pod, under `fault.pdctl.test/`:

    start-seconds: "5"     so long until the program starts, as if a model were loaded
    out-of-memory: "1"     killed by the kernel whenever it has started
    image: "…"             the image cannot be pulled, with this message
"""

import asyncio
import base64
import contextlib
import json
import multiprocessing
import os
import pathlib
import signal
import ssl
import sys
import time
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from multiprocessing.reduction import DupFd
from typing import Any

import httpx

from .containers import ENTRY_POINTS, INTERPRETERS, PRELOADED, Start, run
from .fake_nodes import PROGRAMS

FAULT = "fault.pdctl.test/"
KWOK = "/apis/kwok.x-k8s.io/v1alpha1/namespaces"
SLICES = "/apis/discovery.k8s.io/v1/namespaces/{}/endpointslices"
BACK_OFF = (1.0, 2.0, 4.0, 8.0, 16.0, 30.0)  # seconds; a real one begins at 10
TAIL = 2048  # bytes of a log in a container's last words, as the kubelet has it

Json = dict[str, Any]
_context = multiprocessing.get_context("forkserver")


def now() -> str:
    """Give the time as Kubernetes writes it."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class Waiting(Exception):  # noqa: N818
    """The pod cannot go on for now; the reason and message become its container's."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class Log:
    """A container's log as the kubelet keeps it, which kwok reads; and its end."""

    def __init__(self, file: pathlib.Path) -> None:
        self.file = file
        self._open = file.open("ab")
        self._rest = b""
        self.end = b""

    def feed(self, data: bytes) -> None:
        """Take what the program wrote."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            at = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%f000Z")
            self._open.write(f"{at} stdout F ".encode() + line + b"\n")
            self.end = (self.end + line + b"\n")[-TAIL:]
        self._open.flush()

    def close(self) -> None:
        """Write the rest."""
        if self._rest:
            self.feed(b"\n")
        self._open.close()


@dataclass
class Container:
    """A container of a pod: its process while there is one, and its status."""

    spec: Json
    restarts: int = 0
    state: Json = field(default_factory=lambda: {"waiting": {"reason": "ContainerCreating"}})
    last: Json = field(default_factory=dict)
    ready: bool = False
    process: Any = None

    def status(self) -> Json:
        """Give it as `containerStatuses` has it."""
        running = "running" in self.state
        return {
            "name": self.spec["name"],
            "image": self.spec["image"],
            "imageID": "",
            "ready": self.ready,
            "started": running,
            "restartCount": self.restarts,
            "state": {"$patch": "replace", **self.state},
            "lastState": {"$patch": "replace", **self.last},
        }

    def signal(self, number: int) -> None:
        """Send a signal to its process, if there is one."""
        if self.process is not None and self.process.is_alive():
            os.kill(self.process.pid, number)


class Api:
    """The few calls that a kubelet makes; each is repeated while the API server is away."""

    def __init__(self, folder: pathlib.Path, url: str) -> None:
        context = ssl.create_default_context(cafile=str(folder / "ca.crt"))
        context.load_cert_chain(folder / "admin.crt", folder / "admin.key")
        self.client = httpx.AsyncClient(base_url=url, verify=context, timeout=10, trust_env=False)

    async def call(self, method: str, path: str, body: Json | None = None, kind: str = "application/json") -> Json:
        """Call; a 404 or 409 gives an empty answer."""
        while True:
            try:
                answer = await self.client.request(
                    method, path, content=None if body is None else json.dumps(body), headers={"Content-Type": kind}
                )
            except httpx.HTTPError:
                await asyncio.sleep(0.2)
                continue
            if answer.status_code in (404, 409):
                return {}
            if answer.status_code >= 500 or answer.status_code == 429:
                await asyncio.sleep(0.2)
                continue
            if answer.is_error:
                print(f"{method} {path}: {answer.status_code} {answer.text}", flush=True)
                return {}
            found: Json = answer.json()
            return found


class Pod:
    """One pod from its assignment to a node until it is gone."""

    def __init__(self, api: Api, folder: pathlib.Path, told: Json, address: str) -> None:
        self.api = api
        self.told = told
        self.address = address
        self.name, self.namespace = told["metadata"]["name"], told["metadata"]["namespace"]
        self.uid = told["metadata"]["uid"]
        self.path = f"/api/v1/namespaces/{self.namespace}/pods/{self.name}"
        self.logs = folder / "logs" / f"{self.namespace}_{self.name}_{self.uid}"
        self.inits = [Container(one) for one in told["spec"].get("initContainers", ())]
        self.containers = [Container(one) for one in told["spec"]["containers"]]
        self.phase = "Pending"
        self.started_at = now()
        self.leaving = asyncio.Event()
        self.task = asyncio.create_task(self._live(), name=self.name)
        self._told: Json | None = None

    def update(self, told: Json) -> None:
        """Take a newer state of the object."""
        self.told = told
        if told["metadata"].get("deletionTimestamp"):
            self.leaving.set()

    def gone(self) -> None:
        """Kill what runs: the object is no longer there."""
        for one in (*self.inits, *self.containers):
            one.signal(signal.SIGKILL)
        self.task.cancel()

    def fault(self, name: str) -> str | None:
        """Give the value of a fault that is asked for."""
        value: str | None = self.told["metadata"].get("annotations", {}).get(FAULT + name)
        return value

    async def _live(self) -> None:
        try:
            self.logs.mkdir(parents=True)
            running = asyncio.create_task(self._run())
            leaving = asyncio.create_task(self.leaving.wait())
            await asyncio.wait([running, leaving], return_when=asyncio.FIRST_COMPLETED)
            if not leaving.done():
                running.result()
                await leaving
            await self._leave(running)
        except Exception as error:
            print(f"{self.namespace}/{self.name}: {error!r}", flush=True)
            raise

    async def _run(self) -> None:
        await self._say()
        await self._debuggable()
        for container in self.inits:
            while (status := await self._once(container)) != 0:
                container.restarts += 1
                if self.told["spec"]["restartPolicy"] == "Never":
                    return await self._end("Failed")
                await self._back_off(container, status)
        statuses = await asyncio.gather(*(self._keep(container) for container in self.containers))
        await self._end("Succeeded" if not any(statuses) else "Failed")
        return None

    async def _keep(self, container: Container) -> int:
        """Run a container for as long as its pod's policy says; give its exit status."""
        while True:
            status = await self._once(container)
            policy = self.told["spec"]["restartPolicy"]
            if self.leaving.is_set() or policy == "Never" or (policy == "OnFailure" and status == 0):
                return status
            container.restarts += 1
            if container.restarts > 1:
                await self._back_off(container, status)

    async def _back_off(self, container: Container, status: int) -> None:
        seconds = BACK_OFF[min(container.restarts, len(BACK_OFF)) - 1]
        what = f"back-off {seconds:g}s restarting failed container={container.spec['name']} pod={self.name}"
        container.last, container.state = container.state, {"waiting": {"reason": "CrashLoopBackOff", "message": what}}
        await self._say()
        await self._event("Warning", "BackOff", what)
        await asyncio.sleep(seconds)

    async def _once(self, container: Container) -> int:
        """Run a container until it ends."""
        start = await self._start_of(container)
        if "terminated" in container.state:
            container.last = container.state
        await asyncio.sleep(float(self.fault("start-seconds") or 0))
        began, at = time.monotonic(), now()
        file = self.logs / f"{container.spec['name']}.log"
        if file.exists():
            file.replace(file.with_suffix(".previous.log"))
        log = Log(file)
        reading, writing = os.pipe()
        process = _context.Process(target=run, args=(start, DupFdIn(writing)), daemon=True)
        container.process = process
        process.start()
        os.close(writing)
        self._number(container).write_text(str(process.pid))
        container.state = {"running": {"startedAt": at}}
        if container in self.containers:
            self.phase = "Running"
        if self.fault("out-of-memory"):
            asyncio.get_running_loop().call_later(0.05, container.signal, signal.SIGKILL)
        await self._say()
        await self._event("Normal", "Started", f"Container started: {container.spec['name']}")
        probing = asyncio.create_task(self._probe(container, began))
        try:
            await _copy(reading, log)
            await asyncio.to_thread(process.join)
        finally:
            probing.cancel()
            log.close()
        status = process.exitcode if process.exitcode >= 0 else 128 - process.exitcode
        killed = self.fault("out-of-memory") and status == 128 + signal.SIGKILL
        reason = "OOMKilled" if killed else "Completed" if status == 0 else "Error"
        ended: Json = {"exitCode": status, "reason": reason, "startedAt": at, "finishedAt": now()}
        if status != 0 and container.spec.get("terminationMessagePolicy") == "FallbackToLogsOnError":
            ended["message"] = log.end.decode(errors="replace")
        container.state, container.ready = {"terminated": ended}, False
        await self._say()
        return int(status)

    async def _start_of(self, container: Container) -> Start:
        """Gather what a container starts with, waiting for what is not there yet."""
        pause = 0.5
        while True:
            try:
                return await self._gathered(container)
            except Waiting as why:
                container.state = {"waiting": {"reason": why.reason, "message": str(why)}}
                await self._say()
                await self._event("Warning", "Failed", str(why))
                if why.reason == "ErrImagePull":
                    await asyncio.sleep(1)
                    back = f'Back-off pulling image "{container.spec["image"]}": ErrImagePull: {why}'
                    container.state = {"waiting": {"reason": "ImagePullBackOff", "message": back}}
                    await self._say()
                await asyncio.sleep(pause)
                pause = min(2 * pause, 10)

    async def _gathered(self, container: Container) -> Start:
        spec = container.spec
        image = spec["image"]
        refused = self.fault("image")
        if refused:
            raise Waiting("ErrImagePull", f'failed to pull and unpack image "{image}": {refused}')
        name = image.rpartition("@")[0] or image.rpartition(":")[0]
        name = name.rpartition("/")[2]
        command = [*(spec.get("command") or ENTRY_POINTS.get(name, [])), *spec.get("args", ())]
        if command[:1] == ["python3"] and name in INTERPRETERS:
            command[0] = INTERPRETERS[name]
        if not command:
            raise Waiting("RunContainerError", f"the fake node does not know what image {image} starts")
        files = await self._files(spec)
        environment = {
            "PATH": "/usr/bin:/bin",
            "HOSTNAME": self.name,
            "KUBERNETES_SERVICE_HOST": self.api.client.base_url.host,
            "KUBERNETES_SERVICE_PORT": str(self.api.client.base_url.port),
        }
        for one in spec.get("env", ()):
            environment[one["name"]] = self._emptied(spec, await self._value(one))
        return Start(command, environment, self.address, files, str(await self._hosts()))

    def _emptied(self, spec: Json, value: str) -> str:
        """Name the folder here that stands for an empty one of the pod, which the environment names."""
        empty = {one["name"] for one in self.told["spec"].get("volumes", ()) if "emptyDir" in one}
        for mount in spec.get("volumeMounts", ()):
            if mount["name"] in empty and value == mount["mountPath"]:
                folder = self.logs / mount["name"]
                folder.mkdir(exist_ok=True)
                return str(folder)
        return value

    async def _value(self, told: Json) -> str:
        source = told.get("valueFrom")
        if source is None:
            return str(told.get("value", ""))
        if "fieldRef" in source:
            path = source["fieldRef"]["fieldPath"]
            known = {"status.podIP": self.address, "metadata.name": self.name, "metadata.namespace": self.namespace}
            return str(known[path])
        asked = source["secretKeyRef"]
        found = await self._data("secrets", asked["name"])
        if found is None:
            raise Waiting("CreateContainerConfigError", f'secret "{asked["name"]}" not found')
        if asked["key"] not in found:
            what = f"couldn't find key {asked['key']} in Secret {self.namespace}/{asked['name']}"
            raise Waiting("CreateContainerConfigError", what)
        return found[asked["key"]].decode()

    async def _data(self, kind: str, name: str) -> dict[str, bytes] | None:
        told = await self.api.call("GET", f"/api/v1/namespaces/{self.namespace}/{kind}/{name}")
        if not told:
            return None
        read = base64.b64decode if kind == "secrets" else str.encode
        return {key: read(value) for key, value in told.get("data", {}).items()}

    async def _files(self, spec: Json) -> dict[str, bytes]:
        volumes = {one["name"]: one for one in self.told["spec"].get("volumes", ())}
        files: dict[str, bytes] = {}
        for mount in spec.get("volumeMounts", ()):
            volume = volumes[mount["name"]]
            where = mount["mountPath"].replace("/var/run/", "/run/")
            if "projected" in volume:
                files |= {f"{where}/{name}": data for name, data in (await self._account()).items()}
                continue
            for kind, key in (("configMap", "name"), ("secret", "secretName")):
                if kind not in volume:
                    continue
                data = await self._data(f"{kind.lower()}s", volume[kind][key])
                if data is None:
                    what = f'MountVolume.SetUp failed for volume "{mount["name"]}": {kind.lower()}'
                    raise Waiting("ContainerCreating", f'{what} "{volume[kind][key]}" not found')
                chosen = volume[kind].get("items") or [{"key": one, "path": one} for one in data]
                files |= {f"{where}/{one['path']}": data[one["key"]] for one in chosen}
        return files

    async def _account(self) -> dict[str, bytes]:
        """Make a token of the pod's service account, bound to the pod as the kubelet does it."""
        account = self.told["spec"].get("serviceAccountName", "default")
        bound = {"apiVersion": "v1", "kind": "Pod", "name": self.name, "uid": self.uid}
        body = {"spec": {"expirationSeconds": 3607, "boundObjectRef": bound}}
        path = f"/api/v1/namespaces/{self.namespace}/serviceaccounts/{account}/token"
        token = (await self.api.call("POST", path, body))["status"]["token"]
        authority = (await self._data("configmaps", "kube-root-ca.crt") or {}).get("ca.crt")
        if authority is None:
            raise Waiting("ContainerCreating", 'configmap "kube-root-ca.crt" not found')
        return {"token": token.encode(), "ca.crt": authority, "namespace": self.namespace.encode()}

    async def _hosts(self) -> pathlib.Path:
        """Give the file that names the Services of the namespace."""
        slices = await self.api.call("GET", f"{SLICES.format(self.namespace)}")
        self.name_services(slices.get("items", ()))
        return self.logs / "hosts"

    def name_services(self, slices: Iterable[Json]) -> None:
        """Name the Services of the namespace, each by a ready pod's address: there is no DNS and no proxy here."""
        lines = ["127.0.0.1 localhost", f"{self.address} {self.name}"]
        for one in slices:
            service = one["metadata"].get("labels", {}).get("kubernetes.io/service-name")
            ready = [end["addresses"][0] for end in one.get("endpoints") or () if end["conditions"].get("ready")]
            if service and ready:
                own = f"{service}.{self.namespace}"
                lines.append(f"{ready[0]} {service} {own} {own}.svc {own}.svc.cluster.local")
        with contextlib.suppress(FileNotFoundError):  # not begun yet
            (self.logs / "hosts").write_text("\n".join(lines) + "\n")  # in place: it is mounted

    async def _probe(self, container: Container, began: float) -> None:
        """Say when the container is ready, and when no longer, by its readiness probe."""
        probe = container.spec.get("readinessProbe")
        if probe is None:
            container.ready = True
            return await self._say()
        get = probe["httpGet"]
        ports = {one["name"]: one["containerPort"] for one in container.spec.get("ports", ()) if "name" in one}
        scheme = get.get("scheme", "HTTP").lower()
        url = f"{scheme}://{self.address}:{ports.get(get['port'], get['port'])}{get['path']}"
        failures = 0
        async with httpx.AsyncClient(verify=False, trust_env=False, timeout=probe.get("timeoutSeconds", 1)) as client:
            while True:
                try:
                    good = (await client.get(url)).is_success
                except httpx.HTTPError:
                    good = False
                failures = 0 if good else failures + 1
                ready = good or (container.ready and failures < probe.get("failureThreshold", 3))
                if ready != container.ready:
                    container.ready = ready
                    await self._say()
                # A real kubelet looks each period; while it is not ready, waiting for that would only cost time.
                await asyncio.sleep(probe.get("periodSeconds", 10) if ready else 0.2)

    async def _leave(self, running: asyncio.Task[None]) -> None:
        """End the pod as its grace period says: preStop, SIGTERM, SIGKILL."""
        grace = self.told["metadata"].get("deletionGracePeriodSeconds") or 0
        deadline = time.monotonic() + grace
        if not running.done() and grace:
            sleeps = [one.spec.get("lifecycle", {}).get("preStop", {}).get("sleep") for one in self.containers]
            await asyncio.sleep(min(grace, max((one["seconds"] for one in sleeps if one), default=0)))
        everything = (*self.inits, *self.containers)
        for one in everything:
            one.signal(signal.SIGTERM)
        while any(one.process and one.process.is_alive() for one in everything):
            if time.monotonic() > deadline:
                for one in everything:
                    one.signal(signal.SIGKILL)
            await asyncio.sleep(0.05)
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running
        # Before the pod: this task is cancelled as soon as the watch says that the pod is gone.
        for kind in ("execs", "logs", "portforwards"):
            await self.api.call("DELETE", f"{KWOK}/{self.namespace}/{kind}/{self.name}")
        await self.api.call("DELETE", self.path, {"gracePeriodSeconds": 0, "preconditions": {"uid": self.uid}})

    async def _end(self, phase: str) -> None:
        self.phase = phase
        await self._say()

    async def _say(self) -> None:
        """Write the pod's status, when it is another than before."""
        initialised = all(one.state.get("terminated", {}).get("exitCode") == 0 for one in self.inits)
        ready = self.phase == "Running" and all(one.ready for one in self.containers)
        told = {
            "Initialized": (initialised, "ContainersNotInitialized"),
            "ContainersReady": (ready, "PodCompleted" if self.phase == "Succeeded" else "ContainersNotReady"),
            "Ready": (ready, "PodCompleted" if self.phase == "Succeeded" else "ContainersNotReady"),
        }
        before = {} if self._told is None else {one["type"]: one for one in self._told["conditions"]}
        conditions = []
        for name, (holds, reason) in told.items():
            status = str(holds)
            same = name in before and before[name]["status"] == status
            since = before[name]["lastTransitionTime"] if same else now()
            conditions.append({"type": name, "status": status, "lastTransitionTime": since,
                               "reason": None if holds else reason})  # fmt: skip
        status = {
            "phase": self.phase,
            "hostIP": "127.0.0.1",
            "podIP": self.address,
            "podIPs": [{"ip": self.address}],
            "startTime": self.started_at,
            "conditions": conditions,
            "containerStatuses": [one.status() for one in self.containers],
            "initContainerStatuses": [one.status() for one in self.inits],
        }
        if status == self._told:
            return
        self._told = status
        body = {"metadata": {"uid": self.uid}, "status": status}
        await self.api.call("PATCH", f"{self.path}/status", body, "application/strategic-merge-patch+json")

    async def _event(self, kind: str, reason: str, message: str) -> None:
        about = {"apiVersion": "v1", "kind": "Pod", "name": self.name, "namespace": self.namespace, "uid": self.uid}
        body = {
            "metadata": {"generateName": f"{self.name}.", "namespace": self.namespace},
            "involvedObject": about,
            "type": kind,
            "reason": reason,
            "message": message,
            "source": {"component": "kubelet", "host": self.told["spec"]["nodeName"]},
            "firstTimestamp": now(),
            "lastTimestamp": now(),
            "count": 1,
        }
        await self.api.call("POST", f"/api/v1/namespaces/{self.namespace}/events", body)

    async def _debuggable(self) -> None:
        """Tell kwok where this pod's logs are, where its ports, and how a command gets into its containers."""
        logs = [
            {
                "containers": [one.spec["name"]],
                "logsFile": str(self.logs / f"{one.spec['name']}.log"),
                "previousLogsFile": str(self.logs / f"{one.spec['name']}.previous.log"),
                "follow": True,
            }
            for one in (*self.inits, *self.containers)
        ]
        ports = {port["containerPort"] for one in self.containers for port in one.spec.get("ports", ())}
        ports |= {29001}  # the router's admin port, which a chart does not declare
        forwards = [{"ports": [port], "target": {"address": self.address, "port": port}} for port in sorted(ports)]
        execs = [{"containers": [one.spec["name"]], "local": {"envs": self._within(one)}} for one in self.containers]
        owner = {"apiVersion": "v1", "kind": "Pod", "name": self.name, "uid": self.uid}
        for plural, kind, spec in (
            ("execs", "Exec", {"execs": execs}),
            ("logs", "Logs", {"logs": logs}),
            ("portforwards", "PortForward", {"forwards": forwards}),
        ):
            body = {
                "apiVersion": "kwok.x-k8s.io/v1alpha1",
                "kind": kind,
                "metadata": {"name": self.name, "namespace": self.namespace, "ownerReferences": [owner]},
                "spec": spec,
            }
            await self.api.call("POST", f"{KWOK}/{self.namespace}/{plural}", body)

    def _number(self, container: Container) -> pathlib.Path:
        """Give the file with the number of a container's process, by whose mounts others get into it."""
        return self.logs / f"{container.spec['name']}.pid"

    def _within(self, container: Container) -> list[Json]:
        environment = {
            "PATH": f"{PROGRAMS}:/usr/bin:/bin",
            "CONTAINER": str(self._number(container)),
            "PYTHON": sys.executable,
            "PYTHONPATH": str(PROGRAMS.parent.parent),
        }
        return [{"name": name, "value": value} for name, value in environment.items()]


class DupFdIn:
    """A descriptor that goes to the forked process."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __reduce__(self) -> Any:
        return _received, (DupFd(self.number),)


def _received(sent: Any) -> int:
    number: int = sent.detach()
    return number


async def _copy(reading: int, log: Log) -> None:
    """Copy what comes through a pipe until nobody holds its other end."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    transport, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(reading, "rb"))
    try:
        while data := await reader.read(65536):
            log.feed(data)
    finally:
        transport.close()


class Kubelet:
    """All pods of some nodes."""

    def __init__(self, folder: pathlib.Path, url: str, nodes: list[str]) -> None:
        self.api = Api(folder, url)
        self.folder = folder
        self.nodes = nodes
        self.pods: dict[str, Pod] = {}
        self._networks: dict[str, str] = {}
        self._given = 0

    async def run(self) -> None:
        """Follow pods, and what Services lead to, for ever."""
        naming = asyncio.create_task(self._name_services())
        try:
            await self._follow_pods()
        finally:
            naming.cancel()

    async def _name_services(self) -> None:
        """Let pods know the Services that come after them."""
        path = SLICES.format("").replace("/namespaces/", "")
        while True:
            listed = await self.api.call("GET", path)
            known = {one["metadata"]["uid"]: one for one in listed.get("items", ())}
            with contextlib.suppress(httpx.HTTPError, json.JSONDecodeError):
                async for event in self._events(path, listed["metadata"]["resourceVersion"]):
                    if event["type"] not in ("ADDED", "MODIFIED", "DELETED"):
                        break
                    changed = event["object"]["metadata"]
                    known[changed["uid"]] = event["object"]
                    if event["type"] == "DELETED":
                        del known[changed["uid"]]
                    for pod in self.pods.values():
                        if pod.namespace == changed["namespace"]:
                            of = [one for one in known.values() if one["metadata"]["namespace"] == pod.namespace]
                            pod.name_services(of)
            await asyncio.sleep(0.1)

    async def _follow_pods(self) -> None:
        while True:
            listed = await self.api.call("GET", "/api/v1/pods")
            if not listed:
                continue
            there = {one["metadata"]["uid"] for one in listed["items"]}
            for uid in self.pods.keys() - there:
                self._gone(uid)
            for one in listed["items"]:
                await self._seen(one)
            with contextlib.suppress(httpx.HTTPError, json.JSONDecodeError):
                await self._watch(listed["metadata"]["resourceVersion"])
            await asyncio.sleep(0.1)

    async def _events(self, path: str, version: str) -> AsyncIterator[Json]:
        query = {"watch": "true", "resourceVersion": version, "timeoutSeconds": "300"}
        async with self.api.client.stream("GET", path, params=query, timeout=310) as answer:
            async for line in answer.aiter_lines():
                yield json.loads(line)

    async def _watch(self, version: str) -> None:
        async for event in self._events("/api/v1/pods", version):
            if event["type"] == "DELETED":
                self._gone(event["object"]["metadata"]["uid"])
            elif event["type"] in ("ADDED", "MODIFIED"):
                await self._seen(event["object"])
            else:
                return

    async def _seen(self, told: Json) -> None:
        uid, node = told["metadata"]["uid"], told["spec"].get("nodeName")
        if node not in self.nodes:
            return
        if uid in self.pods:
            self.pods[uid].update(told)
            return
        pod = Pod(self.api, self.folder, told, await self._address(node))
        self.pods[uid] = pod
        pod.update(told)

    async def _address(self, node: str) -> str:
        if node not in self._networks:
            self._networks[node] = (await self.api.call("GET", f"/api/v1/nodes/{node}"))["spec"]["podCIDR"]
        # The next one, as CNI's host-local gives them: an address that was just left is not given again at once.
        taken = {one.address for one in self.pods.values()}
        while True:
            self._given += 1
            address = f"{self._networks[node].rpartition('.')[0]}.{self._given % 254 + 1}"
            if address not in taken:
                return address

    def _gone(self, uid: str) -> None:
        pod = self.pods.pop(uid, None)
        if pod is not None:
            pod.gone()


def main() -> None:
    """Run until killed."""
    folder, url, *nodes = sys.argv[1:]
    _context.set_forkserver_preload(PRELOADED)
    asyncio.run(Kubelet(pathlib.Path(folder), url, nodes).run())


if __name__ == "__main__":
    main()
