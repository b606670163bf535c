"""Measuring within a cluster: what runs there goes on when the command that started it is killed."""

import json
import pathlib
import signal
import uuid
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from pdctl.evals.evaluate import LM_EVAL
from support.tasks import make_tasks

from .commands import Pdctl
from .control_plane import ControlPlane

LOAD = ("bench", "48", "4", "--client", "vllm", "--input-len", "100", "--output-len", "300")


@pytest.fixture(scope="module")
def pdctl(cluster: ControlPlane, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pdctl]:
    """Give pdctl with an engine of each role and a router."""
    made = Pdctl(cluster, tmp_path_factory.mktemp("pdctl"), f"t-{uuid.uuid4().hex[:8]}")
    made.deploy().says(0, "ready ")
    yield made
    cluster.api.delete(f"/api/v1/namespaces/{made.namespace}")


def beside(pdctl: Pdctl) -> list[str]:
    """Give what measuring has put beside the deployment."""
    found = []
    for path in ("/api/v1", "/apis/batch/v1", "/apis/networking.k8s.io/v1"):
        kinds = {"/api/v1": ("configmaps", "pods"), "/apis/batch/v1": ("jobs",)}.get(path, ("networkpolicies",))
        for kind in kinds:
            for one in pdctl.plane.items(f"{path}/namespaces/{pdctl.namespace}/{kind}"):
                if (one["metadata"].get("labels") or {}).get("app.kubernetes.io/managed-by") == "pdctl":
                    found.append(f"{kind}/{one['metadata']['name']}")
    return found


def runs(pdctl: Pdctl) -> dict[str, Any]:
    """Give the state of each run that is kept."""
    return {one["name"].partition("-")[2].partition("-")[2]: one["state"]
            for one in json.loads(pdctl.locally("runs", "ls", "--json").out)}  # fmt: skip


def test_a_bench_goes_on_in_an_engines_pod_when_its_command_is_killed(pdctl: Pdctl) -> None:
    killed = pdctl.start(*LOAD, "--repeats", "2", "--label", "killed")
    killed.until("within ms-llama31", 60)
    [policy] = beside(pdctl)
    assert policy.startswith("networkpolicies/pdctl-")
    killed.process.send_signal(signal.SIGKILL)
    assert killed.end().code == -signal.SIGKILL
    assert runs(pdctl) == {"killed": "detached"}
    pdctl.locally("runs", "rm", "killed", "-y").says(1, "goes on in ms-llama31", "pdctl runs stop")
    came = pdctl.locally("bench", "--attach", "--output", "told.json")
    came.says(0, "SIMULATED engines", "Successful requests:                     48", "run: ")
    told = json.loads((pdctl.folder / "told.json").read_text())
    assert [(one["completed"], one["failed"], one["pdctl"]["client"]) for one in told] == [(48, 0, "vllm")] * 2
    [folder] = (pdctl.folder / "data/pdctl/runs").iterdir()
    lines = [json.loads(line) for line in (folder / "requests.jsonl").read_text().splitlines()]
    assert len(lines) == 96
    assert {line["output_tokens"] for line in lines} == {300}
    assert "48/48" in (folder / "vllm.log").read_text()
    assert runs(pdctl) == {"killed": "done"}
    assert not beside(pdctl)


def test_a_bench_that_is_interrupted_goes_on_until_it_is_stopped(pdctl: Pdctl) -> None:
    left = pdctl.start(*LOAD, "--label", "left")
    left.until("within ms-llama31", 60)
    left.interrupt()
    left.end().says(130, "goes on in ms-llama31", "pdctl bench --attach", "pdctl runs stop")
    pdctl.locally("runs", "stop", "left").says(0, "was ended in ms-llama31")
    assert runs(pdctl)["left"] == "failed"
    assert not beside(pdctl)
    pdctl.locally("bench", "--attach").says(1, "no run goes on in a cluster")


def test_a_failed_request_in_a_pod_is_a_failed_command(pdctl: Pdctl) -> None:
    pods = pdctl.plane.items(f"/api/v1/namespaces/{pdctl.namespace}/pods")
    [prefill] = [one["status"]["podIP"] for one in pods if one["metadata"]["labels"].get("llm-d.ai/role") == "prefill"]

    def fault(**told: Any) -> None:
        httpx.post(f"http://{prefill}:8000/sim/fault", json=told, trust_env=False).raise_for_status()

    fault(kind="status", code=400, count=100)
    try:
        failed = pdctl.run("bench", "4", "2", "--client", "vllm", "--input-len", "100", "--output-len", "5")
    finally:
        fault(kind="none")
    failed.says(1, "Failed requests:                         4", "4 of 4 requests failed", "4 x ")


@pytest.mark.timeout(600)
def test_an_evaluation_is_a_job_that_goes_on_when_its_command_is_killed(pdctl: Pdctl, tmp_path: pathlib.Path) -> None:
    LM_EVAL.program("python", print)
    make_tasks(tmp_path / "tasks", documents=80)
    asked = ("eval", "words,words_written", "1", "--in-cluster", "--image", "localhost/lm-eval:0.4.13",
             "--include-path", str(tmp_path / "tasks"), "--label", "job")  # fmt: skip
    killed = pdctl.start(*asked)
    killed.until(" requests, 1 at once", 280)
    killed.process.send_signal(signal.SIGKILL)
    killed.end()
    assert runs(pdctl)["job"] == "detached"
    assert sorted(one.partition("/")[0] for one in beside(pdctl)) == ["configmaps", "jobs", "pods"]
    assert {part["role"] for part in pdctl.told("status")["parts"]} == {"prefill", "decode", "router"}
    came = pdctl.locally("eval", "--resume", "job", seconds=280)
    came.says(0, "words_one", "words_written", "SIMULATED engines")
    [folder] = (pdctl.folder / "data/pdctl/runs").glob("*-job")
    answers = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    assert len({line["prompt"] for line in answers}) == 720
    assert runs(pdctl)["job"] == "done"
    pdctl.until(lambda: not beside(pdctl), "nothing is left beside the deployment")


@pytest.mark.timeout(400)
def test_routers_take_turns_before_the_engines_of_a_deployment_and_the_first_one_is_back_at_the_end(
    pdctl: Pdctl,
) -> None:
    engines = {part["name"] for part in pdctl.told("status")["parts"] if part["role"] != "router"}
    told = pdctl.run(
        "compare", "--routers", "ours,vllm-router", "12", "4", "--on", "cluster", "--repeats", "1", "--input-len", "60",
        "--output-len", "8", "--warmup", "2", "--label", "turns", seconds=380,
    )  # fmt: skip
    told.says(0, "SIMULATED engines", "pd-router, consistent_hash → vllm-router, consistent_hash", "report: ")
    points = json.loads(pdctl.locally("runs", "show", "turns", "--json").out)["points"]
    assert points == ["ours-consistent_hash", "vllm-router-consistent_hash"]
    [folder] = (pdctl.folder / "data/pdctl/runs").glob("*-turns")
    for point in points:
        figures = json.loads((folder / f"points/{point}/results/0.json").read_text())
        assert (figures["completed"], figures["failed"]) == (12, 0)
        assert sum(one["transfers"] for one in figures["pdctl"]["transfers"]) >= 12, "every prompt was handed over"
    status = pdctl.told("status")
    assert {part["name"] for part in status["parts"] if part["role"] != "router"} == engines, "no engine was touched"
