"""Logs that are followed go on when a stream of them ends before its container does."""

import asyncio
import socket
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

import pdctl.targets  # it imports logs, which would be imported in a circle otherwise
from pdctl.cluster import logs
from pdctl.cluster.api import Cluster
from support.api import Api, Request

DAY = "2026-01-01T00:00:0"
POD = {
    "metadata": {"name": "router-1", "uid": "1", "labels": {"app.kubernetes.io/component": "router"},
                 "creationTimestamp": f"{DAY}0Z"},
    "spec": {"containers": [{"name": "router", "image": "router:1"}]},
    "status": {"phase": "Running", "containerStatuses": [
        {"name": "router", "image": "router:1", "ready": True, "started": True, "restartCount": 0,
         "state": {"running": {"startedAt": f"{DAY}0Z"}}}]},
}  # fmt: skip


async def lines(count: int) -> list[str]:
    cluster = await Cluster.connect()
    stream = logs.stream(cluster, "space", pdctl.targets.LogQuery(None, 20, True, False, None))
    try:
        async with asyncio.timeout(20):
            return [(await anext(stream))[1] for _ in range(count)]
    finally:
        await stream.aclose()
        await cluster.close()


def test_a_stream_that_breaks_is_followed_on_without_a_line_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "LOOK_SECONDS", 0.05)
    token = tmp_path / "token"
    token.write_text("first")
    asked: list[dict[str, Any]] = []

    def answer(one: Request) -> None:
        if not one.path.partition("?")[0].endswith("/log"):
            one.tell(200, items=[POD], metadata={})
            return
        asked.append(parse_qs(urlsplit(one.path).query))
        if len(asked) == 1:
            one.stream(f"{DAY}1.1Z one", f"{DAY}1.12Z two", "unable to retrieve more")
        elif one.token == "first":
            token.write_text("second")
            one.refuse(401, "Unauthorized", "expired")
        else:
            one.stream(f"{DAY}1.1Z one", f"{DAY}1.12Z two", f"{DAY}2Z three")

    with Api(answer) as api:
        monkeypatch.setenv("KUBECONFIG", str(api.kubeconfig(tmp_path, token)))
        assert asyncio.run(lines(4)) == ["one", "two", "unable to retrieve more", "three"]
    assert asked[0]["tailLines"] == ["20"]
    assert [one["sinceTime"] for one in asked[1:3]] == [[f"{DAY}1.12Z"]] * 2


def test_connections_are_watched_by_the_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> int:
        cluster = await Cluster.connect()
        response = await cluster.client.get("/version")
        connection = response.extensions["network_stream"].get_extra_info("socket")
        told = connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        await cluster.close()
        return int(told)

    with Api(lambda one: one.tell(200)) as api:
        monkeypatch.setenv("KUBECONFIG", str(api.kubeconfig(tmp_path)))
        assert asyncio.run(main())
