"""Another router before the same engines in a cluster: it serves before the old one ends, and no engine is touched.

Clients keep one address: the Service of pd-router, whose selector says whose pods serve. Ours stays installed,
without pods, while another one does.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from pdctl.cluster import paths
from pdctl.cluster.api import Cluster
from pdctl.cluster.changing import settled
from pdctl.cluster.deploying import OUTAGE_SECONDS, summary
from pdctl.cluster.helm import Helm
from pdctl.cluster.lock import locked
from pdctl.cluster.observe import Observer, serving
from pdctl.cluster.releases import ENGINES, OTHERS, ROUTER, changed, standing_in
from pdctl.cluster.screen import counts
from pdctl.errors import ExitCode, PdctlError
from pdctl.podstate import Finding, Phase, Snapshot, Verdict
from pdctl.routers.choice import Choice

POLICY = "pdctl/policy"  # annotation of another router's Deployment
POOLS = "/apis/inference.networking.k8s.io/v1"
_POOLS_FROM = (
    "https://github.com/kubernetes-sigs/gateway-api-inference-extension/releases/download/v1.5.0/manifests.yaml"
)


@dataclass(slots=True)
class _Told:
    """Tells in sentences what a screen would show."""

    say: Callable[[str], None]
    _counts: str = ""

    def show(self, snapshot: Snapshot, observer: Observer, findings: tuple[Finding, ...], elapsed: float) -> None:
        """Tell how far each workload is, whenever that changes."""
        if counts(snapshot) != self._counts:
            self._counts = counts(snapshot)
            self.say(self._counts)

    def outage(self, seconds: float) -> None:
        """Tell that the API is away."""
        if not seconds:
            return
        self.say(f"the Kubernetes API has not answered for {seconds:.0f} s; going on when it does")


async def standing(cluster: Cluster, namespace: str, ours: str) -> Choice:
    """Give the router that clients reach; `ours` is the policy of ours."""
    release = await serving(cluster, namespace)
    for router, name in OTHERS.items():
        if name == release:
            told = await cluster.find(paths.namespaced("deployments", namespace, name))
            policy = ((told or {}).get("metadata", {}).get("annotations") or {}).get(POLICY, "unknown")
            return Choice("llm-d" if router == "llm-d" else "vllm-router", policy)
    return Choice("ours", ours)


async def switch(
    cluster: Cluster, helm: Helm, namespace: str, wanted: Choice, sets: Sequence[str], timeout: float,
    say: Callable[[str], None],
) -> None:  # fmt: skip
    """Let another router serve.

    Args:
        cluster: where.
        helm: against the namespace.
        namespace: of the deployment.
        wanted: the router that shall serve, and its policy.
        sets: KEY=VALUE of its chart.
        timeout: seconds until its pods must be ready; when they are not, the old one goes on.
        say: told each step.

    Raises:
        PdctlError: it cannot be, or does not become ready.
    """
    cluster.patience = OUTAGE_SECONDS
    work = _Switching(cluster, helm, namespace, timeout, _Told(say))
    if wanted.router == "llm-d" and await cluster.find(POOLS) is None:
        raise PdctlError(
            f"{cluster.context} does not know InferencePool, which llm-d's endpoint picker follows",
            f"have it installed: kubectl apply -f {_POOLS_FROM}", ExitCode.PREFLIGHT,
        )  # fmt: skip
    async with locked(cluster, namespace, "router switch", say):
        if wanted.router == "ours":
            await work.ours([f"config.policy={wanted.policy}", *sets])
        else:
            await work.other(wanted, sets)
        await work.tidy()


@dataclass(slots=True)
class _Switching:
    cluster: Cluster
    helm: Helm
    namespace: str
    timeout: float
    told: _Told

    async def ours(self, sets: Sequence[str] = ()) -> None:
        """Have our pods ready, then let clients come to them."""
        if await serving(self.cluster, self.namespace) != ROUTER:
            await self.helm.install(changed("router", ["service.standby=true", *sets]))
            await self._ready(ROUTER)
            sets = ()
        await self.helm.install(changed("router", ["service.release=", "service.standby=false", *sets]))
        self.told.say(f"clients reach {ROUTER}")
        await self._ready(ROUTER)

    async def other(self, wanted: Choice, sets: Sequence[str]) -> None:
        """Have its pods ready, then let clients come to them; ours finish what they have and go."""
        name = OTHERS[wanted.router]
        if await serving(self.cluster, self.namespace) == name:
            await self.ours()  # meanwhile: its own pods are about to be replaced
        release = standing_in(wanted.router, wanted.policy, *await self._engines())
        release = replace(release, sets=(*release.sets, *sets))
        await self.helm.install(release)
        self.told.say(f"{name} installed: {wanted.title}")
        try:
            await self._ready(name)
        except PdctlError as error:
            await self.helm.uninstall(name)
            error.cause += f"; {name} is uninstalled, and the router that served goes on"
            raise
        await self.helm.install(changed("router", [f"service.release={name}", "service.standby=false"]))
        self.told.say(f"clients reach {name}")

    async def tidy(self) -> None:
        """Remove other routers that nobody reaches any more; their pods first finish what they have."""
        now = await serving(self.cluster, self.namespace)
        for name in OTHERS.values():
            if name != now and (await self.helm.state(name)).exists:
                await self.helm.uninstall(name)
                self.told.say(f"{name} is uninstalled")

    async def _ready(self, release: str) -> None:
        verdict, watched, _ = await settled(self.cluster, self.namespace, self.timeout, self.told)
        if verdict is not Verdict.READY:
            cause, code = summary(verdict, watched.findings, self.namespace, self.timeout)
            told = watched.findings[0] if watched.findings else None
            raise PdctlError(
                f"{release} does not become ready: {told.message if told else cause}",
                told.fix if told else "give it more time with --timeout", code,
            )  # fmt: skip

    async def _engines(self) -> tuple[dict[str, int], list[tuple[str, str]]]:
        """Give the engines' ports by role, and role and address of each that is ready."""
        things = await self.cluster.list(
            paths.namespaced("deployments", self.namespace), f"app.kubernetes.io/instance={ENGINES}"
        )
        ports = {
            thing["metadata"]["labels"]["llm-d.ai/role"]: int(port["containerPort"])
            for thing in things
            for port in thing["spec"]["template"]["spec"]["containers"][0]["ports"]
            if port["name"] == "http"
        }
        snapshot = await Observer(self.cluster, self.namespace).snapshot()
        engines = [(pod.role, pod.ip) for pod in snapshot.pods if pod.role in ports and pod.phase is Phase.READY]
        return ports, engines
