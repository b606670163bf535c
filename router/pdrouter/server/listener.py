"""A listening port, and ending it without cutting anybody off."""

import asyncio
import errno
from collections.abc import Callable

from pdrouter.server.connection import ClientConnection, ClientRequest
from pdrouter.server.limits import Limits


class ListenError(Exception):
    """A port cannot be listened on; the message says what to do."""


class Listener:
    """Accepts connections on one address."""

    def __init__(
        self,
        handler: Callable[[ClientRequest], None],
        limits: Limits,
        refused: Callable[[int], None] = lambda status: None,
    ) -> None:
        """Prepare.

        Args:
            handler: gets each complete request.
            limits: what a request may not exceed.
            refused: gets the status of each request that was refused before it was complete.
        """
        self.refused = refused
        self.limits = limits
        self.draining = False
        self._handler = handler
        self._connections: set[ClientConnection] = set()
        self._server: asyncio.Server | None = None
        self._empty = asyncio.Event()

    async def listen(self, host: str, port: int, flag: str) -> None:
        """Start accepting.

        Raises:
            ListenError: the address is taken or not of this machine; `flag` is what chooses the port.
        """
        loop = asyncio.get_running_loop()
        try:
            self._server = await loop.create_server(
                lambda: ClientConnection(self, self._handler), host, port, backlog=4096
            )
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                why = f"the port is in use; stop the program that has it or choose another with {flag}"
            else:
                why = error.strerror or str(error)
            raise ListenError(f"cannot listen on {host}:{port}: {why}") from None

    @property
    def port(self) -> int:
        """The port that is listened on; it differs from the one asked for when that was 0."""
        if self._server is None or not self._server.sockets:
            return 0
        return int(self._server.sockets[0].getsockname()[1])

    def joined(self, connection: ClientConnection) -> None:
        """A connection is open."""
        self._connections.add(connection)

    def left(self, connection: ClientConnection) -> None:
        """A connection is closed."""
        self._connections.discard(connection)
        if not self._connections:
            self._empty.set()

    async def drain(self, seconds: float) -> int:
        """Accept no more, let requests finish for some time; give how many connections had to be cut."""
        self.draining = True
        if self._server is not None:
            self._server.close()
        for connection in list(self._connections):
            connection.close_if_idle()
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
        return left
