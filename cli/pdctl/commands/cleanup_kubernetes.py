"""`pdctl cleanup --namespace`: what a person sees while a deployment leaves a cluster."""

import asyncio
import sys

from rich.table import Table
from rich.text import Text

from pdctl.cluster import paths, record
from pdctl.cluster.api import Cluster
from pdctl.cluster.cleaning import Found, look, remove, remove_namespace
from pdctl.cluster.deploying import take_token
from pdctl.cluster.helm import Helm, find_helm
from pdctl.cluster.identity import check_cluster
from pdctl.cluster.lock import locked
from pdctl.console import confirmed, err, out
from pdctl.errors import ExitCode, PdctlError

PATIENCE = 60.0
SHOWN_OTHERS = 8


def cleanup_kubernetes(namespace: str, context: str | None, delete_namespace: bool, timeout: float, yes: bool) -> None:
    """Take a deployment out of a cluster.

    Raises:
        PdctlError: it is not there, or does not go.
    """
    take_token()
    try:
        asyncio.run(_cleanup(namespace, context, delete_namespace, timeout, yes))
    except KeyboardInterrupt:
        raise PdctlError(
            "interrupted; what was told to go still goes in the cluster",
            f"run pdctl cleanup --namespace {namespace} again", ExitCode.INTERRUPTED,
        ) from None  # fmt: skip


def _say(text: str) -> None:
    err.print(Text(text), soft_wrap=True)


async def _cleanup(namespace: str, context: str | None, delete_namespace: bool, timeout: float, yes: bool) -> None:
    helm = await find_helm()
    cluster = await Cluster.connect(context)
    try:
        await check_cluster(cluster, namespace, named=context is not None, verb="cleanup")
        helm = Helm(helm.program, helm.version, cluster.context, namespace)
        space = await cluster.find(f"{paths.NAMESPACES}/{namespace}")
        found = None if space is None else await look(cluster, helm, namespace, space)
        if found is None or (found.empty and not (delete_namespace and found.made_namespace)):
            record.forget(namespace)
            what = "there is no namespace" if found is None else "nothing of pdctl is in namespace"
            out.print(f"{what} {namespace} in {cluster.context}: nothing to clean up", soft_wrap=True)
            return
        _show(namespace, cluster.context, found, delete_namespace)
        if delete_namespace and found.others:
            raise PdctlError(
                f"namespace {namespace} has what pdctl did not make: {', '.join(found.others[:SHOWN_OTHERS])}"
                + (f" and {len(found.others) - SHOWN_OTHERS} more" if len(found.others) > SHOWN_OTHERS else ""),
                "move or delete that yourself, or leave --delete-namespace out; nothing was removed",
                ExitCode.PREFLIGHT,
            )
        if not yes and sys.stdin.isatty() and not confirmed("Remove this?", default=False):
            raise PdctlError("nothing was removed", f"run pdctl cleanup --namespace {namespace} when you are ready")
        cluster.patience = PATIENCE
        async with locked(cluster, namespace, "cleanup", _say):
            await remove(cluster, helm, namespace, found, timeout, _say)
        if delete_namespace:
            await remove_namespace(cluster, namespace, timeout, _say)
        record.forget(namespace)
        kept = [] if delete_namespace else [f"namespace {namespace}"]
        kept += [*found.kept, *found.others[:SHOWN_OTHERS]]
        out.print(
            f"gone: {namespace}, {found.pods} pods" + (f"; kept: {', '.join(kept)}" if kept else ""), soft_wrap=True
        )
    finally:
        await cluster.close()


def _show(namespace: str, context: str, found: Found, delete_namespace: bool) -> None:
    err.print(Text.assemble(("cleanup ", "bold"), (namespace, "bold"), f" through context {context}"))
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, told in found.releases.items():
        table.add_row("goes", f"release {name}", told)
    if found.pods:
        table.add_row("goes", f"{found.pods} pods", "with their GPUs")
    for name in found.secrets:
        table.add_row("goes", f"Secret {name}", "made by pdctl")
    table.add_row(
        "goes" if delete_namespace else "stays",
        f"namespace {namespace}",
        "" if delete_namespace else "--delete-namespace removes it",
    )
    for one in found.kept:
        table.add_row("stays", one, "its values say so")
    for one in found.others[:SHOWN_OTHERS]:
        table.add_row("stays", one, "not made by pdctl")
    err.print(table)
