"""lm_eval as a Job beside the engines: started, followed, its files fetched, taken away.

It runs in the engines' image, which has Python and is on their nodes already, or in another one that has lm_eval.
"""

import time
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import orjson

from pdctl.cluster.api import ApiError, Unreachable
from pdctl.cluster.beside import labels, object_name
from pdctl.cluster.detached import Detached, GoneError, Look, command
from pdctl.errors import ExitCode, PdctlError
from pdctl.evals.evaluate import LM_EVAL, Heard, Told, Wish, orders_of
from pdctl.podstate import Phase, Watched, diagnose, read_snapshot
from pdctl.runs.run import Run
from pdctl.runs.setting import Place
from pdctl.targets.kubernetes import KubernetesTarget

CONTAINER = "lm-eval"
FILES = "/pdctl/eval"
ANSWERS = "answers.jsonl"
FETCHED = (ANSWERS, "samples.jsonl", "scores.json")
_MOST_BYTES = 900_000  # a ConfigMap has room for 1 MiB
_START_SECONDS, _UNSCHEDULABLE_SECONDS = 900.0, 120.0
_SCRATCH = "/scratch"
_PACKAGES = "packages"
_INSTALL = f"""\
import importlib.metadata, subprocess, sys
wished, *others = {list(LM_EVAL.packages)!r}
try:
    there = importlib.metadata.version("lm_eval") == wished.partition("==")[2]
except importlib.metadata.PackageNotFoundError:
    there = False
if not there:
    print("installing", wished, flush=True)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--target", "{_PACKAGES}"]
    sys.exit(subprocess.call([*pip, wished, *others]))
"""
_RUN = f"""\
import runpy, sys
sys.path.insert(0, "{_PACKAGES}")
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def commands() -> list[list[str]]:
    """Give what the Job's container runs: lm_eval is installed where the image lacks it, then the driver."""
    return [
        ["python3", "-c", _INSTALL],
        ["python3", "-c", _RUN, f"{FILES}/driver.py", f"{FILES}/orders.json"],
    ]


def shipped(orders: dict[str, Any], tasks: Path | None) -> dict[str, str]:
    """Give the files that the Job needs, by their paths there: the driver, its orders, tasks of the user's own.

    Raises:
        PdctlError: these are too large for a ConfigMap, or no text.
    """
    texts = {
        "driver.py": (files("pdctl.evals") / "driver.py").read_text(),
        "orders.json": orjson.dumps(orders).decode(),
    }
    try:
        for path in sorted(one for one in tasks.rglob("*") if one.is_file()) if tasks else ():
            texts[f"tasks/{path.relative_to(tasks or path)}"] = path.read_text()
    except UnicodeDecodeError:
        raise PdctlError(f"{path} is no text", "keep data sets out of the folder of tasks", ExitCode.USAGE) from None
    if sum(len(text.encode()) for text in texts.values()) > _MOST_BYTES:
        raise PdctlError(
            f"{tasks} is too large for a ConfigMap", "keep data sets out of it, or evaluate from here", ExitCode.USAGE
        )
    return texts


def objects(run: str, image: str, template: dict[str, Any], texts: dict[str, str]) -> tuple[Any, Any]:
    """Give the ConfigMap and the Job.

    The Job has what an engine's pod has that it needs too: the hub's token by its Secret, the level of security.

    Args:
        run: name of the run.
        image: what it runs in.
        template: an engine's pod as its Deployment has it.
        texts: files by their paths.
    """
    spec, name = template["spec"], object_name(run)
    engine = spec["containers"][0]
    keys = {f"file-{number}": path for number, path in enumerate(texts)}
    container = {
        "name": CONTAINER,
        "image": image,
        "imagePullPolicy": "IfNotPresent",
        "command": command("stay", name, commands()),
        "env": [
            *({"name": one, "value": _SCRATCH} for one in ("HOME", "HF_HOME")),
            *(one for one in engine.get("env") or () if one["name"] == "HF_TOKEN" and "valueFrom" in one),
        ],
        "resources": {"requests": {"cpu": "1", "memory": "1Gi"}, "limits": {"cpu": "4", "memory": "8Gi"}},
        "securityContext": engine.get("securityContext") or {},
        "volumeMounts": [
            {"name": "files", "mountPath": FILES, "readOnly": True},
            {"name": "scratch", "mountPath": _SCRATCH},
        ],
    }
    items = [{"key": key, "path": path} for key, path in keys.items()]
    pod = {
        "restartPolicy": "OnFailure",
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "containers": [container],
        "volumes": [
            {"name": "files", "configMap": {"name": name, "items": items}},
            {"name": "scratch", "emptyDir": {}},
        ],
        **{key: spec[key] for key in ("imagePullSecrets", "securityContext", "tolerations") if spec.get(key)},
    }
    meta = {"name": name, "labels": labels("eval")}
    config_map = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": meta,
        "data": {key: texts[path] for key, path in keys.items()},
    }
    made = {"metadata": {"labels": labels("eval")}, "spec": pod}
    job = {
        "apiVersion": "batch/v1", "kind": "Job", "metadata": meta,
        "spec": {"backoffLimit": 3, "ttlSecondsAfterFinished": 24 * 3600, "template": made},
    }  # fmt: skip
    return config_map, job


def start(run: Run, target: KubernetesTarget, wish: Wish, place: Place, image: str | None) -> None:
    """Start the Job.

    Raises:
        PdctlError: the API refuses, or a setting is only known on this machine.
    """
    if wish.tokenizer and Path(wish.tokenizer).exists():
        raise PdctlError(
            f"the cluster has no {wish.tokenizer}", "name a tokenizer of the hub, or served", ExitCode.USAGE
        )
    for name in FETCHED:
        (run.folder / name).unlink(missing_ok=True)
    orders = orders_of(wish, place, "", Path()) | {"base_url": f"{target.router_url}/v1/completions"}
    tasks = Path(wish.include_path) if wish.include_path else None
    orders["include_path"] = f"{FILES}/tasks" if tasks else None
    template = target.engine_template
    image = image or template["spec"]["containers"][0]["image"]
    config_map, job = objects(run.name, image, template, shipped(orders, tasks))
    target.apply("configmaps", config_map)
    target.apply("jobs", job)
    run.note(pod=f"job/{object_name(run.name)}", deployment={"namespace": target.name, "context": target.context})


def goes_on(run: Run, target: KubernetesTarget) -> bool:
    """Whether its Job is still there."""
    return target.object("jobs", object_name(run.name)) is not None


def take(run: Run, target: KubernetesTarget) -> None:
    """Remove what a run has in the cluster."""
    for plural in ("jobs", "configmaps"):
        target.delete(plural, object_name(run.name))


def follow(run: Run, target: KubernetesTarget, on_told: Callable[[Told], None], tell: Callable[[str], None]) -> Told:
    """Follow it to its end; answers are fetched as they come, scores at the end, then it is taken away.

    Raises:
        PdctlError: it cannot start, failed, or an answer cannot be right.
    """
    try:
        while True:
            pod = _running(run, target, tell)
            work = Detached(target.execute, pod, CONTAINER, object_name(run.name), tell)
            try:
                told = _fetched(run, work, on_told)
                break
            except GoneError as gone:
                if not goes_on(run, target):
                    raise
                tell(f"{gone.cause}; the Job starts another one, which begins anew")
                (run.folder / ANSWERS).unlink(missing_ok=True)
    except (ApiError, Unreachable):
        raise  # the Job knows nothing of it, and goes on
    except PdctlError:
        take(run, target)
        raise
    take(run, target)
    return told


def _fetched(run: Run, work: Detached, on_told: Callable[[Told], None]) -> Told:
    """Follow one pod to its end."""
    log, rest = run.folder / "lm_eval.log", b""
    heard = Heard(log)
    log.write_bytes(b"")
    with log.open("ab") as file:

        def on_look(seen: Look) -> None:
            nonlocal rest
            file.write(seen.log)
            file.flush()
            *lines, rest = (rest + seen.log).split(b"\n")
            work.append(ANSWERS, run.folder / ANSWERS)
            if heard.all(lines):
                on_told(heard.told)

        end = work.follow(on_look)
    if not heard.over:
        raise heard.failed(f"the Job's command ended with status {end.statuses[-1]}")
    for one in FETCHED:
        work.fetch(one, run.folder / one)
    return heard.told


def _running(run: Run, target: KubernetesTarget, tell: Callable[[str], None]) -> str:
    """Wait until the Job's container runs, and give its pod's name."""
    watched, said = Watched(_START_SECONDS, _UNSCHEDULABLE_SECONDS), ""
    name = object_name(run.name)
    while True:
        pods = [one for one in target.objects("pods") if one["metadata"].get("labels", {}).get("job-name") == name]
        snapshot = read_snapshot(time.time(), pods, [], target.objects("events"))
        findings = diagnose(snapshot)
        watched.judge(snapshot, findings)
        for pod in snapshot.pods:
            if pod.phase is Phase.READY:
                return pod.name
        late = watched.began is not None and snapshot.at - watched.began > _START_SECONDS
        if watched.hopeless(snapshot.at) or late:
            take(run, target)
            raise PdctlError(
                f"the Job {name} does not start" + (f": {findings[0].message}" if findings else ""),
                findings[0].fix if findings else f"see kubectl describe job {name}",
                evidence=list(findings[0].evidence) if findings else None,
            )
        now = findings[0].message if findings else f"{name} starts"
        if now != said:
            said = now
            tell(now)
        time.sleep(1)
