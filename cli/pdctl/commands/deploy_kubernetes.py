"""`pdctl deploy --namespace`: what a person sees while a deployment comes up in a cluster."""

import asyncio
import contextlib
import sys
import time
from dataclasses import dataclass

from rich.live import Live
from rich.table import Table
from rich.text import Text

from pdctl.cluster.api import Cluster
from pdctl.cluster.deploying import Deploying, Plan, plan, summary, take_token
from pdctl.cluster.helm import find_helm
from pdctl.cluster.observe import Observer
from pdctl.cluster.releases import Asked, releases
from pdctl.cluster.screen import checks_table, counts, finding_lines, live, short
from pdctl.console import confirmed, err, out, span
from pdctl.errors import ExitCode, PdctlError
from pdctl.podstate import Finding, Phase, Snapshot, Verdict, Watched

STILL_SECONDS = 30.0  # between two lines where there is no terminal and nothing changes


@dataclass(frozen=True, slots=True)
class Manner:
    """How to go about it."""

    dry_run: bool
    yes: bool
    detach: bool
    timeout: float
    rollback: bool
    unschedulable_after: float


class Screen:
    """Shows what happens: a live table at a terminal, a line a change elsewhere."""

    def __init__(self) -> None:
        self._live: Live | None = None
        self._note = ""
        self._phases: dict[str, tuple[Phase, str]] = {}
        self._told = 0.0
        self._counts = ""

    def say(self, text: str) -> None:
        """Tell a step."""
        err.print(Text(text), soft_wrap=True)

    def outage(self, seconds: float) -> None:
        """Tell that the API is away."""
        if not err.is_terminal and bool(seconds) != bool(self._note):
            self.say(
                "the Kubernetes API does not answer; going on when it does" if seconds else "the API answers again"
            )
        self._note = f"the API has not answered for {seconds:.0f} s" if seconds else ""
        if self._live is not None:
            self._live.refresh()

    def show(self, snapshot: Snapshot, observer: Observer, findings: tuple[Finding, ...], elapsed: float) -> None:
        """Show what the pods do."""
        if err.is_terminal:
            if self._live is None:
                self._live = Live(console=err, refresh_per_second=4, transient=True)
                self._live.start()
            self._live.update(live(snapshot, observer.last_lines, findings, elapsed, self._note))
            return
        for pod in snapshot.pods:
            now = (pod.phase, pod.why)
            if self._phases.get(pod.name) != now:
                self._phases[pod.name] = now
                why = f" ({pod.why})" if pod.why else ""
                self.say(f"{span(elapsed):>6}  {short(pod)}  {pod.phase}{why}  {pod.node}".rstrip())
                self._told = time.monotonic()
        if counts(snapshot) != self._counts or time.monotonic() - self._told > STILL_SECONDS:
            self._counts, self._told = counts(snapshot), time.monotonic()
            self.say(f"{span(elapsed):>6}  {self._counts}")

    def close(self) -> None:
        """Take the live table away."""
        if self._live is not None:
            self._live.stop()
            self._live = None


def deploy_kubernetes(asked: Asked, namespace: str, context: str | None, manner: Manner) -> None:
    """Deploy, or show what would be done.

    Raises:
        PdctlError: it did not come up; the exit code tells what kind of failure it was.
    """
    screen = Screen()
    state = _State()
    try:
        asyncio.run(_deploy(asked, namespace, context, manner, screen, state))
    except KeyboardInterrupt:
        screen.close()
        raise _interrupted(namespace, state) from None
    finally:
        screen.close()


class _State:
    """What was under way, for the message after Ctrl-C."""

    deploying: Deploying | None = None


def _interrupted(namespace: str, state: _State) -> PdctlError:
    under_way = state.deploying
    if under_way is None or not under_way.changed:
        return PdctlError("interrupted; nothing was changed", "run the command again", ExitCode.INTERRUPTED)
    what = "what is installed goes on starting in the cluster, and holds its GPUs"
    if under_way.stage.startswith(("making", "installing")):
        what = f"it was {under_way.stage}; what was made stays in the cluster"
    return PdctlError(
        f"interrupted; {what}",
        f"look on: pdctl status --namespace {namespace} --watch; go on: run the command again; "
        f"end it: pdctl cleanup --namespace {namespace}",
        ExitCode.INTERRUPTED,
    )


async def _deploy(
    asked: Asked, namespace: str, context: str | None, manner: Manner, screen: Screen, state: _State
) -> None:
    token = take_token()
    wished = releases(asked)
    helm = await find_helm()
    cluster = await Cluster.connect(context)
    try:
        made = await plan(cluster, helm, namespace, wished, token, named=context is not None)
        _show(made, asked)
        if made.failed:
            raise PdctlError(
                f"{len(made.failed)} of {len(made.checks)} checks failed: "
                f"{', '.join(check.name for check in made.failed)}; nothing was changed",
                made.failed[0].fix, ExitCode.PREFLIGHT,
            )  # fmt: skip
        if manner.dry_run:
            out.print("dry run: nothing was changed; pdctl diff shows each line that would change")
            return
        if not manner.yes and sys.stdin.isatty() and not confirmed("Deploy this?", default=True):
            raise PdctlError("not deployed; nothing was changed", "run the command again when you are ready")
        state.deploying = under_way = Deploying(made, screen)
        await _carry_out(under_way, made, manner, screen)
    finally:
        await cluster.close()


async def _carry_out(under_way: Deploying, made: Plan, manner: Manner, screen: Screen) -> None:
    failure: PdctlError | None = None
    async with under_way.locked():
        try:
            await under_way.apply()
            if manner.detach:
                out.print(Text.assemble(("applied ", "bold green"), f"{made.namespace}; its pods start by themselves"))
                out.print(f"next:  pdctl status --namespace {made.namespace} --watch", soft_wrap=True)
                return
            verdict, watched, snapshot = await under_way.watch(manner.timeout, manner.unschedulable_after)
            screen.close()
            if verdict is Verdict.READY:
                _ready(made, snapshot)
                return
            failure = await _failed(under_way, made, manner, verdict, watched, snapshot)
        except PdctlError as error:
            screen.close()
            failure = await _broken(under_way, made, error)
        if manner.rollback:
            for done in await under_way.roll_back():
                screen.say(f"rollback: {done}")
            failure.cause += "; rolled back"
    if manner.rollback and await under_way.remove_namespace():
        screen.say(f"rollback: namespace {made.namespace} is removed")
    raise failure


async def _failed(
    under_way: Deploying, made: Plan, manner: Manner, verdict: Verdict, watched: Watched, snapshot: Snapshot
) -> PdctlError:
    decisive = watched.hopeless(snapshot.at) or watched.findings
    cause, code = summary(verdict, decisive, made.namespace, manner.timeout)
    lines = [line for finding in watched.findings for line in finding_lines(finding, snapshot)]
    err.print(Text(counts(snapshot), "bold"))
    for line in lines:
        err.print(line, soft_wrap=True)
    if not lines:
        err.print("The pods only need longer: no trouble was seen.")
    folder = await under_way.keep_evidence("\n".join([cause, "", counts(snapshot), *(line.plain for line in lines)]))
    kept = f"pods and logs are kept in {folder}" if folder else "the evidence could not be kept"
    step = (
        watched.findings[0].fix if watched.findings else "give it more time with --timeout; what runs goes on starting"
    )
    again = "" if manner.rollback else f"; then deploy again, or pdctl cleanup --namespace {made.namespace}"
    return PdctlError(f"{cause}; {kept}", step + again, code)


async def _broken(under_way: Deploying, made: Plan, error: PdctlError) -> PdctlError:
    folder = await under_way.keep_evidence(f"{under_way.stage}: {error.cause}")
    kept = f" (kept in {folder})" if folder else ""
    return PdctlError(f"while {under_way.stage}: {error.cause}{kept}", error.next_step, error.code, error.evidence)


def _ready(made: Plan, snapshot: Snapshot) -> None:
    url = next(
        (
            f"http://{thing['metadata']['name']}.{made.namespace}:{thing['spec']['ports'][0]['port']}/v1"
            for thing in made.objects[made.releases[1].name] if thing["kind"] == "Service"
        ),
        "",
    )  # fmt: skip
    out.print(
        Text.assemble(("ready ", "bold green"), f"{url}  model {made.wanted.model}  ({counts(snapshot)})"),
        soft_wrap=True,
    )
    where = f" --namespace {made.namespace}"
    out.print(
        f"next:  pdctl port-forward{where}   pdctl bench 200 32{where}   pdctl routing{where}   pdctl cleanup{where}",
        soft_wrap=True,
    )


def _show(made: Plan, asked: Asked) -> None:
    err.print(
        Text.assemble(
            ("deploy ", "bold"), (made.namespace, "bold"), f" through context {made.cluster.context or '(in cluster)'}"
        )
    )
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for pods in made.wanted.pods:
        gpus = pods.requests.get(made.wanted.gpu, 0.0)
        more = [f"{gpus:g} GPU"] if gpus else []
        more += [
            f"{count:g} {name}" for name, count in pods.requests.items() if "/" in name and name != made.wanted.gpu
        ]
        more += [f"{pods.requests.get('cpu', 0):g} CPUs", f"{pods.requests.get('memory', 0) / 2**30:g}Gi"]
        table.add_row(pods.role, f"{pods.count} × ({', '.join(more)})", pods.image)
    table.add_row("model", asked.model, made.wanted.model)
    table.add_row("network", asked.network, "KV over TCP" if asked.network == "none" else "KV over RDMA")
    for release in made.releases:
        state = made.states[release.name]
        told = f"{state.status}, revision {state.revision}: upgrade" if state.exists else "new"
        table.add_row("release", release.name, told)
    err.print(table)
    err.print(checks_table(made.checks))
    with contextlib.suppress(AttributeError):
        sys.stderr.flush()
