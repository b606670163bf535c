"""Ports of pods, here: each connection goes by a websocket of its own to a pod that is ready at that moment.

So a forward outlives the pods behind it: after a restart or a rollout the next connection finds another one.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable

import httpx
import httpx_ws

from pdctl.cluster import paths
from pdctl.cluster.api import ApiError, Cluster, Unreachable
from pdctl.errors import PdctlError

PROTOCOL = "v4.channel.k8s.io"
CHUNK = 256 * 1024
ATTEMPTS = 6  # over 3 seconds, for a client that connects while a pod is being replaced

Choose = Callable[[], Awaitable[str | None]]


class Forward:
    """A local port that leads to a port of one of several pods.

    Args:
        cluster: where the pods are.
        namespace: of the pods.
        port: on the pods.
        choose: gives the name of a ready pod, None when there is none.
        tell: called with a sentence when something is amiss.
        address: where to listen.
    """

    def __init__(
        self, cluster: Cluster, namespace: str, port: int, choose: Choose,
        tell: Callable[[str], None] = lambda text: None, address: str = "127.0.0.1",
    ) -> None:  # fmt: skip
        self._cluster = cluster
        self._namespace = namespace
        self._port = port
        self._choose = choose
        self._tell = tell
        self._address = address
        self._pod = ""
        self._tasks: set[asyncio.Task[None]] = set()

    @contextlib.asynccontextmanager
    async def listening(self, local: int = 0) -> AsyncIterator[int]:
        """Listen; gives the local port.

        Raises:
            PdctlError: the port is taken.
        """
        try:
            server = await asyncio.start_server(self._connected, self._address, local)
        except OSError as error:
            raise PdctlError(
                f"port {local} of {self._address} cannot be used: {error.strerror}", "choose another one with --port"
            ) from None
        try:
            yield server.sockets[0].getsockname()[1]
        finally:
            server.close()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            await self._serve(reader, writer)
        except asyncio.CancelledError:
            pass  # the forward ends
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        why = ""
        for attempt in range(ATTEMPTS):
            if attempt:
                await asyncio.sleep(0.2 * attempt)
            try:
                pod = await self._choose()
                if pod is None:
                    why = "no pod is ready"
                    continue
                path = f"{paths.namespaced('pods', self._namespace, pod)}/portforward"
                what = f"cannot reach {pod}"
                async with self._cluster.websocket(path, PROTOCOL, what, ports=str(self._port)) as socket:
                    if pod != self._pod:
                        if self._pod:
                            self._tell(f"connected to {pod} now")
                        self._pod = pod
                    await _join(socket, reader, writer)
                return
            except (ApiError, Unreachable) as error:
                why = str(error) or type(error).__name__
        self._tell(f"no connection to port {self._port}: {why}")


async def _join(
    socket: httpx_ws.AsyncWebSocketSession, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    """Copy both ways until either side ends. Channel 0 has data, 1 errors; each begins with the port's number."""

    async def up() -> None:
        while data := await reader.read(CHUNK):
            await socket.send_bytes(b"\x00" + data)

    async def down() -> None:
        begun = set()
        while True:
            message = await socket.receive_bytes()
            channel, data = message[0], message[1:]
            if channel not in begun:
                begun.add(channel)
                data = data[2:]
            if channel == 0 and data:
                writer.write(data)
                await writer.drain()
            elif channel == 1 and data:
                return

    ways = [asyncio.ensure_future(up()), asyncio.ensure_future(down())]
    try:
        await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for way in ways:
            way.cancel()
        with contextlib.suppress(httpx_ws.HTTPXWSException, httpx.HTTPError, ConnectionError):
            for result in await asyncio.gather(*ways, return_exceptions=True):
                if isinstance(result, Exception) and not isinstance(
                    result, (httpx_ws.HTTPXWSException, httpx.HTTPError, ConnectionError)
                ):
                    raise result
