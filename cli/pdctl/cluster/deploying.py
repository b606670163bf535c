"""Bringing a deployment up on Kubernetes: the steps in their order, each of which may be done again.

Nothing here prints; what happens is told to a `Teller`.
"""

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from pdctl.check import Check, Mark
from pdctl.cluster import evidence, paths, record
from pdctl.cluster.api import ApiError, Cluster, Unreachable
from pdctl.cluster.helm import Helm, Release, State
from pdctl.cluster.identity import check_cluster
from pdctl.cluster.lock import locked
from pdctl.cluster.observe import Observer, serving
from pdctl.cluster.preflight import Scene, preflight
from pdctl.cluster.releases import ROUTER
from pdctl.cluster.wanted import Wanted, kinds_text, wanted
from pdctl.errors import ExitCode, PdctlError
from pdctl.podstate import Finding, Snapshot, Verdict, Watched, diagnose

LOOK_SECONDS = 1.0
OUTAGE_SECONDS = 120.0  # for which an API that does not answer is waited for, once something was changed
MANAGED = {"app.kubernetes.io/managed-by": "pdctl"}


class Teller(Protocol):
    """Whoever shows what happens."""

    def say(self, text: str) -> None:
        """Tell a step."""

    def show(self, snapshot: Snapshot, observer: Observer, findings: tuple[Finding, ...], elapsed: float) -> None:
        """Show what the pods do."""

    def outage(self, seconds: float) -> None:
        """Tell that the API has not answered for so long; 0: it does again."""


@dataclass(slots=True)
class Plan:
    """What deploying would do.

    Args:
        objects: rendered, by release.
        states: what Helm knows of each release.
        token: the hub's token; never shown, never passed to a program.
    """

    cluster: Cluster
    helm: Helm
    namespace: str
    releases: tuple[Release, ...]
    objects: dict[str, list[Any]]
    wanted: Wanted
    states: dict[str, State]
    space: Any | None
    checks: list[Check]
    identity: str
    token: str | None = field(default=None, repr=False)

    @property
    def failed(self) -> list[Check]:
        """The checks that forbid going on."""
        return [check for check in self.checks if check.mark is Mark.FAIL]


def take_token() -> str | None:
    """Take HF_TOKEN out of the environment, so that no program that is started has it."""
    return os.environ.pop("HF_TOKEN", None) or None


async def capabilities(cluster: Cluster) -> list[str]:
    """Give the kinds that the charts ask for, where the cluster knows them."""
    found = []
    for version in ("monitoring.coreos.com/v1", "keda.sh/v1alpha1"):
        told = await cluster.find(f"/apis/{version}")
        found += [f"{version}/{one['kind']}" for one in (told or {}).get("resources", ()) if "/" not in one["name"]]
    return found


async def render(cluster: Cluster, helm: Helm, releases: tuple[Release, ...]) -> dict[str, list[Any]]:
    """Render releases as this cluster would get them."""
    known = await capabilities(cluster)
    found = await asyncio.gather(*(helm.render(one, capabilities=known, version=cluster.version) for one in releases))
    return {one.name: objects for one, objects in zip(releases, found, strict=True)}


async def plan(
    cluster: Cluster, helm: Helm, namespace: str, releases: tuple[Release, ...], token: str | None, *, named: bool
) -> Plan:
    """Look at everything and change nothing.

    Raises:
        PdctlError: the values or the cluster cannot be used.
    """
    helm = Helm(helm.program, helm.version, cluster.context, namespace, helm.calls)
    identity = await check_cluster(cluster, namespace, named=named, verb="deploy")
    if (other := await serving(cluster, namespace)) != ROUTER:
        raise PdctlError(
            f"{other} serves clients of {namespace} in place of our router, which deploying would bring back unready",
            f"run pdctl router switch ours --namespace {namespace} first; nothing was changed", ExitCode.PREFLIGHT,
        )  # fmt: skip
    objects, space = await asyncio.gather(
        render(cluster, helm, releases), cluster.find(f"{paths.NAMESPACES}/{namespace}")
    )
    asked = wanted(thing for things in objects.values() for thing in things)
    states: dict[str, State] = {}
    may_look = space is None or await cluster.allowed("list", "secrets", namespace)
    for release in releases:
        states[release.name] = State() if space is None or not may_look else await helm.state(release.name)
    checks = await preflight(Scene(cluster, helm, namespace, space, asked, token))
    return Plan(cluster, helm, namespace, releases, objects, asked, states, space, checks, identity, token)


class Deploying:
    """Carries a plan out.

    Attributes:
        stage: what it is at, for the message after a Ctrl-C.
        changed: whether anything was changed in the cluster.
    """

    def __init__(self, plan: Plan, teller: Teller) -> None:
        self._plan = plan
        self._teller = teller
        self._made: list[str] = []  # names of what this run made: to be undone by rollback
        self.observer = Observer(plan.cluster, plan.namespace)
        self.stage = "before anything was changed"
        self.changed = False
        plan.cluster.on_outage = self._outage
        self._out = False

    def _outage(self, seconds: float) -> None:
        self._out = True
        self._teller.outage(seconds)

    @contextlib.asynccontextmanager
    async def locked(self) -> AsyncIterator[None]:
        """Make the namespace, which the lock needs, and hold the lock."""
        plan = self._plan
        record.check_writable(plan.namespace)
        plan.cluster.patience = OUTAGE_SECONDS
        if plan.space is None:
            self.stage = "making the namespace"
            thing = {
                "apiVersion": "v1", "kind": "Namespace",
                "metadata": {"name": plan.namespace, "labels": MANAGED},
            }  # fmt: skip
            await plan.cluster.apply(f"{paths.NAMESPACES}/{plan.namespace}", thing)
            self.changed = True
            self._made.append("namespace")
            self._teller.say(f"namespace {plan.namespace} made")
        async with locked(plan.cluster, plan.namespace, "deploy", self._teller.say):
            yield

    async def apply(self) -> None:
        """Make the Secret and install both releases; end what an earlier run left half done."""
        plan = self._plan
        before = record.load(plan.namespace)
        made = plan.space is None or (before is not None and before.made_namespace)
        record.Record(
            plan.namespace,
            plan.cluster.context,
            plan.cluster.server,
            plan.identity,
            plan.wanted.model,
            made,
            time.time(),
        ).save()
        await self._secret()
        for release in plan.releases:
            self.stage = f"installing {release.name}"
            await self._install(release)
        self.stage = "waiting for the pods"

    async def _secret(self) -> None:
        plan, secret = self._plan, self._plan.wanted.token_secret
        if plan.token is None or secret is None:
            return
        name, key = secret
        self.stage = f"making Secret {name}"
        path = paths.namespaced("secrets", plan.namespace, name)
        there = await plan.cluster.find(path)
        if there is not None and (there["metadata"].get("labels") or {}).get("app.kubernetes.io/managed-by") != "pdctl":
            self._teller.say(f"Secret {name} was made by somebody else and stays as it is; HF_TOKEN is not used")
            return
        thing = {
            "apiVersion": "v1", "kind": "Secret", "type": "Opaque", "stringData": {key: plan.token},
            "metadata": {"name": name, "namespace": plan.namespace, "labels": MANAGED},
        }  # fmt: skip
        await plan.cluster.apply(path, thing)
        self.changed = True
        if there is None:
            self._made.append("secret")
        self._teller.say(f"Secret {name} {'made' if there is None else 'updated'} from HF_TOKEN")

    async def _install(self, release: Release) -> None:
        plan, helm = self._plan, self._plan.helm
        state = await self._patiently(lambda: helm.state(release.name))
        if state.stuck:
            self._teller.say(f"{release.name} is {state.status} from an earlier run: finishing that first")
            self.changed = True
            await self._patiently(lambda: helm.finish(release.name, state))
        elif state.status == "uninstalling":
            self._teller.say(f"{release.name} is half uninstalled: finishing that first")
            self.changed = True
            await self._patiently(lambda: helm.uninstall(release.name))
            state = State()
        self.changed = True
        await self._patiently(lambda: helm.install(release))
        if not state.exists:
            self._made.append(release.name)
        self._teller.say(
            f"{release.name} {'upgraded' if state.exists else 'installed'}: {kinds_text(plan.objects[release.name], 4)}"
        )

    async def _patiently(self, call: Any) -> Any:
        """Call Helm; when it fails because the API is away, wait for the API and call again."""
        while True:
            try:
                return await call()
            except PdctlError as error:
                if not _unreachable(error):
                    raise
                await self._plan.cluster.get("/version")  # waits for it, or gives up with a cause

    async def watch(self, timeout: float, unschedulable_after: float) -> tuple[Verdict, Watched, Snapshot]:
        """Look until everything is ready, or cannot become so, or the time is over."""
        watched = Watched(timeout, unschedulable_after)
        began = time.monotonic()
        while True:
            snapshot = await self.observer.snapshot()
            if self._out:
                self._out = False
                self._teller.outage(0.0)
            findings = diagnose(snapshot, self.observer.tails)
            verdict = watched.judge(snapshot, findings)
            self._teller.show(snapshot, self.observer, watched.findings, time.monotonic() - began)
            if verdict is not Verdict.COMING:
                return verdict, watched, snapshot
            await asyncio.sleep(LOOK_SECONDS)

    async def keep_evidence(self, summary: str) -> Path | None:
        """Write the folder of evidence."""
        plan = self._plan
        plan.cluster.patience = 5.0
        with contextlib.suppress(ApiError, Unreachable):
            await self.observer.snapshot()
        try:
            return await evidence.collect(
                plan.cluster, self.observer, summary=summary, calls=plan.helm.calls,
                secrets=[plan.token] if plan.token else [],
            )  # fmt: skip
        except OSError as error:
            self._teller.say(f"the evidence cannot be written: {error}")
            return None

    async def roll_back(self) -> list[str]:
        """Undo what this run did: releases go back to what was there before, or away. Tells what was done."""
        plan, done = self._plan, []
        for release in reversed(plan.releases):
            before = plan.states[release.name]
            if before.exists and before.status == "deployed":
                await plan.helm.back(release.name, before.revision)
                done.append(f"{release.name} is back at revision {before.revision}")
            elif release.name in self._made:
                await plan.helm.uninstall(release.name)
                done.append(f"{release.name} is uninstalled")
        if "secret" in self._made and plan.wanted.token_secret:
            await plan.cluster.delete(paths.namespaced("secrets", plan.namespace, plan.wanted.token_secret[0]))
            done.append(f"Secret {plan.wanted.token_secret[0]} is removed")
        if not any(plan.states[release.name].exists for release in plan.releases):
            record.forget(plan.namespace)
        return done

    async def remove_namespace(self) -> bool:
        """Remove the namespace when this run made it; after the lock in it was given back."""
        if "namespace" not in self._made:
            return False
        await self._plan.cluster.delete(f"{paths.NAMESPACES}/{self._plan.namespace}")
        return True


def _unreachable(error: PdctlError) -> bool:
    told = error.cause
    return any(
        sign in told
        for sign in (
            "cluster unreachable",
            "connection refused",
            "connection reset",
            "i/o timeout",
            "EOF",
            "TLS handshake",
        )
    )


def summary(verdict: Verdict, findings: tuple[Finding, ...], namespace: str, timeout: float) -> tuple[str, ExitCode]:
    """Say in one sentence what a deployment came to."""
    if verdict is Verdict.LATE:
        kinds = ", ".join(dict.fromkeys(one.kind for one in findings))
        return f"{namespace} is not ready after {timeout:g} s" + (f" ({kinds})" if kinds else ""), ExitCode.TIMEOUT
    kinds = ", ".join(dict.fromkeys(one.kind for one in findings))
    return f"{namespace} does not come up: {kinds}", ExitCode.FAILURE
