"""`vllm bench serve` within an engine's pod, where it was started: how far it is, and what it measured."""

import re
from collections.abc import Callable
from typing import Any

from pdctl.bench import vllm
from pdctl.bench.measure import Progress
from pdctl.bench.workload import Workload
from pdctl.cluster.api import ApiError
from pdctl.cluster.beside import kept_in, object_name, way_to_router
from pdctl.cluster.detached import Detached, Look
from pdctl.errors import PdctlError
from pdctl.runs.run import Run
from pdctl.targets.kubernetes import KubernetesTarget

CONTAINER = "vllm"
LOG = "vllm.log"
_OF_A_ROLE = ("app.kubernetes.io/name", "app.kubernetes.io/instance", "llm-d.ai/role")
_DONE = re.compile(rb"(\d+)/(\d+) \[")
_TAIL = 400  # bytes of the log in which the newest state of its progress bar stands


def commands(run: Run, target: KubernetesTarget, tokenizer: str | None) -> list[list[str]]:
    """Give the command of each repeat."""
    workload, url, model = run.workload, target.router_url, target.model
    return [
        [
            "vllm",
            *vllm.arguments(workload, url, model, tokenizer or target.weights, workload.seed + repeat),
            *vllm.saving(".", f"{repeat}.json"),
        ]
        for repeat in range(run.about["repeats"])
    ]


def start(run: Run, target: KubernetesTarget, tokenizer: str | None, tell: Callable[[str], None]) -> None:
    """Start all repeats in an engine's pod, which is let through to the router where network policies keep it in.

    Raises:
        PdctlError: no engine is ready, or its pod does not run commands.
    """
    pod = _chosen(target)
    run.note(pod=pod["metadata"]["name"], deployment={"namespace": target.name, "context": target.context})
    labels = pod["metadata"]["labels"]
    if kept_in(target.objects("networkpolicies"), labels):
        chosen = {name: labels[name] for name in _OF_A_ROLE if name in labels}
        try:
            target.apply("networkpolicies", way_to_router(run.name, chosen, target.router_ports[0]))
        except ApiError as error:
            tell(f"{pod['metadata']['name']} may not reach the router: {error.cause}")
    detached(run, target, tell).start(commands(run, target, tokenizer))


def take(run: Run, target: KubernetesTarget, tell: Callable[[str], None]) -> None:
    """Remove what a run has in the cluster, and end what still runs there."""
    detached(run, target, tell).take()
    target.delete("networkpolicies", object_name(run.name))


def detached(run: Run, target: KubernetesTarget, tell: Callable[[str], None]) -> Detached:
    """Give what a run has running in its pod."""
    return Detached(target.execute, run.about["pod"], CONTAINER, run.name, tell)


def done_of(workload: Workload, statuses: int, tail: bytes) -> int:
    """Give how many requests have ended, as the progress bar in the log says it."""
    found = [int(done) for done, total in _DONE.findall(tail) if int(total) == workload.num_prompts]
    return statuses * workload.num_prompts + (found[-1] if found else 0)


def follow(run: Run, target: KubernetesTarget, on_progress: Progress, tell: Callable[[str], None]) -> None:
    """Follow it to its end, fetch what it measured, and take it away there.

    Raises:
        PdctlError: it failed, or is no longer there; the repeats that are whole are kept.
    """
    work = detached(run, target, tell)
    path, tail, known = run.folder / LOG, b"", 0
    path.write_bytes(b"")
    with path.open("ab") as log:

        def on_look(seen: Look) -> None:
            nonlocal tail, known
            log.write(seen.log)
            log.flush()
            # the bar of the repeat before is no progress of the next one
            tail = (b"" if len(seen.statuses) > known else tail)[-_TAIL:] + seen.log
            known = len(seen.statuses)
            if not seen.over:
                on_progress(done_of(run.workload, known, tail[-_TAIL:]), 0)

        end = work.follow(on_look)
    failures = 0
    for repeat, status in enumerate(end.statuses):
        if status == 0:
            fetched = run.folder / f"vllm-{repeat}.json"
            work.fetch(f"{repeat}.json", fetched)
            failures += vllm.keep(run, repeat, fetched)["failed"]
            fetched.unlink()
    on_progress(run.workload.num_prompts * end.statuses.count(0), failures)
    take(run, target, tell)
    if any(end.statuses):
        raise vllm.failed(end.statuses[-1], path)


def _chosen(target: KubernetesTarget) -> Any:
    """Choose where to measure from: a ready prefill engine's pod, else a decode engine's."""
    for role in ("prefill", "decode"):
        if (pod := target.ready_pod(role)) is not None:
            return pod
    raise PdctlError("no engine's pod is ready", f"see why: pdctl status{target.flags}")
