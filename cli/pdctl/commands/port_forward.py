"""`pdctl port-forward`: the router's ports, here."""

import threading
from typing import Annotated

import typer
from rich.text import Text

from pdctl.commands.options import Context, Namespace
from pdctl.console import err, out
from pdctl.targets.found import namespace_of
from pdctl.targets.kubernetes import KubernetesTarget


def port_forward(
    namespace: Namespace = None,
    context: Context = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port here; 0: any free one.")] = 10001,
    metrics_port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port here of the metrics; 0: any free one.")
    ] = 29000,
) -> None:
    """Make the router's ports reachable here until Ctrl-C; finds another router pod when one goes."""
    with KubernetesTarget(namespace_of(namespace), context) as target:
        api, metrics = target.router_ports
        with target.forwards({api: port, metrics: metrics_port}, lambda text: err.print(Text(text, "yellow"))) as local:
            out.print(f"router   http://127.0.0.1:{local[api]}/v1", soft_wrap=True)
            out.print(f"metrics  http://127.0.0.1:{local[metrics]}/metrics", soft_wrap=True)
            err.print("Ctrl-C ends it")
            threading.Event().wait()
