"""Which deployment a command means."""

from pdctl import deployment
from pdctl.cluster import record
from pdctl.errors import ExitCode, PdctlError
from pdctl.targets.kubernetes import KubernetesTarget
from pdctl.targets.local import LocalTarget
from pdctl.targets.target import Target

LOCAL = "local"  # name of a deployment on this machine that is given none


def choose(name: str | None, namespace: str | None) -> tuple[str | None, str | None]:
    """Decide between this machine and a cluster: what is named, else the only deployment that is known.

    Returns:
        The name of a local deployment or a namespace; the other one is None.

    Raises:
        PdctlError: both are named, or several are known and none is named.
    """
    if name is not None and namespace is not None:
        raise PdctlError(
            "--name is for a deployment on this machine, --namespace for one on Kubernetes", "give one of them",
            ExitCode.USAGE,
        )  # fmt: skip
    if name is not None or namespace is not None:
        return name, namespace
    here, there = deployment.names(), record.namespaces()
    if there and here:
        raise PdctlError(
            f"deployed are on this machine: {', '.join(here)}; on Kubernetes: {', '.join(there)}",
            "say which: --name, or --namespace", ExitCode.USAGE,
        )  # fmt: skip
    return (None, _only(there)) if there else (LOCAL, None)


def namespace_of(namespace: str | None) -> str:
    """Give the namespace that a command of Kubernetes means: the one that is named, else the only one that is known.

    Raises:
        PdctlError: none is known, or several are.
    """
    if namespace is not None:
        return namespace
    there = record.namespaces()
    if not there:
        raise PdctlError(
            "no deployment on Kubernetes is known here", "say where one is: --namespace, or run pdctl deploy",
            ExitCode.USAGE,
        )  # fmt: skip
    return _only(there)


def _only(namespaces: list[str]) -> str:
    if len(namespaces) > 1:
        raise PdctlError(
            f"deployed on Kubernetes are: {', '.join(namespaces)}", "say which one: --namespace", ExitCode.USAGE
        )
    return namespaces[0]


def find(name: str | None, namespace: str | None, context: str | None) -> Target:
    """Find a deployment.

    Raises:
        PdctlError: there is none such, or it cannot be told which is meant.
    """
    name, namespace = choose(name, namespace)
    if namespace is None:
        return LocalTarget.find(name or LOCAL)
    return KubernetesTarget(namespace, context)
