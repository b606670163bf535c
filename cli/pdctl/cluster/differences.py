"""What deploying would change, object by object: the server itself says what each would become (dry run)."""

import asyncio
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from pdctl.cluster import paths
from pdctl.cluster.api import ApiError, Cluster

# What the server writes by itself, which would be noise.
_NOISE = ("managedFields", "resourceVersion", "generation", "uid", "creationTimestamp", "selfLink")


@dataclass(frozen=True, slots=True)
class Difference:
    """One object.

    Args:
        verb: `create`, `change`, `remove`, or `refused` (then `lines` say why).
        lines: unified diff.
    """

    verb: str
    kind: str
    name: str
    lines: tuple[str, ...]


def _plain(thing: Mapping[str, Any]) -> str:
    meta = {name: told for name, told in thing["metadata"].items() if name not in _NOISE}
    annotations = {
        name: told for name, told in (meta.get("annotations") or {}).items()
        if not name.startswith(("deployment.kubernetes.io/", "meta.helm.sh/"))
    }  # fmt: skip
    meta["annotations"] = annotations
    told = {**thing, "metadata": meta}
    told.pop("status", None)
    return yaml.safe_dump(told, sort_keys=True)


def _diff(old: str, new: str) -> tuple[str, ...]:
    return tuple(difflib.unified_diff(old.splitlines(), new.splitlines(), "live", "wanted", lineterm="", n=2))


async def differences(
    cluster: Cluster, namespace: str, wanted: list[Any], installed: list[Any], *, exists: bool
) -> list[Difference]:
    """Compare what is wanted with what is live.

    Args:
        cluster: where.
        namespace: of the objects.
        wanted: rendered objects.
        installed: objects of the releases as they are now; those that are no longer wanted would go.
        exists: whether the namespace does; without it nothing can be tried, and all is new.
    """

    async def one(thing: Any) -> Difference | None:
        kind, name = thing["kind"], thing["metadata"]["name"]
        path = paths.of(thing, namespace)
        live = await cluster.find(path) if exists else None
        if live is None and not exists:
            return Difference("create", kind, name, ())
        try:
            would = await cluster.apply(path, thing, dry_run=True, manager="helm")
        except ApiError as error:
            return Difference("refused", kind, name, (error.message,))
        if live is None:
            return Difference("create", kind, name, ())
        lines = _diff(_plain(live), _plain(would))
        return Difference("change", kind, name, lines) if lines else None

    found = await asyncio.gather(*(one(thing) for thing in wanted))
    kept = {(thing["kind"], thing["metadata"]["name"]) for thing in wanted}
    gone = [
        Difference("remove", thing["kind"], thing["metadata"]["name"], ())
        for thing in installed
        if (thing["kind"], thing["metadata"]["name"]) not in kept
    ]
    return [difference for difference in (*found, *gone) if difference is not None]
