"""The lock of a namespace: renewals whose answers are lost, locks that are lost, an API that is away at the end."""

import asyncio
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pdctl.cluster import lock
from pdctl.cluster.api import Cluster
from support.api import Api, Request
from support.processes import until


class Leases:
    """The API of one Lease, as far as a lock needs it."""

    def __init__(self) -> None:
        self.lease: dict[str, Any] | None = None
        self.version = self.renewals = self.conflicts = 0
        self.lose_answer = False
        self.said: list[str] = []
        self.away, self.over = threading.Event(), threading.Event()

    def put(self, lease: dict[str, Any]) -> None:
        self.version += 1
        lease["metadata"]["resourceVersion"] = str(self.version)
        self.lease = lease

    def answer(self, one: Request) -> None:
        if self.away.is_set():
            self.over.wait(60)
            one.close_connection = True
        elif "selfsubjectaccessreviews" in one.path:
            one.tell(201, status={"allowed": True})
        elif one.command == "POST":
            self.put(one.body)
            one.tell(201, **one.body)
        elif self.lease is None:
            one.refuse(404, "NotFound", "there is none")
        elif one.command == "GET":
            one.tell(200, **self.lease)
        elif one.command == "DELETE":
            wished = (one.body.get("preconditions") or {}).get("resourceVersion")
            if wished not in (None, str(self.version)):
                one.refuse(409, "Conflict", "it is another one")
            else:
                self.lease = None
                one.tell(200)
        elif one.body["metadata"]["resourceVersion"] != str(self.version):
            self.conflicts += 1
            one.refuse(409, "Conflict", "it is another one")
        else:
            self.put(one.body)
            self.renewals += 1
            if self.lose_answer:
                self.lose_answer, one.close_connection = False, True
            else:
                one.tell(200, **one.body)


@pytest.fixture
def leases(monkeypatch: pytest.MonkeyPatch) -> Leases:
    monkeypatch.setattr(lock, "RENEW", 0.05)
    return Leases()


def held(leases: Leases, folder: Path, monkeypatch: pytest.MonkeyPatch, *steps: Callable[[], object]) -> None:
    """Hold the lock while steps are done: each until it gives something."""

    async def main() -> None:
        cluster = await Cluster.connect()
        cluster.patience = 120.0
        async with lock.locked(cluster, "space", "deploy", leases.said.append):
            for step in steps:
                await asyncio.to_thread(until, step)
        await cluster.close()

    with Api(leases.answer) as api:
        monkeypatch.setenv("KUBECONFIG", str(api.kubeconfig(folder)))
        try:
            asyncio.run(main())
        finally:
            leases.over.set()


def test_a_renewal_whose_answer_is_lost_is_followed_by_others(
    leases: Leases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leases.lose_answer = True
    held(leases, tmp_path, monkeypatch, lambda: leases.conflicts, lambda: leases.renewals >= 3)
    assert leases.said == []
    assert leases.lease is None, "it is given back"


def test_a_lock_that_another_one_has_taken_is_said_and_left_to_it(
    leases: Leases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def take() -> bool:
        leases.put({"metadata": {"name": "pdctl"}, "spec": {"holderIdentity": "another"}})
        return True

    held(leases, tmp_path, monkeypatch, take, lambda: leases.said)
    assert leases.lease is not None
    assert leases.lease["spec"]["holderIdentity"] == "another"
    assert leases.said == ["the lock of space is lost: another pdctl may change the same at once"]


@pytest.mark.timeout(60)
def test_giving_the_lock_back_does_not_wait_for_an_api_that_is_away(
    leases: Leases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "GIVE_BACK_SECONDS", 0.2, raising=False)

    def go() -> bool:
        leases.away.set()
        return True

    began = time.monotonic()
    held(leases, tmp_path, monkeypatch, go)
    assert time.monotonic() - began < 20
