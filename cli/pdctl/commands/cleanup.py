"""`pdctl cleanup`: end a deployment and remove its files."""

import sys

import typer

from pdctl import deployment
from pdctl.commands.options import Name, Yes
from pdctl.console import err, out
from pdctl.errors import PdctlError
from pdctl.targets import LocalTarget


def cleanup(name: Name = "local", yes: Yes = False) -> None:
    """Stop every process of a deployment, wait until all are gone, remove its files."""
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
