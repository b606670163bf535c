"""`pdctl render`: the objects as Kubernetes would get them."""

import asyncio
from typing import Annotated, Any

import typer

from pdctl.cluster.helm import Helm, find_helm
from pdctl.cluster.releases import NAMESPACE, Asked, releases
from pdctl.commands import wishes
from pdctl.commands.options import Format
from pdctl.console import print_json, yaml_text


def render(
    namespace: Annotated[
        str, typer.Option("--namespace", "-n", envvar="PDCTL_NAMESPACE", help="Namespace of the objects.")
    ] = NAMESPACE,
    prefill: wishes.Prefill = None,
    decode: wishes.Decode = None,
    model: wishes.Model = None,
    network: wishes.Network = "none",
    files: wishes.Files = None,
    sets: wishes.Sets = None,
    image: wishes.Image = None,
    output: Annotated[Format, typer.Option("--output", "-o", help="yaml or json.")] = Format.YAML,
) -> None:
    """Write all objects of a deployment; asks no cluster."""
    asked = wishes.asked(model, network, files, sets, prefill, decode, image)
    objects = asyncio.run(_render(asked, namespace))
    if output is Format.JSON:
        print_json(objects)
    else:
        print(yaml_text(*objects), end="")


async def _render(asked: Asked, namespace: str) -> list[Any]:
    wished = releases(asked)
    helm = await find_helm()
    helm = Helm(helm.program, helm.version, namespace=namespace)
    found = await asyncio.gather(*(helm.render(one) for one in wished))
    return [thing for things in found for thing in things]
