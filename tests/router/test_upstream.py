"""What happens on a connection to an engine when the router itself is wrong, or has no open file left for one."""

import logging
import resource
from typing import Any

import pytest

from pdrouter import app
from pdrouter.fleet.engine import Role
from pdrouter.fleet.health import Probe
from pdrouter.handoff.relay import Relay
from pdrouter.upstream.connection import EngineConnection
from pdrouter.upstream.errors import ExhaustedError, UpstreamError
from router.fakes import Out, Seen, routed, run, until
from router.generation import answer
from router.test_failover import fleet, generate, hang, once, reset

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


@pytest.mark.parametrize("kind", ["prefill", "decode", "stream", "alone", "silent"])
def test_a_bug_in_what_the_router_does_about_a_failure_ends_the_request_instead_of_hanging_it(kind: str) -> None:
    async def main() -> None:
        async with fleet(1, 2, stall_timeout_secs=0.3) as bed:

            async def begin_and_reset(seen: Seen, out: Out) -> None:
                await out.events()
                await out.chunk(b"".join(answer(seen.target, seen.body, "r1")[:4]))
                await reset(seen, out)

            behave = {"stream": begin_and_reset, "silent": hang}.get(kind, reset)
            for one in [bed.prefill] if kind == "prefill" else bed.decodes:
                one.behave, one.generated = behave, 7
            bed.router.fleet.failed = None  # type: ignore[assignment,method-assign]
            told = await bed.complete(
                stream=kind == "stream", **({"echo": True, "logprobs": 1} if kind == "alone" else {})
            )
            error = told.events[-1]["error"] if kind == "stream" else told.error
            assert (told.complete, error["code"], error["type"]) == (kind != "stream", 500, "InternalServerError")
            await until(lambda: not bed.router.pool.engines(), "nothing is under way")
            assert bed.router.desk.admission.running == 0

    run(main)


def test_a_bug_in_telling_a_failure_of_a_request_without_a_handoff_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with fleet(1, 1) as bed:
            bed.decode.behave = reset
            monkeypatch.setattr(Relay, "failed", once_broken(Relay.failed))
            told = await bed.complete(echo=True, logprobs=1)
            assert (told.status, told.error["type"]) == (500, "InternalServerError")

    run(main)


@pytest.mark.parametrize("fields", [{}, {"echo": True, "logprobs": 1}])
def test_a_bug_in_beginning_a_request_anew_ends_it_instead_of_hanging_it(fields: dict[str, Any]) -> None:
    async def main() -> None:
        async with fleet(2, 2) as bed:

            def broken(role: Role) -> Any:
                raise RuntimeError("a bug")

            async def fail_and_break(seen: Seen, out: Out) -> None:
                bed.router.fleet.healthy = broken  # type: ignore[method-assign]
                await reset(seen, out)

            for one in (*bed.prefills, *bed.decodes):
                one.behave = fail_and_break
            told = await bed.complete(**fields)
            assert (told.status, told.error["type"]) == (500, "InternalServerError")
            await until(lambda: not bed.router.pool.engines(), "nothing is under way")
            assert bed.router.desk.admission.running == 0

    run(main)


def once_broken(function: Any) -> Any:
    """Fail the first call, as a bug would."""
    broken = [True]

    def call(*told: Any) -> Any:
        if broken:
            broken.pop()
            raise RuntimeError("a bug")
        return function(*told)

    return call


def test_a_bug_met_while_one_engine_is_given_up_ends_the_watch_over_none() -> None:
    async def main() -> None:
        async with fleet(1, 2, stall_timeout_secs=0.3) as bed:
            bed.decodes[0].behave = bed.decodes[1].behave = once(hang, generate())
            stalled = bed.router.fleet.stalled
            bed.router.fleet.stalled = once_broken(stalled)  # type: ignore[method-assign]
            assert (await bed.complete(stream=True)).complete

    run(main)


def test_a_bug_met_while_an_engine_is_marked_as_down_does_not_end_its_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "_HEALTH_TIMEOUT", 0.2)

    async def main() -> None:
        async with fleet(1, 1, health_interval_secs=0.05) as bed:
            engine = bed.router.fleet.engines[Role.DECODE][0]
            mark = bed.router.fleet.mark
            bed.router.fleet.mark = once_broken(mark)  # type: ignore[method-assign]
            bed.decode.silent = True
            bed.decode.hang_up()
            await until(lambda: not engine.healthy, "it is down")
            bed.decode.silent = False
            await until(lambda: engine.healthy, "it is up again")

    run(main)


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
