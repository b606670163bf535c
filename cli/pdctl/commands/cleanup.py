"""`pdctl cleanup`: end a deployment and remove what pdctl made for it."""

import sys
from typing import Annotated

import typer

from pdctl import deployment
from pdctl.commands.cleanup_kubernetes import cleanup_kubernetes
from pdctl.commands.options import Context, Name, Namespace, Yes
from pdctl.console import err, out
from pdctl.errors import PdctlError
from pdctl.targets import LocalTarget
from pdctl.targets.found import LOCAL, choose


def cleanup(
    name: Name = None,
    namespace: Namespace = None,
    context: Context = None,
    delete_namespace: Annotated[
        bool, typer.Option("--delete-namespace", help="Remove the namespace, too, when nothing else is in it.")
    ] = False,
    timeout: Annotated[float, typer.Option(help="Seconds until all pods must be gone.")] = 600.0,
    yes: Yes = False,
) -> None:
    """Show what goes, end all of it, wait until it is gone. What pdctl did not make stays."""
    name, namespace = choose(name, namespace)
    if namespace is None:
        _local(name or LOCAL, yes)
        return
    cleanup_kubernetes(namespace, context, delete_namespace, timeout, yes)


def _local(name: str, yes: bool) -> None:
    known = deployment.load(name)
    running = known.running
    err.print(f"cleanup {name}: {len(running)} processes to stop, and the files in {known.folder}", soft_wrap=True)
    if not yes and sys.stdin.isatty() and not typer.confirm("Go on?", default=True, err=True):
        raise PdctlError("nothing was stopped", f"run pdctl cleanup --name {name} when you are ready")
    left = LocalTarget(known).stop()
    if left:
        raise PdctlError(f"still running: {', '.join(left)}", "stop these processes by hand, then run cleanup again")
    deployment.remove(name)
    out.print(f"gone: {name}, {len(running)} processes stopped")
