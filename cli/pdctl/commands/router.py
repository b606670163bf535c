"""`pdctl router`: which router stands before the engines of a deployment."""

from pathlib import Path
from typing import Annotated

import typer

from pdctl.commands.options import Context, Name, Namespace
from pdctl.console import err, out
from pdctl.errors import ExitCode, PdctlError
from pdctl.routers.choice import read
from pdctl.routers.programs import Programs
from pdctl.targets import find

LlmdEpp = Annotated[
    Path | None,
    typer.Option("--llm-d-epp", envvar="PDCTL_LLM_D_EPP", help="llm-d's endpoint picker, on this machine.",
                 show_default=False),
]  # fmt: skip
LlmdSidecar = Annotated[
    Path | None,
    typer.Option("--llm-d-sidecar", envvar="PDCTL_LLM_D_SIDECAR", help="llm-d's P/D sidecar, on this machine.",
                 show_default=False),
]  # fmt: skip

router = typer.Typer(help="Which router stands before the engines.", no_args_is_help=True)


@router.command("switch")
def switch(
    to: Annotated[
        str, typer.Argument(help="ours, vllm-router, llm-d, llm-d-pd-sample or llm-d-pd-guide, perhaps with :POLICY.",
                            metavar="ROUTER")
    ],
    name: Name = None,
    namespace: Namespace = None,
    context: Context = None,
    llm_d_epp: LlmdEpp = None,
    llm_d_sidecar: LlmdSidecar = None,
    sets: Annotated[
        list[str] | None,
        typer.Option("--set", help="KEY=VALUE of its chart, on Kubernetes.", show_default=False),
    ] = None,
    timeout: Annotated[float, typer.Option(help="Seconds until the other router must serve.")] = 300.0,
) -> None:  # fmt: skip
    """Let another router stand before the same engines. No engine is restarted; ours finishes the requests it has."""
    wanted = read(to)
    target = find(name, namespace, context)
    try:
        before = target.router
        try:
            target.switch(wanted, Programs(llm_d_epp, llm_d_sidecar, tuple(sets or ())), timeout, _tell)
        except KeyboardInterrupt:
            raise PdctlError(
                "interrupted; one router serves, the old one unless the other had been told to take over",
                f"see which: pdctl status{target.flags}", ExitCode.INTERRUPTED,
            ) from None  # fmt: skip
        out.print(f"[bold green]{wanted.title}[/] serves {target.router_url}/v1, {before.title} before", soft_wrap=True)
    finally:
        target.close()


def _tell(text: str) -> None:
    err.print(text, style="dim", soft_wrap=True)
