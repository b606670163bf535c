"""Which cluster is which, and who goes: no command goes to another cluster than the deployment's."""

import getpass
import os

from pdctl.cluster import paths, record
from pdctl.cluster.api import ApiError, Cluster
from pdctl.errors import ExitCode, PdctlError


def user() -> str:
    """Give the name of who runs this, or the number: in a pod there may be no name for it."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return f"uid {os.getuid()}"


async def identity(cluster: Cluster) -> str:
    """Give what a cluster is told by, whatever its context is called."""
    try:
        system = await cluster.get(f"{paths.NAMESPACES}/kube-system")
    except ApiError:
        return cluster.server
    uid: str = system["metadata"]["uid"]
    return uid


async def check_cluster(cluster: Cluster, namespace: str, *, named: bool, verb: str) -> str:
    """See that a command goes to the cluster that the namespace was deployed to.

    Args:
        cluster: where it would go.
        namespace: of the deployment.
        named: whether the context was given with the command.
        verb: the command, for messages.

    Returns:
        What the cluster is told by.

    Raises:
        PdctlError: it is another one; exit code PREFLIGHT.
    """
    there = await identity(cluster)
    known = record.load(namespace)
    if known is None or there == known.cluster or cluster.server == known.server == known.cluster:
        return there
    if named and cluster.context != known.context:
        return there  # another one was asked for by name
    what = f"{namespace} was deployed to another cluster, through the context {known.context} ({known.server})"
    if cluster.context == known.context:
        raise PdctlError(
            f"the context {cluster.context} leads to another cluster than when {namespace} was deployed",
            f"if the old cluster is gone, remove {record.path_of(namespace)}, then run pdctl {verb} again",
            ExitCode.PREFLIGHT,
        )  # fmt: skip
    raise PdctlError(
        f"{what}; the current context is {cluster.context}",
        f"run pdctl {verb} --namespace {namespace} --context {known.context}, or name the other one if you mean it",
        ExitCode.PREFLIGHT,
    )
