"""Options that several commands share."""

from enum import StrEnum
from typing import Annotated

import typer


class Format(StrEnum):
    """How data is printed."""

    TABLE = "table"
    JSON = "json"
    YAML = "yaml"


Name = Annotated[
    str | None, typer.Option("--name", help="Name of a deployment on this machine.", show_default="the only one")
]
Namespace = Annotated[
    str | None,
    typer.Option(
        "--namespace", "-n", envvar="PDCTL_NAMESPACE", help="Namespace of a deployment on Kubernetes.",
        show_default="the only one",
    ),
]  # fmt: skip
Context = Annotated[
    str | None,
    typer.Option(
        "--context", envvar="PDCTL_CONTEXT", help="Context of the kubeconfig.", show_default="the current one"
    ),
]
Output = Annotated[Format, typer.Option("--output", "-o", envvar="PDCTL_OUTPUT", help="How data is printed.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
