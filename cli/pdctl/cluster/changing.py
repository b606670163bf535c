"""Changing a deployment that runs: the same values but for a few, by Helm, so the next deploy finds no conflict."""

import asyncio
import time

from pdctl.cluster import paths
from pdctl.cluster.api import Cluster
from pdctl.cluster.deploying import LOOK_SECONDS, OUTAGE_SECONDS, Teller
from pdctl.cluster.helm import Helm
from pdctl.cluster.lock import locked
from pdctl.cluster.observe import PART, Observer
from pdctl.cluster.releases import ENGINES, ROUTER, changed
from pdctl.errors import ExitCode, PdctlError
from pdctl.podstate import Snapshot, Verdict, Watched, diagnose


async def scalable(cluster: Cluster, namespace: str, role: str) -> int:
    """Give the number of a role's pods as it is asked for now.

    Raises:
        PdctlError: there is no such role, or something else scales it; exit code USAGE.
    """
    things = await cluster.list(
        paths.namespaced("deployments", namespace), f"{PART},app.kubernetes.io/component={role}"
    )
    own = {ENGINES, ROUTER}
    thing = next((one for one in things if one["metadata"]["labels"]["app.kubernetes.io/instance"] in own), None)
    if thing is None:
        raise PdctlError(f"{namespace} has no {role}", "see pdctl status", ExitCode.USAGE)
    if len(things) > 1:
        raise PdctlError(
            f"another router serves, and is not scaled: {', '.join(one['metadata']['name'] for one in things)}",
            "pdctl router switch ours brings this one back", ExitCode.USAGE,
        )  # fmt: skip
    scalers = await cluster.list(paths.namespaced("horizontalpodautoscalers", namespace))
    for scaler in scalers:
        if scaler["spec"]["scaleTargetRef"]["name"] == thing["metadata"]["name"]:
            raise PdctlError(
                f"{role} is scaled by {scaler['metadata']['name']}",
                f"change its bounds: pdctl deploy --set engines.{role}.autoscaling.maxReplicas=…", ExitCode.USAGE,
            )  # fmt: skip
    return int(thing["spec"].get("replicas", 1))


async def change(
    cluster: Cluster, helm: Helm, namespace: str, verb: str, sets: dict[str, list[str]], timeout: float, teller: Teller
) -> tuple[Verdict, Watched, Snapshot]:
    """Change values of the releases that run and watch until all is ready again.

    Args:
        cluster: where.
        helm: against the namespace.
        namespace: of the deployment.
        verb: the command, for the lock.
        sets: KEY=VALUE by part (`engines`, `router`).
        timeout: seconds to watch.
        teller: who shows it.
    """
    cluster.patience = OUTAGE_SECONDS
    cluster.on_outage = teller.outage
    async with locked(cluster, namespace, verb, teller.say):
        for part, values in sets.items():
            release = changed(part, values)
            state = await helm.state(release.name)
            if not state.exists:
                raise PdctlError(
                    f"{namespace} has no release {release.name}", f"run pdctl deploy --namespace {namespace}"
                )
            if state.stuck:
                await helm.finish(release.name, state)
            await helm.install(release)
            teller.say(f"{release.name} upgraded: {', '.join(values)}")
        return await settled(cluster, namespace, timeout, teller)


async def settled(
    cluster: Cluster, namespace: str, timeout: float, teller: Teller
) -> tuple[Verdict, Watched, Snapshot]:
    """Watch until all is ready, or cannot become so, or the time is over."""
    observer = Observer(cluster, namespace)
    watched = Watched(timeout, timeout)
    began = time.monotonic()
    while True:
        snapshot = await observer.snapshot()
        verdict = watched.judge(snapshot, diagnose(snapshot, observer.tails))
        teller.show(snapshot, observer, watched.findings, time.monotonic() - began)
        if verdict is not Verdict.COMING:
            return verdict, watched, snapshot
        await asyncio.sleep(LOOK_SECONDS)
