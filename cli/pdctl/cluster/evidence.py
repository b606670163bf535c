"""What a failure leaves behind: a folder with all that a person would ask for next, and no Secret or token in it."""

import asyncio
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pdctl.cluster import record
from pdctl.cluster.api import ApiError, Cluster, Unreachable
from pdctl.cluster.observe import AT_ONCE, Observer
from pdctl.console import yaml_text

LOG_LINES = 2000
MOST_LOGS = 40
KEPT = 10  # folders of one namespace


def _write(path: Path, text: str, secrets: Sequence[str]) -> None:
    for secret in secrets:
        text = text.replace(secret, "***")
    path.write_text(text)


def _plain(thing: Any) -> Any:
    meta = {name: told for name, told in thing["metadata"].items() if name != "managedFields"}
    return {**thing, "metadata": meta}


async def collect(
    cluster: Cluster, observer: Observer, *, summary: str, calls: Sequence[str], secrets: Sequence[str]
) -> Path:
    """Write the folder and give its path.

    Args:
        cluster: where the deployment is.
        observer: who looked at it last; its objects are written as they were then.
        summary: what went wrong, in words.
        calls: Helm's calls and what it said.
        secrets: values that are blotted out wherever they occur.
    """
    folder = record.folder(observer.namespace) / "evidence" / time.strftime("%Y%m%d-%H%M%S")
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    _write(folder / "summary.txt", summary, secrets)
    _write(folder / "helm.txt", "\n\n".join(calls), secrets)
    for kind, items in observer.raw.items():
        text = yaml_text(*(_plain(item) for item in items))
        _write(folder / f"{kind}.yaml", text, secrets)
    gate = asyncio.Semaphore(AT_ONCE)

    async def log(pod: str, container: str, previous: bool) -> None:
        query = {"container": container, "tailLines": LOG_LINES} | ({"previous": "true"} if previous else {})
        async with gate:
            try:
                text = await cluster.log(observer.namespace, pod, **query)
            except (ApiError, Unreachable):
                return
        if text:
            _write(folder / "logs" / f"{pod}.{container}{'.previous' if previous else ''}.log", text, secrets)

    logs = [
        log(pod["metadata"]["name"], one["name"], previous)
        for pod in observer.raw.get("pods", ())
        for one in (pod.get("status") or {}).get("containerStatuses") or ()
        for previous in (False, True)
        if not previous or one.get("restartCount")
    ]
    await asyncio.gather(*logs[:MOST_LOGS])
    _forget_old(folder.parent)
    return folder


def _forget_old(parent: Path) -> None:
    for old in sorted(parent.iterdir())[:-KEPT]:
        for path in sorted(old.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        old.rmdir()
