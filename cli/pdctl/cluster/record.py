"""What is written down here of deployments on Kubernetes: to which cluster, so that no command goes to another one."""

import os
from dataclasses import asdict, dataclass
from pathlib import Path

import orjson

from pdctl.deployment import state_folder


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
        path = path_of(self.namespace)
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_suffix(".new")
        new.write_bytes(orjson.dumps(asdict(self), option=orjson.OPT_INDENT_2))
        os.replace(new, path)


def check_writable(namespace: str) -> None:
    """See that a deployment can be written down, before anything is made that would have to be.

    Raises:
        OSError: it cannot.
    """
    path_of(namespace).parent.mkdir(parents=True, exist_ok=True)
    new = path_of(namespace).with_suffix(".new")
    new.write_bytes(b" " * 4096)  # more than a record has
    new.unlink()


def folder(namespace: str) -> Path:
    """Give the folder of a deployment's files."""
    return state_folder() / "namespaces" / namespace


def path_of(namespace: str) -> Path:
    """Give the file of a deployment."""
    return folder(namespace) / "record.json"


def load(namespace: str) -> Record | None:
    """Read what is written down of a namespace, None when nothing is."""
    try:
        return Record(**orjson.loads(path_of(namespace).read_bytes()))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def forget(namespace: str) -> None:
    """Remove what is written down; evidence stays."""
    path_of(namespace).unlink(missing_ok=True)


def namespaces() -> list[str]:
    """Give the namespaces of all that is written down."""
    return sorted(path.parent.name for path in (state_folder() / "namespaces").glob("*/record.json"))
