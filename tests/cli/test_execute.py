"""Commands in pods: what the API refuses, and connections that break, are told as such; what runs there goes on."""

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import pytest

from pdctl.bench import in_pod
from pdctl.cluster.api import ApiError, Cluster, Unreachable
from pdctl.cluster.detached import Detached
from pdctl.cluster.execute import execute
from pdctl.commands import bench
from pdctl.errors import PdctlError
from pdctl.evals import in_cluster
from pdctl.runs import Run
from support import stored
from support.api import Api, Request


def said(
    answer: Callable[[Request], None], folder: Path, monkeypatch: pytest.MonkeyPatch, token: Path | None = None
) -> str:
    """Give what a command in a pod prints."""

    async def run(cluster: Cluster) -> str:
        try:
            return await execute(cluster, "space", "pod-1", "vllm", ["true"])
        finally:
            await cluster.close()

    async def main() -> str:
        return await run(await Cluster.connect())

    with Api(answer) as api:
        monkeypatch.setenv("KUBECONFIG", str(api.kubeconfig(folder, token)))
        return asyncio.run(main())


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_refusal_is_told_in_the_words_of_the_api(
    status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ApiError, match="cannot run a command in pod-1: the word of the day") as refusal:
        said(lambda one: one.refuse(status, "Why", "the word of the day"), tmp_path, monkeypatch)
    assert (refusal.value.status, refusal.value.reason) == (status, "Why")


@pytest.mark.parametrize("status", [429, 500, 503])
def test_an_api_or_node_that_is_away_is_no_refusal(
    status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Unreachable, match=f"dialing the kubelet failed .{status}."):
        said(lambda one: one.refuse(status, "", "dialing the kubelet failed"), tmp_path, monkeypatch)


def test_a_connection_that_breaks_is_told_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(one: Request) -> None:
        one.upgrade()
        one.send(1, b"half of")

    with pytest.raises(Unreachable, match="the connection broke"):
        said(broken, tmp_path, monkeypatch)


def test_a_token_that_has_expired_is_renewed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    token = tmp_path / "token"
    token.write_text("first")

    def answer(one: Request) -> None:
        if one.token == "first":
            token.write_text("second")
            one.refuse(401, "Unauthorized", "expired")
            return
        one.upgrade()
        one.send(1, one.token.encode())
        one.send(3, b'{"status": "Success"}')

    assert said(answer, tmp_path, monkeypatch, token) == "second"


class Away:
    """A deployment whose API says what is wished when a command is to run in a pod."""

    name, context = "space", "here"

    def __init__(self, error: BaseException | None = None) -> None:
        self.error, self.deleted = error, list[str]()

    def execute(self, pod: str, container: str, asked: Sequence[str]) -> str:
        if self.error is not None:
            raise self.error
        return '{"statuses": [3], "over": true, "alive": false, "log": {"data": "", "next": 0, "size": 0}}'

    def delete(self, plural: str, name: str) -> None:
        self.deleted.append(plural)

    def object(self, plural: str, name: str) -> Any:
        return {}


def begun(folder: Path) -> Run:
    run = Run(folder / "run")
    run.begin(stored.about(stored.SMALL, pod="pod-1"))
    return run


def refusal(status: int) -> ApiError:
    return ApiError(status, "", "so it is", "cannot run a command in pod-1")


@pytest.mark.parametrize(
    ("target", "error", "state"),
    [
        (Away(refusal(401)), "so it is", "running"),
        (Away(refusal(403)), "no command may be run in pod-1", "running"),
        (Away(RuntimeError("a fault")), "a fault", "running"),
        (Away(refusal(404)), "the pod is gone", "failed"),
        (Away(), "ended with status 3", "failed"),
    ],
)
def test_a_bench_in_a_pod_has_failed_only_when_it_has_ended(
    target: Away, error: str, state: str, tmp_path: Path
) -> None:
    run = begun(tmp_path)
    with pytest.raises((PdctlError, RuntimeError)) as raised:
        bench._follow(run, cast(Any, target))
    assert error in getattr(raised.value, "cause", str(raised.value))
    assert run.about["state"] == state, "written as running it is detached once this process has ended"
    if state == "running" and isinstance(raised.value, PdctlError):
        assert "pdctl bench --attach" in raised.value.next_step


def test_a_bench_that_is_interrupted_while_it_is_started_may_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(run: Run, *_: object) -> None:
        run.note(pod="pod-1")
        raise KeyboardInterrupt

    run = Run(tmp_path / "run")
    run.begin(stored.about(stored.SMALL))
    monkeypatch.setattr(in_pod, "start", start)
    with pytest.raises(PdctlError, match="goes on in pod-1"):
        bench._within(run, cast(Any, Away()), None)
    assert run.about["state"] == "running"


@pytest.mark.parametrize(("error", "deleted"), [(refusal(401), []), (None, ["jobs", "configmaps"])])
def test_the_job_of_an_evaluation_is_removed_only_when_it_has_failed_itself(
    error: ApiError | None, deleted: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = Away(error)
    monkeypatch.setattr(in_cluster, "_running", lambda *_: "pod-1")
    monkeypatch.setattr(Detached, "append", lambda *_: None)
    with pytest.raises(PdctlError, match="so it is" if error else "ended with status 3"):
        in_cluster.follow(begun(tmp_path), cast(Any, target), lambda told: None, lambda text: None)
    assert target.deleted == deleted


def test_what_ran_in_a_pod_that_is_gone_is_taken_away_with_it(tmp_path: Path) -> None:
    target = Away(refusal(404))
    in_pod.take(begun(tmp_path), cast(Any, target), lambda text: None)
    assert target.deleted == ["networkpolicies"]
