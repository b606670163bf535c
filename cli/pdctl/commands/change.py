"""`pdctl scale` and `pdctl rollout`: change a deployment that runs, without a failed request."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Annotated

import typer
from rich.text import Text

from pdctl.cluster.api import Cluster
from pdctl.cluster.changing import change, scalable
from pdctl.cluster.deploying import summary, take_token
from pdctl.cluster.helm import Helm, find_helm
from pdctl.cluster.identity import check_cluster
from pdctl.cluster.releases import image_sets
from pdctl.cluster.screen import counts, finding_lines
from pdctl.commands.deploy_kubernetes import Screen
from pdctl.commands.options import Context, Namespace
from pdctl.console import err, out
from pdctl.errors import ExitCode, PdctlError
from pdctl.podstate import Verdict
from pdctl.targets.found import namespace_of

Sets = Callable[[Cluster], Awaitable[dict[str, list[str]]]]

ROLES = ("prefill", "decode", "router")
Timeout = Annotated[float, typer.Option(help="Seconds until everything must be ready again.")]


def scale(
    counts_by_role: Annotated[list[str], typer.Argument(metavar="ROLE=COUNT…", help="Such as prefill=6 decode=10.")],
    namespace: Namespace = None,
    context: Context = None,
    timeout: Timeout = 3000.0,
) -> None:
    """Change numbers of engines or routers and wait until they are so. Pods that go finish what they have."""
    wanted = [_count(text) for text in counts_by_role]
    where = namespace_of(namespace)

    async def sets(cluster: Cluster) -> dict[str, list[str]]:
        told: dict[str, list[str]] = {}
        for role, count in wanted:
            before = await scalable(cluster, where, role)
            err.print(Text(f"{role}: {before} → {count}"))
            part, key = ("router", "replicas") if role == "router" else ("engines", f"{role}.replicas")
            told.setdefault(part, []).append(f"{key}={count}")
        return told

    _run(where, context, "scale", timeout, sets)


def rollout(
    namespace: Namespace = None,
    context: Context = None,
    image: Annotated[str | None, typer.Option(help="Another image of the engines.", show_default=False)] = None,
    sets: Annotated[
        list[str] | None, typer.Option("--set", help="engines.KEY=VALUE or router.KEY=VALUE.", show_default=False)
    ] = None,
    restart: Annotated[
        str | None, typer.Option(help="Restart prefill, decode or router, one pod after the other.", show_default=False)
    ] = None,
    timeout: Timeout = 3000.0,
) -> None:
    """Give running pods another image, other values, or a fresh start, one after the other; clients notice nothing."""
    told: dict[str, list[str]] = {}
    if image:
        told["engines"] = list(image_sets(image))
    for one in sets or []:
        part, _, value = one.partition(".")
        if part not in ("engines", "router") or "=" not in value:
            raise PdctlError(f"--set {one} does not say whose value it is", "write engines.KEY=VALUE", ExitCode.USAGE)
        told.setdefault(part, []).append(value)
    if restart is not None:
        if restart not in ROLES:
            raise PdctlError(f"there is no role {restart!r}", f"choose one of {', '.join(ROLES)}", ExitCode.USAGE)
        at = time.strftime("restarted-%Y%m%dT%H%M%S")
        part, key = ("router", "podAnnotations") if restart == "router" else ("engines", f"{restart}.podAnnotations")
        told.setdefault(part, []).append(f"{key}.pdctl/restart={at}")
    if not told:
        raise PdctlError("nothing is to be changed", "give --image, --set or --restart", ExitCode.USAGE)

    async def same(cluster: Cluster) -> dict[str, list[str]]:
        return told

    _run(namespace_of(namespace), context, "rollout", timeout, same)


def _count(text: str) -> tuple[str, int]:
    role, found, count = text.partition("=")
    if not found or role not in ROLES or not count.isdigit():
        raise PdctlError(f"{text!r} is no count", "write prefill=6, decode=10 or router=2", ExitCode.USAGE)
    return role, int(count)


def _run(namespace: str, context: str | None, verb: str, timeout: float, sets: Sets) -> None:
    take_token()
    screen = Screen()
    try:
        asyncio.run(_change(namespace, context, verb, timeout, sets, screen))
    except KeyboardInterrupt:
        screen.close()
        raise PdctlError(
            f"interrupted; the {verb} goes on in the cluster", f"look on: pdctl status --namespace {namespace} --watch",
            ExitCode.INTERRUPTED,
        ) from None  # fmt: skip
    finally:
        screen.close()


async def _change(namespace: str, context: str | None, verb: str, timeout: float, sets: Sets, screen: Screen) -> None:
    helm = await find_helm()
    cluster = await Cluster.connect(context)
    try:
        await check_cluster(cluster, namespace, named=context is not None, verb=verb)
        helm = Helm(helm.program, helm.version, cluster.context, namespace)
        told = await sets(cluster)
        verdict, watched, snapshot = await change(cluster, helm, namespace, verb, told, timeout, screen)
    finally:
        await cluster.close()
    screen.close()
    if verdict is Verdict.READY:
        out.print(Text.assemble(("ready ", "bold green"), f"{namespace}  ({counts(snapshot)})"))
        return
    for finding in watched.findings:
        for line in finding_lines(finding, snapshot):
            err.print(line, soft_wrap=True)
    cause, code = summary(verdict, watched.findings, namespace, timeout)
    step = watched.findings[0].fix if watched.findings else f"look on: pdctl status --namespace {namespace} --watch"
    raise PdctlError(cause, f"{step}; back: helm rollback, or pdctl deploy with the values as they were", code)
