"""Options that say what a deployment on Kubernetes is to be, shared by deploy, render and diff."""

from pathlib import Path
from typing import Annotated

import typer

from pdctl.cluster.releases import NETWORKS, Asked

PANEL = "On Kubernetes"

Model = Annotated[
    str | None,
    typer.Option(
        help="On this machine: served model name. On Kubernetes: llama31-8b, small, or a values file.",
        show_default="meta-llama/Llama-3.1-8B-Instruct; llama31-8b",
    ),
]
Network = Annotated[str, typer.Option(help=f"How KV travels: {', '.join(NETWORKS)}.", rich_help_panel=PANEL)]
Files = Annotated[
    list[Path] | None,
    typer.Option(
        "--values", "-f", help="Values with the keys engines and router; repeat for more, later ones decide.",
        rich_help_panel=PANEL, show_default=False,
    ),
]  # fmt: skip
Sets = Annotated[
    list[str] | None,
    typer.Option(
        "--set", help="engines.KEY=VALUE or router.KEY=VALUE of the charts; decides over files.",
        rich_help_panel=PANEL, show_default=False,
    ),
]  # fmt: skip
Image = Annotated[
    str | None, typer.Option(help="Image of the engines.", rich_help_panel=PANEL, show_default="the chart's")
]
Prefill = Annotated[int | None, typer.Option(min=0, help="Prefill engines.", show_default="8, or the model's values")]
Decode = Annotated[int | None, typer.Option(min=0, help="Decode engines.", show_default="8, or the model's values")]


def asked(
    model: str | None, network: str, files: list[Path] | None, sets: list[str] | None, prefill: int | None,
    decode: int | None, image: str | None, policy: str | None = None,
) -> Asked:  # fmt: skip
    """Put the options together."""
    return Asked(model or "llama31-8b", network, tuple(files or ()), tuple(sets or ()), prefill, decode, image, policy)
