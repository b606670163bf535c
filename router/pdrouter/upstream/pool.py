"""Calls to engines over kept connections."""

import asyncio
import errno
from collections.abc import Iterator
from time import time_ns
from typing import Protocol, cast

from pdrouter.fleet.engine import Engine
from pdrouter.fleet.rows import Rows
from pdrouter.outbox import Outbox
from pdrouter.upstream.arrivals import Arrivals
from pdrouter.upstream.connection import EngineConnection, Receiver, tell_failure
from pdrouter.upstream.errors import ConnectError, ExhaustedError, TooLateError, UpstreamError, VanishedError


class Perishable(Protocol):
    """What a request carries that loses its sense at a loop time, which may come nearer."""

    expires: float


class Call:
    """One request to one engine.

    It counts as in flight from `Pool.call` until its answer ended, failed or was aborted, exactly once.
    """

    __slots__ = (
        "_connecting", "_connection", "_pool", "_queued", "_request", "_resent", "_reused",
        "aborted", "began", "counted", "engine", "held", "paused", "perishable", "receiver", "whole",
    )  # fmt: skip

    def __init__(
        self, pool: "Pool", engine: Engine, request: bytes, receiver: Receiver, perishable: Perishable | None,
        counted: bool, held: int, queued: int, whole: bool,
    ) -> None:  # fmt: skip
        self.engine = engine
        self.receiver = receiver
        self.perishable = perishable
        self.aborted = False
        self.began = False
        self.paused = False
        self.whole = whole
        self._pool = pool
        self._request = request
        self._connecting: asyncio.Task[None] | None = None
        self.counted = counted
        self._resent = False
        self.held = held
        self._queued = queued
        if counted:
            engine.own_in_flight += 1
            engine.own_held += held
            engine.own_queued += queued
            pool.opened(self)
            if pool.rows is not None:
                pool.rows.changed(engine)
        connection = self._connection = pool.take(engine)
        if connection is None:
            self._reused = False
            self._connect()
        else:
            self._reused = True
            connection.send(self, request)

    def _connect(self) -> None:
        self._connecting = self._pool.loop.create_task(self._pool.connect(self))

    def connected(self, connection: EngineConnection) -> None:
        """Send over a fresh connection, unless it came too late."""
        self._connecting = None
        if self.perishable is not None and self._pool.loop.time() > self.perishable.expires:
            self._pool.put(connection)
            self.lost(TooLateError(f"no connection to {self.engine.url} in time"))
            return
        self._send(connection)

    def _send(self, connection: EngineConnection) -> None:
        self._connection = connection
        connection.send(self, self._request)
        if self.paused:
            connection.pause()

    def lost(self, error: UpstreamError) -> None:
        """The connection failed: try once more if only a kept connection had gone stale, else fail.

        What perishes is not sent twice: the engine may have used it before the connection broke. And what was sent once
        may be what the engine died of: it is not one that has not seen the request, though it refuses the second time.
        """
        self._connection = None
        self._connecting = None
        if self._reused and not self.began and self.perishable is None:
            # A server may close an idle connection in the same moment in which a request is sent over it.
            self._reused = False
            self._resent = True
            self._connect()
            return
        if self._resent and isinstance(error, ConnectError):
            error = VanishedError(f"{self.engine.url} closed the connection before it answered, and takes no new one")
        self.over()
        tell_failure(self.receiver, error)

    def fail(self, error: UpstreamError) -> None:
        """Break it off and let the receiver know."""
        self.abort()
        tell_failure(self.receiver, error)

    def over(self) -> None:
        """Count it as no longer in flight."""
        if self.counted:
            self.counted = False
            engine = self.engine
            engine.own_in_flight -= 1
            engine.own_held -= self.held
            engine.own_queued -= self._queued
            self._pool.closed(self)
            if self._pool.rows is not None:
                self._pool.rows.changed(engine)
        self._connection = None

    def computed(self) -> None:
        """The answer began, so the prompt is computed."""
        self.began = True
        if self._queued:
            self.engine.own_queued -= self._queued
            self._queued = 0
            if self._pool.rows is not None:
                self._pool.rows.changed(self.engine)

    def abort(self) -> None:
        """Break it off: the receiver hears nothing more, and the engine sees its client go."""
        connection, connecting = self._connection, self._connecting
        self.aborted = True
        self.over()
        if connection is not None:
            connection.abort()
        if connecting is not None:
            self._connecting = None
            connecting.cancel()

    def pause(self) -> None:
        """Take no more of the answer until `resume`."""
        self.paused = True
        if self._connection is not None:
            self._connection.pause()

    def resume(self) -> None:
        """Take the answer again."""
        self.paused = False
        if self._connection is not None:
            self._connection.resume()


class Pool:
    """Connections to all engines.

    `idle_timeout` (seconds) must be below the engines' own keep-alive (vLLM: `VLLM_HTTP_TIMEOUT_KEEP_ALIVE`, 5 s), so
    that requests seldom meet a connection that is just being closed.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, connect_timeout: float = 3.0, idle_timeout: float = 4.0,
        rows: Rows | None = None,
    ) -> None:  # fmt: skip
        self.loop = loop
        self.outbox = Outbox(loop)
        self.arrivals = Arrivals(loop)
        self.rows = rows
        self._connect_timeout = connect_timeout
        self._idle_timeout = idle_timeout
        self._idle: dict[Engine, list[EngineConnection]] = {}
        self._open: dict[Engine, dict[Call, None]] = {}
        self._sweep = loop.call_later(1.0, self._close_idle)
        self._closed = False

    def call(
        self,
        engine: Engine,
        request: bytes,
        receiver: Receiver,
        *,
        perishable: Perishable | None = None,
        counted: bool = True,
        held: int = 0,
        queued: int = 0,
        whole: bool = False,
    ) -> Call:
        """Send a request to an engine.

        Args:
            engine: whom to ask.
            request: all of it, head and body.
            receiver: gets the answer, never before this returns.
            perishable: what the request carries; it is not sent when that has lost its sense (`TooLateError`).
            counted: whether it counts in the engine's load row at all.
            held: tokens that the engine holds for it until it is over.
            queued: tokens that the engine has to compute before its answer begins.
            whole: whether nothing of the answer is to be expected before all of it.
        """
        return Call(self, engine, request, receiver, perishable, counted, held, queued, whole)

    def open(self, engine: Engine) -> dict[Call, None]:
        """Give the counted calls to an engine that are not over."""
        return self._open.get(engine) or {}

    def engines(self) -> list[Engine]:
        """Give the engines with counted calls that are not over, also those that have left the fleet."""
        return list(self._open)

    def opened(self, call: Call) -> None:
        """Take up a counted call."""
        calls = self._open.get(call.engine)
        if calls is None:
            calls = self._open[call.engine] = {}
        calls[call] = None

    def closed(self, call: Call) -> None:
        """Forget a counted call that is over."""
        calls = self._open[call.engine]
        del calls[call]
        if not calls:
            del self._open[call.engine]

    def perishing(self) -> Iterator[Call]:
        """Give the counted calls that are not over and carry what perishes."""
        return (call for calls in self._open.values() for call in calls if call.perishable is not None)

    def give_up(self, engine: Engine, error: UpstreamError) -> int:
        """Fail all calls to an engine that does not answer any more; give how many there were."""
        calls = list(self._open.get(engine, ()))
        for call in calls:
            if call in self.open(engine):
                call.fail(error)
        return len(calls)

    def suspect(self, engine: Engine) -> None:
        """Have what an engine has cached until now used no more: it may be KV of other prompts than it says."""
        engine.suspected = time_ns() // 1000
        if self.rows is not None:
            self.rows.changed(engine)

    def take(self, engine: Engine) -> EngineConnection | None:
        """Give an idle connection that is fresh enough, the most recently used first."""
        idle = self._idle.get(engine)
        if not idle:
            return None
        oldest = self.loop.time() - self._idle_timeout
        while idle:
            connection = idle.pop()
            if connection.idle_since > oldest and not connection.closing():
                return connection
            connection.abort()
        return None

    def put(self, connection: EngineConnection) -> None:
        """Keep a connection for the next call."""
        if self._closed or connection.closing():
            connection.abort()
            return
        if connection.paused:
            connection.resume()
        connection.idle_since = self.loop.time()
        idle = self._idle.get(connection.engine)
        if idle is None:
            idle = self._idle[connection.engine] = []
        idle.append(connection)

    def drop(self, connection: EngineConnection) -> None:
        """Forget a connection that is closed."""
        idle = self._idle.get(connection.engine)
        if idle and connection in idle:
            idle.remove(connection)

    async def connect(self, call: Call) -> None:
        """Open a connection for a call."""
        engine = call.engine
        connection = EngineConnection(engine, self)
        try:
            async with asyncio.timeout(self._connect_timeout):
                await self.loop.create_connection(lambda: cast(asyncio.Protocol, connection), engine.host, engine.port)
        except TimeoutError:
            call.lost(ConnectError(f"no connection to {engine.url} within {self._connect_timeout:g} s"))
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                call.lost(ExhaustedError(f"no open file left to connect to {engine.url}; raise the limit (ulimit -n)"))
                return
            call.lost(ConnectError(f"cannot connect to {engine.url}: {error.strerror or error}"))
        else:
            call.connected(connection)

    def left(self, engine: Engine) -> None:
        """Close idle connections to an engine that is gone."""
        for connection in self._idle.pop(engine, ()):
            connection.abort()

    def _close_idle(self) -> None:
        oldest = self.loop.time() - self._idle_timeout
        for engine, idle in list(self._idle.items()):
            stale = [connection for connection in idle if connection.idle_since <= oldest]
            for connection in stale:
                idle.remove(connection)
                connection.abort()
            if not idle:
                del self._idle[engine]  # it may have left
        self._sweep = self.loop.call_later(1.0, self._close_idle)

    def close(self) -> None:
        """Close all idle connections and keep none from now on."""
        self._closed = True
        self.arrivals.close()
        self._sweep.cancel()
        for idle in self._idle.values():
            for connection in idle:
                connection.abort()
            idle.clear()
