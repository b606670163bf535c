"""`pdctl deploy`: bring a deployment up, here or in a cluster."""

from typing import Annotated

import typer

from pdctl.commands import wishes
from pdctl.commands.deploy_kubernetes import Manner, deploy_kubernetes
from pdctl.commands.deploy_local import deploy_local
from pdctl.commands.options import Context, Yes
from pdctl.errors import ExitCode, PdctlError
from pdctl.targets.local import MOST_OF_A_ROLE, Wish
from pdrouter.policies import POLICIES

HERE, THERE = "On this machine", wishes.PANEL


def deploy(
    local: Annotated[
        bool, typer.Option("--local", help="As processes on this machine, with simulated engines.")
    ] = False,
    namespace: Annotated[
        str | None,
        typer.Option("--namespace", "-n", envvar="PDCTL_NAMESPACE", help="On Kubernetes, in this namespace."),
    ] = None,
    prefill: wishes.Prefill = None,
    decode: wishes.Decode = None,
    model: wishes.Model = None,
    policy: Annotated[
        str | None, typer.Option(help=f"How engines are chosen: {', '.join(POLICIES)}.", show_default="consistent_hash")
    ] = None,
    timeout: Annotated[
        float | None,
        typer.Option(help="Seconds until everything must be ready.", show_default="120; 3000 on Kubernetes"),
    ] = None,
    yes: Yes = False,
    name: Annotated[
        str | None, typer.Option("--name", help="Name of the deployment.", rich_help_panel=HERE, show_default="local")
    ] = None,
    speed: Annotated[
        float,
        typer.Option(min=0.01, help="How much faster than an H200 the simulated engines run.", rich_help_panel=HERE),
    ] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Makes the simulated engines repeat.", rich_help_panel=HERE)] = None,
    port: Annotated[
        int | None,
        typer.Option(help="The router's port.", show_default="10001 or the next free one", rich_help_panel=HERE),
    ] = None,
    context: Context = None,
    network: wishes.Network = "none",
    files: wishes.Files = None,
    sets: wishes.Sets = None,
    image: wishes.Image = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check and show the plan, change nothing.", rich_help_panel=THERE)
    ] = False,
    detach: Annotated[
        bool, typer.Option("--detach", "-d", help="Do not wait for the pods.", rich_help_panel=THERE)
    ] = False,
    rollback: Annotated[
        bool, typer.Option("--rollback", help="After a failure undo what this run did.", rich_help_panel=THERE)
    ] = False,
    fail_unschedulable_after: Annotated[
        float, typer.Option(min=0, help="Seconds that a pod may find no node.", rich_help_panel=THERE)
    ] = 300.0,
) -> None:
    """Bring up prefill and decode engines with the router in front of them.

    HF_TOKEN of the environment becomes a Secret in the namespace, by the API; it is in no argument, file or release.
    """
    if policy is not None and policy not in POLICIES:
        raise PdctlError(f"there is no policy {policy!r}", f"choose one of {', '.join(POLICIES)}", ExitCode.USAGE)
    if local or (name is not None and namespace is None):
        prefill, decode = (8 if count is None else count for count in (prefill, decode))
        for count in (prefill, decode):
            if not 1 <= count <= MOST_OF_A_ROLE:
                raise PdctlError(f"{count} engines cannot be run here", f"from 1 to {MOST_OF_A_ROLE}", ExitCode.USAGE)
        served = model or "meta-llama/Llama-3.1-8B-Instruct"
        wish = Wish(name or "local", prefill, decode, served, speed, seed, policy or "consistent_hash", port)
        deploy_local(wish, timeout or 120.0, yes)
        return
    if namespace is None:
        raise PdctlError(
            "it is not said where to deploy", "add --local for this machine, or --namespace NAME for Kubernetes",
            ExitCode.USAGE,
        )  # fmt: skip
    wished = wishes.asked(model, network, files, sets, prefill, decode, image, policy)
    manner = Manner(dry_run, yes, detach, timeout or 3000.0, rollback, fail_unschedulable_after)
    deploy_kubernetes(wished, namespace, context, manner)
