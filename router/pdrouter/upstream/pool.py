"""Calls to engines over kept connections."""

import asyncio
import errno
from typing import cast

from pdrouter.fleet.engine import Engine
from pdrouter.fleet.rows import Rows
from pdrouter.outbox import Outbox
from pdrouter.upstream.connection import EngineConnection, Receiver
from pdrouter.upstream.errors import ConnectError, ExhaustedError, TooLateError, UpstreamError


class Call:
    """One request to one engine.

    It counts as in flight from `Pool.call` until its answer ended, failed or was aborted, exactly once.
    """

    __slots__ = (
        "_connecting", "_connection", "_counted", "_held", "_pool", "_queued", "_request", "_reused",
        "began", "engine", "not_after", "paused", "receiver",
    )  # fmt: skip

    def __init__(
        self, pool: "Pool", engine: Engine, request: bytes, receiver: Receiver, not_after: float | None, counted: bool,
        held: int, queued: int,
    ) -> None:  # fmt: skip
        self.engine = engine
        self.receiver = receiver
        self.not_after = not_after
        self.began = False
        self.paused = False
        self._pool = pool
        self._request = request
        self._connecting: asyncio.Task[None] | None = None
        self._counted = counted
        self._held = held
        self._queued = queued
        if counted:
            engine.own_in_flight += 1
            engine.own_held += held
            engine.own_queued += queued
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
        if self.not_after is not None and self._pool.loop.time() > self.not_after:
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
        """The connection failed: try once more if only a kept connection had gone stale, else fail."""
        self._connection = None
        self._connecting = None
        if self._reused and not self.began and not isinstance(error, TooLateError):
            # A server may close an idle connection in the same moment in which a request is sent over it.
            self._reused = False
            self._connect()
            return
        self.over()
        self.receiver.failed(error)

    def over(self) -> None:
        """Count it as no longer in flight."""
        if self._counted:
            self._counted = False
            engine = self.engine
            engine.own_in_flight -= 1
            engine.own_held -= self._held
            engine.own_queued -= self._queued
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
        self.rows = rows
        self._connect_timeout = connect_timeout
        self._idle_timeout = idle_timeout
        self._idle: dict[Engine, list[EngineConnection]] = {}
        self._sweep = loop.call_later(1.0, self._close_idle)
        self._closed = False

    def call(
        self,
        engine: Engine,
        request: bytes,
        receiver: Receiver,
        *,
        not_after: float | None = None,
        counted: bool = True,
        held: int = 0,
        queued: int = 0,
    ) -> Call:
        """Send a request to an engine.

        Args:
            engine: whom to ask.
            request: all of it, head and body.
            receiver: gets the answer, never before this returns.
            not_after: loop time after which the request must not be sent any more (`TooLateError`).
            counted: whether it counts in the engine's load row at all.
            held: tokens that the engine holds for it until it is over.
            queued: tokens that the engine has to compute before its answer begins.
        """
        return Call(self, engine, request, receiver, not_after, counted, held, queued)

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
        for idle in self._idle.values():
            stale = [connection for connection in idle if connection.idle_since <= oldest]
            for connection in stale:
                idle.remove(connection)
                connection.abort()
        self._sweep = self.loop.call_later(1.0, self._close_idle)

    def close(self) -> None:
        """Close all idle connections and keep none from now on."""
        self._closed = True
        self._sweep.cancel()
        for idle in self._idle.values():
            for connection in idle:
                connection.abort()
            idle.clear()
