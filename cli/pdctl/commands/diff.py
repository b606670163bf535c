"""`pdctl diff`: what deploying would change."""

import asyncio

import typer
from rich.text import Text

from pdctl.cluster import paths
from pdctl.cluster.api import Cluster
from pdctl.cluster.deploying import render, take_token
from pdctl.cluster.differences import Difference, differences
from pdctl.cluster.helm import Helm, find_helm
from pdctl.cluster.identity import check_cluster
from pdctl.cluster.releases import Asked, releases
from pdctl.commands import wishes
from pdctl.commands.options import Context, Namespace
from pdctl.console import err, out
from pdctl.errors import ExitCode
from pdctl.targets.found import namespace_of

COLOURS = {"create": "green", "change": "yellow", "remove": "red", "refused": "bold red"}


def diff(
    namespace: Namespace = None,
    context: Context = None,
    prefill: wishes.Prefill = None,
    decode: wishes.Decode = None,
    model: wishes.Model = None,
    network: wishes.Network = "none",
    files: wishes.Files = None,
    sets: wishes.Sets = None,
    image: wishes.Image = None,
) -> None:
    """Show what deploy would change, by the server's own dry run. Exit status 2 when there are differences."""
    take_token()
    asked = wishes.asked(model, network, files, sets, prefill, decode, image)
    found = asyncio.run(_differences(asked, namespace_of(namespace), context))
    for one in found:
        out.print(Text.assemble((one.verb, COLOURS[one.verb]), f" {one.kind}/{one.name}"), soft_wrap=True)
        for line in one.lines:
            colour = "green" if line.startswith("+") else "red" if line.startswith("-") else "dim"
            out.print(Text(f"  {line}", colour), soft_wrap=True)
    if not found:
        err.print("no differences")
    if any(one.verb == "refused" for one in found):
        raise typer.Exit(ExitCode.FAILURE)
    if found:
        raise typer.Exit(ExitCode.USAGE)


async def _differences(asked: Asked, namespace: str, context: str | None) -> list[Difference]:
    wished = releases(asked)
    helm = await find_helm()
    cluster = await Cluster.connect(context)
    try:
        await check_cluster(cluster, namespace, named=context is not None, verb="diff")
        helm = Helm(helm.program, helm.version, cluster.context, namespace)
        exists = await cluster.find(f"{paths.NAMESPACES}/{namespace}") is not None
        rendered = await render(cluster, helm, wished)
        installed = []
        for release in wished:
            if exists and (await helm.state(release.name)).exists:
                installed += await helm.manifest(release.name)
        wanted = [thing for things in rendered.values() for thing in things]
        return await differences(cluster, namespace, wanted, installed, exists=exists)
    finally:
        await cluster.close()
