"""A deployment in a cluster: the same questions as to a local one, asked of the Kubernetes API and by port-forward."""

import contextlib
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any, Self, TypeVar

import anyio.from_thread
import httpx
import orjson
import yaml
from rich.text import Text

from pdctl.check import Check
from pdctl.cluster import paths, record
from pdctl.cluster.api import Cluster
from pdctl.cluster.doctor import look, rdma_resource
from pdctl.cluster.execute import execute
from pdctl.cluster.forward import Forward
from pdctl.cluster.helm import Helm, find_helm
from pdctl.cluster.identity import check_cluster
from pdctl.cluster.logs import read, stream
from pdctl.cluster.observe import PART, Observer, serving
from pdctl.cluster.releases import ENGINES
from pdctl.cluster.screen import finding_lines, short
from pdctl.cluster.switching import standing, switch
from pdctl.errors import ExitCode, PdctlError
from pdctl.podstate import Finding, Phase, Pod, Snapshot, diagnose
from pdctl.routers.choice import Choice
from pdctl.routers.programs import Programs
from pdctl.targets.pages import Page, read_pairs
from pdctl.targets.target import Health, LogQuery, Routing

T = TypeVar("T")

FETCH_SECONDS = 10.0
AT_ONCE = 16


class KubernetesTarget:
    """A deployment in a namespace; all of it is asked of the cluster each time.

    It has an event loop in a thread of its own, so that a forward works while the commands use its end here.
    """

    def __init__(self, namespace: str, context: str | None) -> None:
        """Connect.

        Raises:
            PdctlError: the cluster cannot be reached, is another one than at deployment, or has nothing there.
        """
        self.name, self.context = namespace, context
        self.flags = f" --namespace {namespace}" + (f" --context {context}" if context else "")
        self._held = contextlib.ExitStack()
        self._portal = self._held.enter_context(anyio.from_thread.start_blocking_portal())
        try:
            self.cluster = self._run(Cluster.connect(context))
            self._held.callback(lambda: self._run(self.cluster.close()))
            self._run(check_cluster(self.cluster, namespace, named=context is not None, verb="status"))
            self._observer = Observer(self.cluster, namespace)
            self._deployments = self._run(self.cluster.list(paths.namespaced("deployments", namespace), PART))
        except BaseException:
            self.close()
            raise
        if not self._deployments:
            self.close()
            others = [one for one in record.namespaces() if one != namespace]
            known = f"; deployed are: {', '.join(others)}" if others else ""
            raise PdctlError(
                f"nothing of pdctl is deployed in namespace {namespace} of {self.cluster.context}{known}",
                f"run pdctl deploy --namespace {namespace}",
            )

    def close(self) -> None:
        """Let go of connections; the deployment itself stays."""
        self._held.close()

    def __enter__(self) -> Self:
        """Use it as a context."""
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        """Do work in the loop's thread; a Ctrl-C here ends it there, for which `close` would wait otherwise."""

        async def run() -> T:
            return await work

        future = self._portal.start_task_soon(run)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    @contextlib.contextmanager
    def _ahead(self, items: AsyncGenerator[T, None]) -> Iterator[Iterator[T]]:
        """Give what an asynchronous generator gives, in this thread."""

        async def following() -> list[T]:
            try:
                return [await anext(items)]
            except StopAsyncIteration:
                return []

        def each() -> Iterator[T]:
            while found := self._run(following()):
                yield found[0]

        try:
            yield each()
        finally:
            self._portal.call(items.aclose)

    # what it consists of

    @cached_property
    def _settings(self) -> dict[str, Any]:
        """What the router's configuration file says: ports."""
        maps = self._run(self.cluster.list(paths.namespaced("configmaps", self.name), PART))
        for one in maps:
            if "config.yaml" in (one.get("data") or {}):
                told: dict[str, Any] = yaml.safe_load(one["data"]["config.yaml"])
                return told
        return {"port": 10001, "prometheus_port": 29000, "admin_port": 29001}

    @cached_property
    def model(self) -> str:
        """The name under which the model is served."""
        for thing in self._deployments:
            args = thing["spec"]["template"]["spec"]["containers"][0].get("args") or []
            if thing["metadata"]["labels"].get("llm-d.ai/role") and args:
                if "--served-model-name" in args:
                    return str(args[args.index("--served-model-name") + 1])
                return str(args[0])
        return ""

    @property
    def engine_template(self) -> dict[str, Any]:
        """A pod of engines as its Deployment makes it.

        Raises:
            PdctlError: no engines are deployed.
        """
        for thing in self._deployments:
            if thing["metadata"]["labels"].get("llm-d.ai/role"):
                told: dict[str, Any] = thing["spec"]["template"]
                return told
        raise PdctlError(f"{self.name} has no engines", f"see pdctl status{self.flags}")

    @property
    def weights(self) -> str:
        """The model as the engines load it: its name on the hub, or a folder."""
        return str((self.engine_template["spec"]["containers"][0].get("args") or [self.model])[0])

    @property
    def router_url(self) -> str:
        """Where clients in the cluster find the router."""
        for thing in self._deployments:
            if thing["metadata"]["labels"].get("app.kubernetes.io/name") == "pd-router":
                return f"http://{thing['metadata']['name']}.{self.name}:{self._settings['port']}"
        return ""

    @property
    def router(self) -> Choice:
        """Which router stands before the engines."""
        ours = str(self._settings.get("policy", "consistent_hash"))
        return self._run(standing(self.cluster, self.name, ours))

    def switch(self, router: Choice, programs: Programs, timeout: float, tell: Callable[[str], None]) -> None:
        """Let another router stand before the same engines: its release serves, then ours has no pods.

        Raises:
            PdctlError: it cannot be, or does not become ready.
        """
        found = self._run(find_helm())
        helm = Helm(found.program, found.version, self.cluster.context, self.name)
        try:
            self._run(switch(self.cluster, helm, self.name, router, programs.sets, timeout, tell))
        except KeyboardInterrupt:
            raise PdctlError(
                "interrupted; the router that clients reached last goes on, and the other one may be there as well",
                f"run pdctl router switch{self.flags} again, it goes on where this run stopped", ExitCode.INTERRUPTED,
            ) from None  # fmt: skip

    @cached_property
    def simulated(self) -> bool:
        """Whether its engines are simulated: such an engine says so."""
        for pod in self.snapshot().pods:
            if pod.phase is Phase.READY and pod.role in ("prefill", "decode"):
                return self._fetch(pod, self._engine_port(pod.role), "/sim/state") is not None
        return False

    @property
    def settings(self) -> dict[str, Any]:
        """How it was set up."""
        told: dict[str, Any] = {"where": "kubernetes", "namespace": self.name}
        for thing in self._deployments:
            role = thing["metadata"]["labels"].get("llm-d.ai/role")
            if role in ("prefill", "decode"):
                told[role] = thing["spec"].get("replicas", 1)
                told["image"] = thing["spec"]["template"]["spec"]["containers"][0]["image"]
        return told

    def _engine_port(self, role: str) -> int:
        for thing in self._deployments:
            if thing["metadata"]["labels"].get("llm-d.ai/role") == role:
                for port in thing["spec"]["template"]["spec"]["containers"][0].get("ports") or ():
                    if port["name"] == "http":
                        return int(port["containerPort"])
        return 8000

    def snapshot(self) -> Snapshot:
        """Look at all pods and workloads."""
        return self._run(self._observer.snapshot())

    def diagnose(self, snapshot: Snapshot) -> tuple[Finding, ...]:
        """Say why it is not ready."""
        return diagnose(snapshot, self._observer.tails)

    def troubles(self) -> list[Text]:
        """Say why pods are not ready, for the screen of `status`."""
        snapshot = self._observer.last
        return [line for finding in self.diagnose(snapshot) for line in finding_lines(finding, snapshot)]

    # reaching pods

    async def _ready_router(self) -> str | None:
        found = await ready_pod(self.cluster, self.name, "router", await serving(self.cluster, self.name))
        return None if found is None else str(found["metadata"]["name"])

    @contextlib.contextmanager
    def reached(self, port: int = 0) -> Iterator[str]:
        """Give a URL of the router that this machine reaches: a port-forward that finds another pod when one goes."""
        forward = Forward(self.cluster, self.name, int(self._settings["port"]), self._ready_router)
        with self._portal.wrap_async_context_manager(forward.listening(port)) as local:
            yield f"http://127.0.0.1:{local}"

    @contextlib.contextmanager
    def forwards(self, ports: dict[int, int], tell: Callable[[str], None]) -> Iterator[dict[int, int]]:
        """Forward ports of the router for as long as the context lasts.

        Args:
            ports: local ones by remote ones; 0: any free one.
            tell: called with a sentence when a connection goes to another pod, or to none.
        """
        with contextlib.ExitStack() as held:
            local = {}
            for remote, wished in ports.items():
                forward = Forward(self.cluster, self.name, remote, self._ready_router, tell)
                local[remote] = held.enter_context(self._portal.wrap_async_context_manager(forward.listening(wished)))
            yield local

    @property
    def router_ports(self) -> tuple[int, int]:
        """The router's ports: of the API, of its metrics."""
        return int(self._settings["port"]), int(self._settings["prometheus_port"])

    def ready_pod(self, role: str) -> Any | None:
        """Give a ready pod of engines of a role, None when there is none."""
        return self._run(ready_pod(self.cluster, self.name, role, ENGINES))

    def execute(self, pod: str, container: str, command: Sequence[str]) -> str:
        """Run a short command in a container and give what it printed.

        Raises:
            PdctlError: the API refuses, or the connection broke.
        """
        return self._run(execute(self.cluster, self.name, pod, container, command))

    def objects(self, plural: str) -> list[Any]:
        """Give the namespace's objects of a kind."""
        return self._run(self.cluster.list(paths.namespaced(plural, self.name)))

    def object(self, plural: str, name: str) -> Any | None:
        """Give an object of the namespace, None when it does not exist."""
        return self._run(self.cluster.find(paths.namespaced(plural, self.name, name)))

    def apply(self, plural: str, thing: dict[str, Any]) -> None:
        """Put an object beside the deployment.

        Raises:
            PdctlError: the API refuses.
        """
        self._run(self.cluster.apply(paths.namespaced(plural, self.name, thing["metadata"]["name"]), thing))

    def delete(self, plural: str, name: str) -> None:
        """Remove an object; one that does not exist is no error."""
        self._run(self.cluster.delete(paths.namespaced(plural, self.name, name)))

    def _call(self, method: str, pod: Pod, port: int, path: str) -> httpx.Response | None:
        """Ask a pod, None when it does not answer."""

        async def this() -> str | None:
            return pod.name

        forward = Forward(self.cluster, self.name, port, this)
        with self._portal.wrap_async_context_manager(forward.listening()) as local:
            url = f"http://127.0.0.1:{local}{path}"
            try:
                return httpx.request(method, url, timeout=FETCH_SECONDS, trust_env=False)
            except httpx.HTTPError:
                return None

    def _fetch(self, pod: Pod, port: int, path: str) -> str | None:
        """Get a page of a pod, None when there is none."""
        answer = self._call("GET", pod, port, path)
        return answer.text if answer is not None and answer.status_code == 200 else None

    def post(self, path: str) -> dict[str, int | None]:
        """Send each engine an empty POST; give the statuses of their answers by member, None where there is none."""
        pods = [pod for pod in self.snapshot().pods if pod.role in ("prefill", "decode")]
        with ThreadPoolExecutor(AT_ONCE) as pool:
            answers = list(pool.map(lambda pod: self._call("POST", pod, self._engine_port(pod.role), path), pods))
        told = zip(pods, answers, strict=True)
        return {short(pod): None if answer is None else answer.status_code for pod, answer in told}

    def _fetch_all(self, asked: list[tuple[Pod, int, str]]) -> list[str | None]:
        with ThreadPoolExecutor(AT_ONCE) as pool:
            return list(pool.map(lambda one: self._fetch(*one), asked))

    # what commands ask

    def health(self) -> list[Health]:
        """Tell how each part is: pods from the API, their load from the router."""
        snapshot = self.snapshot()
        known = self._workers()
        found = []
        for pod in snapshot.pods:
            port = self._settings["port"] if pod.role == "router" else self._engine_port(pod.role)
            url = f"http://{pod.ip}:{port}" if pod.ip else ""
            details = dict(known.get(url, {}))
            if pod.role == "router" and pod.phase is Phase.READY:
                details = _sums(list(known.values()))
            found.append(
                Health(
                    short(pod), pod.role, url, None, pod.phase.value, time.time() - pod.created, details, pod.node,
                    pod.restarts, pod.why,
                )
            )  # fmt: skip
        return found

    def _workers(self) -> dict[str, dict[str, Any]]:
        """Give what routers know of each engine, by URL: the first one's view, with the requests of all."""
        known: dict[str, dict[str, Any]] = {}
        for one in (one for told in self.admin("/list_workers") for one in told["workers"]):
            first = known.setdefault(one["url"], one)
            if first is not one:
                first["in_flight"] += one["in_flight"]
        return known

    def routing(self) -> Routing:
        """Tell who served whom."""
        snapshot = self.snapshot()
        engines = [pod for role in ("prefill", "decode") for pod in snapshot.of_role(role) if pod.ip]
        names = {f"http://{pod.ip}:{self._engine_port(pod.role)}": short(pod) for pod in engines}
        routers = [pod for pod in snapshot.of_role("router") if pod.phase is Phase.READY]
        if not routers:
            raise PdctlError(
                f"no router of {self.name} is ready", f"see why: pdctl status{self.flags}", ExitCode.FAILURE
            )
        metrics = int(self._settings["prometheus_port"])
        pages = self._fetch_all([(pod, metrics, "/metrics") for pod in routers])
        pairs, edges = read_pairs([page for page in pages if page is not None], names)
        ready = [pod for pod in engines if pod.phase is Phase.READY]
        if self.simulated:
            transfers, violations, silent = self._simulated_transfers(ready)
        else:
            violations = []
            transfers, silent = self._measured_transfers(ready)
        return Routing(pairs, transfers, edges, violations, silent)

    def _simulated_transfers(
        self, engines: list[Pod]
    ) -> tuple[dict[tuple[str, str], tuple[int, int]], list[dict[str, Any]], list[str]]:
        states = self._fetch_all([(pod, self._engine_port(pod.role), "/sim/state") for pod in engines])
        seen = self._fetch_all([(pod, self._engine_port(pod.role), "/sim/violations") for pod in engines])
        by_host = {pod.ip: short(pod) for pod in engines}
        transfers: dict[tuple[str, str], tuple[int, int]] = {}
        violations: list[dict[str, Any]] = []
        silent = []
        for pod, state, breaches in zip(engines, states, seen, strict=True):
            if state is None or breaches is None:
                silent.append(short(pod))
                continue
            violations += [{"engine": short(pod)} | entry for entry in orjson.loads(breaches)]
            for way in orjson.loads(state)["transfers"]:
                ends = (by_host.get(way["host"], way["host"]), short(pod))
                count, moved = transfers.get(ends, (0, 0))
                transfers[ends] = (count + way["transfers"], moved + way["bytes"])
        return transfers, violations, silent

    def _measured_transfers(self, engines: list[Pod]) -> tuple[dict[tuple[str, str], tuple[int, int]], list[str]]:
        """Read what decode engines say they have read; vLLM does not tell from whom."""
        decodes = [pod for pod in engines if pod.role == "decode"]
        pages = self._fetch_all([(pod, self._engine_port("decode"), "/metrics") for pod in decodes])
        transfers: dict[tuple[str, str], tuple[int, int]] = {}
        for pod, page in zip(decodes, pages, strict=True):
            told = Page(page or "")
            if count := int(told.total("vllm:nixl_bytes_transferred_count")):
                transfers["any", short(pod)] = (count, int(told.total("vllm:nixl_bytes_transferred_sum")))
        return transfers, [short(pod) for pod, page in zip(decodes, pages, strict=True) if page is None]

    def pages(self, path: str, member: str | None) -> list[tuple[str, str, str | None]]:
        """Give (member, role, answer) for a path of each engine, or of one role or member; None: no answer."""
        pods = [pod for pod in self._chosen(member) if pod.role != "router" or path == "/metrics"]
        asked = [(pod, self._metrics_port(pod.role), path) for pod in pods]
        return [(short(pod), pod.role, told) for pod, told in zip(pods, self._fetch_all(asked), strict=True)]

    def _metrics_port(self, role: str) -> int:
        return int(self._settings["prometheus_port"]) if role == "router" else self._engine_port(role)

    def urls(self) -> dict[str, str]:
        """Give the URL by which the router knows each engine, by member."""
        pods = self._observer.last.pods
        engines = [pod for pod in pods if pod.role in ("prefill", "decode") and pod.ip]
        return {short(pod): f"http://{pod.ip}:{self._engine_port(pod.role)}" for pod in engines}

    def admin(self, path: str) -> list[Any]:
        """Give what the admin port of each router answers that can be asked."""
        routers = [pod for pod in self._observer.last.of_role("router") if pod.phase is Phase.READY]
        told = self._fetch_all([(pod, int(self._settings["admin_port"]), path) for pod in routers])
        return [orjson.loads(one) for one in told if one is not None]

    @property
    def rdma(self) -> str | None:
        """The resource by which engines ask for RDMA, empty for TCP."""
        return rdma_resource(self._deployments)

    def checks(self) -> list[Check]:
        """Look at Services, rights, levels of security and RDMA devices."""
        return self._run(look(self.cluster, self.name, self._deployments))

    def _chosen(self, member: str | None) -> list[Pod]:
        pods = list(self.snapshot().pods)
        chosen = [pod for pod in pods if member in (None, pod.role, pod.name, short(pod))]
        if not chosen:
            names = ", ".join(short(pod) for pod in pods) or "none"
            raise PdctlError(f"{self.name} has no {member}", f"name a role, or one of {names}", ExitCode.USAGE)
        return chosen

    def logs(self, query: LogQuery) -> Iterator[tuple[str, str]]:
        """Give (member, line) pairs of the logs, by time; with `follow` without end, also of pods that come later."""
        if query.member is not None:
            self._chosen(query.member)
        if not query.follow:
            yield from self._run(read(self.cluster, self.name, query))
            return
        with self._ahead(stream(self.cluster, self.name, query)) as lines:
            yield from lines


def _sums(workers: list[dict[str, Any]]) -> dict[str, Any]:
    told: dict[str, Any] = {}
    for role in ("prefill", "decode"):
        those = [one for one in workers if one["role"] == role]
        told[role] = {"healthy": sum(bool(one["healthy"]) for one in those), "total": len(those)}
    return told


async def ready_pod(cluster: Cluster, namespace: str, role: str, release: str) -> Any | None:
    """Give a ready pod of a role and release, None when there is none."""
    labels = f"{PART},app.kubernetes.io/component={role},app.kubernetes.io/instance={release}"
    for thing in await cluster.list(paths.namespaced("pods", namespace), labels):
        conditions = {one["type"]: one["status"] for one in (thing.get("status") or {}).get("conditions") or ()}
        if conditions.get("Ready") == "True" and not thing["metadata"].get("deletionTimestamp"):
            return thing
    return None
