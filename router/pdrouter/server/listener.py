"""A listening port, and ending it without cutting anybody off."""

import asyncio
import errno
import logging
import os
import socket
import ssl
from collections.abc import Callable
from contextlib import suppress
from typing import Any, cast

from pdrouter.deadlines import Deadlines
from pdrouter.outbox import Outbox
from pdrouter.server.connection import ClientConnection
from pdrouter.server.limits import Limits
from pdrouter.server.request import ClientRequest

_log = logging.getLogger(__name__)
_SEND_BUFFER = 128 * 1024  # bytes; Linux doubles it
_KEPT = 1.0  # seconds that a client has for its next or first request before an ending router closes


class ListenError(Exception):
    """A port cannot be listened on; the message says what to do."""


class Listener:
    """Accepts connections on one address."""

    def __init__(
        self,
        handler: Callable[[ClientRequest], None],
        limits: Limits,
        refused: Callable[[int], None] = lambda status: None,
        unwelcome: Callable[[ClientRequest], tuple[int, str] | None] = lambda request: None,
    ) -> None:
        """Prepare; needs a running event loop.

        Args:
            handler: gets each complete request.
            limits: what a client may not exceed.
            refused: gets the status of each request that was refused before it was complete.
            unwelcome: says with which status and why a body over 64 KiB is not worth reading, or None.
        """
        loop = asyncio.get_running_loop()
        self.refused = refused
        self.unwelcome = unwelcome
        self.held = 0
        self._behind: dict[ClientConnection, int] = {}
        self._unsent = 0
        self.turned_away = 0
        self.limits = limits
        self.draining = False
        self.outbox = Outbox(loop)
        self.idle = Deadlines(loop, limits.idle_seconds)
        self.head = Deadlines(loop, limits.head_seconds)
        self.body = Deadlines(loop, limits.body_seconds)
        self.write = Deadlines(loop, limits.write_seconds)
        self._handler = handler
        self._loop = loop
        self._tls: ssl.SSLContext | None = None
        self._connections: dict[ClientConnection, None] = {}
        self._of_client: dict[str, int] = {}
        self._crowd: set[ClientConnection] = set()
        self._server: Any = None  # asyncio's or uvloop's server: their sockets are of different types
        self._empty = asyncio.Event()

    async def listen(
        self, host: str, port: int, flag: str, *, shared: bool = False, tls: ssl.SSLContext | None = None
    ) -> None:
        """Start accepting.

        Args:
            host: address of this machine.
            port: its port.
            flag: what chooses the port, for the message.
            shared: whether other processes of this router listen on the same port (SO_REUSEPORT).
            tls: certificate and key, or None to speak plain HTTP.

        Raises:
            ListenError: the address is taken or not of this machine; `flag` is what chooses the port.
        """
        self._tls = tls
        try:
            self._server = await self._loop.create_server(
                self._made,
                host,
                port,
                backlog=4096,
                reuse_port=shared or None,
                ssl=tls,
                # Until TLS is agreed upon there is no connection that could be counted or watched.
                ssl_handshake_timeout=self.limits.head_seconds if tls is not None else None,
            )
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                why = f"the port is in use; stop the program that has it or choose another with {flag}"
            else:
                why = error.strerror or str(error)
            raise ListenError(f"cannot listen on {host}:{port}: {why}") from None
        for one in self._server.sockets:
            # Connections inherit it. The kernel would take up to 4 MB for each client that reads too slowly.
            one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)

    def _made(self) -> asyncio.Protocol:
        return cast(asyncio.Protocol, ClientConnection(self, self._handler))

    @property
    def port(self) -> int:
        """The port that is listened on; it differs from the one asked for when that was 0."""
        if self._server is None or not self._server.sockets:
            return 0
        return int(self._server.sockets[0].getsockname()[1])

    def joined(self, connection: ClientConnection, client: str) -> bool:
        """A connection is open; tell whether it may stay."""
        self._connections[connection] = None
        of_client = self._of_client.get(client, 0) + 1
        self._of_client[client] = of_client
        limits = self.limits
        if (
            len(self._connections) - self.turned_away <= limits.connections
            and of_client <= limits.connections_per_client
        ):
            return True
        self._crowd.add(connection)
        self.turned_away = len(self._crowd)
        return False

    def left(self, connection: ClientConnection, client: str) -> None:
        """A connection is closed."""
        self._connections.pop(connection, None)
        if self._crowd:
            self._crowd.discard(connection)
            self.turned_away = len(self._crowd)
        of_client = self._of_client.pop(client, 0) - 1
        if of_client > 0:
            self._of_client[client] = of_client
        if not self._connections:
            self._empty.set()

    def fell_behind(self, connection: ClientConnection, waiting: int) -> None:
        """A client does not keep up; while too much waits for such clients, the one that most waits for is cut."""
        self._behind[connection] = waiting
        self._unsent += waiting
        behind = self._behind
        while self._unsent > self.limits.unsent:
            worst = max(behind, key=behind.__getitem__)
            most = behind[worst]
            self.caught_up(worst)
            _log.warning("client=%s cut with %d bytes of its answer: clients take too little", worst.client, most)
            worst.abort()

    def caught_up(self, connection: ClientConnection) -> None:
        """A client keeps up again, or is gone; nothing happens when it kept up."""
        self._unsent -= self._behind.pop(connection, 0)

    async def drain(self, seconds: float) -> int:
        """Accept no more, let requests finish for some time; give how many connections had to be cut."""
        self.draining = True
        if self._server is not None:
            await self._stop_listening(seconds)
        # Who has just connected, or has just had an answer, is about to send a request, and so is who was promised by
        # the beginning of an answer that the connection stays. The next answer tells that it is the last one.
        self.idle.shorten(_KEPT)
        if self._connections:
            self._empty.clear()
            try:
                async with asyncio.timeout(seconds):
                    await self._empty.wait()
            except TimeoutError:
                pass
        left = len(self._connections)
        for connection in list(self._connections):
            connection.abort()
        for deadlines in (self.idle, self.head, self.body, self.write):
            deadlines.close()
        return left

    async def _stop_listening(self, seconds: float) -> None:
        """Close the listening sockets, and serve who is connected without having been accepted yet.

        The kernel resets these connections when the last descriptor of a socket is closed.
        """
        queues = [socket.socket(fileno=os.dup(one.fileno())) for one in self._server.sockets]
        self._server.close()
        accepted: list[socket.socket] = []
        for queue in queues:
            with queue:
                queue.setblocking(False)
                with suppress(OSError):  # BlockingIOError: there is nobody left
                    while True:
                        accepted.append(queue.accept()[0])
        limit = self.limits.head_seconds if self._tls is not None else None
        connecting = [
            self._loop.create_task(
                self._loop.connect_accepted_socket(self._made, one, ssl=self._tls, ssl_handshake_timeout=limit)
            )
            for one in accepted
        ]
        if connecting:
            await asyncio.wait(connecting, timeout=seconds)
            for task in connecting:
                task.cancel()
                with suppress(asyncio.CancelledError, OSError):  # it is gone, or TLS was not agreed upon
                    await task
