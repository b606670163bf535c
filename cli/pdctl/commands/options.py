"""Options that several commands share."""

from typing import Annotated

import typer

Name = Annotated[str, typer.Option("--name", help="Name of the deployment.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
