"""What is written down here of deployments on Kubernetes: to which cluster, so that no command goes to another one."""

import os
from dataclasses import asdict, dataclass
from pathlib import Path

import orjson

from pdctl.cluster import paths
from pdctl.cluster.api import ApiError, Cluster
from pdctl.deployment import state_folder
from pdctl.errors import ExitCode, PdctlError


@dataclass(frozen=True, slots=True)
class Record:
    """One deployment.

    Args:
        context: through which it was made.
        cluster: what the cluster is told by: the uid of its kube-system namespace, or its address.
        made_namespace: whether pdctl made the namespace.
    """

    namespace: str
    context: str
    server: str
    cluster: str
    model: str
    made_namespace: bool
    at: float

    def save(self) -> None:
        """Write it down; readers see the old or the new one, never half of one."""
        path = _path(self.namespace)
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_suffix(".new")
        new.write_bytes(orjson.dumps(asdict(self), option=orjson.OPT_INDENT_2))
        os.replace(new, path)


def folder(namespace: str) -> Path:
    """Give the folder of a deployment's files."""
    return state_folder() / "namespaces" / namespace


def _path(namespace: str) -> Path:
    return folder(namespace) / "record.json"


def load(namespace: str) -> Record | None:
    """Read what is written down of a namespace, None when nothing is."""
    try:
        return Record(**orjson.loads(_path(namespace).read_bytes()))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def forget(namespace: str) -> None:
    """Remove what is written down; evidence stays."""
    _path(namespace).unlink(missing_ok=True)


def namespaces() -> list[str]:
    """Give the namespaces of all that is written down."""
    return sorted(path.parent.name for path in (state_folder() / "namespaces").glob("*/record.json"))


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
    known = load(namespace)
    if known is None or there == known.cluster or cluster.server == known.server == known.cluster:
        return there
    if named and cluster.context != known.context:
        return there  # another one was asked for by name
    what = f"{namespace} was deployed to another cluster, through the context {known.context} ({known.server})"
    if cluster.context == known.context:
        raise PdctlError(
            f"the context {cluster.context} leads to another cluster than when {namespace} was deployed",
            f"if the old cluster is gone, remove {_path(namespace)}, then run pdctl {verb} again", ExitCode.PREFLIGHT,
        )  # fmt: skip
    raise PdctlError(
        f"{what}; the current context is {cluster.context}",
        f"run pdctl {verb} --namespace {namespace} --context {known.context}, or name the other one if you mean it",
        ExitCode.PREFLIGHT,
    )
