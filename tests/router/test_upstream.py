"""What happens on a connection to an engine when the router itself is wrong, or has no open file left for one."""

import logging
import resource
from typing import Any

import pytest

from pdrouter.fleet.health import Probe
from pdrouter.upstream.connection import EngineConnection
from pdrouter.upstream.errors import ExhaustedError, UpstreamError
from router.fakes import routed, run, until

ANSWER = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}"


class Broken:
    """Takes an answer and fails on one part of it."""

    def __init__(self, part: str) -> None:
        self.part = part
        self.failures: list[UpstreamError] = []

    def _take(self, part: str) -> None:
        if part == self.part:
            raise RuntimeError("a bug")

    def head(self, status: int, headers: Any) -> None:
        self._take("head")

    def body(self, data: bytes) -> None:
        self._take("body")

    def end(self) -> None:
        self._take("end")

    def failed(self, error: UpstreamError) -> None:
        self.failures.append(error)


class Call:
    """A call as a connection sees it."""

    began = False
    counted = True

    def __init__(self, receiver: Broken) -> None:
        self.receiver = receiver
        self.ended = 0

    def over(self) -> None:
        self.ended += 1


class Pool:
    """Takes connections back, and what is written."""

    def __init__(self) -> None:
        self.outbox = self

    def add(self, writer: EngineConnection) -> None:
        writer.flush()

    def put(self, connection: EngineConnection) -> None: ...

    def drop(self, connection: EngineConnection) -> None: ...


class Transport:
    """Swallows what is written."""

    def write(self, data: bytes) -> None: ...

    def abort(self) -> None: ...

    def is_closing(self) -> bool:
        return False


@pytest.mark.parametrize("part", ["head", "body", "end"])
def test_a_bug_in_the_router_fails_the_request_instead_of_hanging_it(
    part: str, caplog: pytest.LogCaptureFixture
) -> None:
    receiver = Broken(part)
    call: Any = Call(receiver)
    engine: Any = type("Engine", (), {"url": "http://e", "heard": 0, "worked": 0})()
    pool: Any = Pool()
    transport: Any = Transport()
    connection = EngineConnection(engine, pool)
    connection.connection_made(transport)
    connection.send(call, b"GET")
    logging.getLogger("pdrouter").propagate = True
    connection.data_received(ANSWER)
    assert [error.reason for error in receiver.failures] == ["router_failure"]
    assert call.ended >= 1
    assert "a request failed in the router itself" in caplog.text


def test_engines_that_cannot_be_checked_for_want_of_open_files_are_not_taken_for_dead(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    failures: list[UpstreamError] = []
    failed = Probe.failed

    def noted(probe: Probe, error: UpstreamError) -> None:
        failures.append(error)
        failed(probe, error)

    monkeypatch.setattr(Probe, "failed", noted)

    async def main() -> None:
        async with routed(1, 1, health_interval_secs=0.05) as bed:
            files = resource.getrlimit(resource.RLIMIT_NOFILE)
            resource.setrlimit(resource.RLIMIT_NOFILE, (3, files[1]))  # what is open stays so
            try:
                bed.prefill.hang_up()
                bed.decode.hang_up()
                await until(lambda: sum(isinstance(one, ExhaustedError) for one in failures) > 8, "checks fail")
                assert all(engine.healthy for engine in bed.router.fleet)
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, files)
            assert (await bed.complete()).status == 200

    run(main)
