"""The side channel: how a decode engine reads KV blocks out of a prefill engine and tells it that it has them.

The real one is NIXL (RDMA reads of raw block ids, notifications by request id). Like RDMA, `read` serves whatever the
named blocks hold now and checks nothing; what the simulation knows about the ticket travels beside it for the list of
violations. Frames are a 4-byte length and JSON.
"""

import asyncio
import base64
import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import orjson

from pdsim.engine.kv import Block, BlockPool
from pdsim.engine.leases import Leases


async def _receive(reader: asyncio.StreamReader) -> Any:
    length = int.from_bytes(await reader.readexactly(4), "big")
    return orjson.loads(await reader.readexactly(length))


def _send(writer: asyncio.StreamWriter, message: Any) -> None:
    frame = orjson.dumps(message)
    writer.write(len(frame).to_bytes(4, "big") + frame)


class UnknownBlockError(Exception):
    """A block id that the remote engine does not have: NIXL cannot even describe the read."""


class RemoteUnreachableError(Exception):
    """Nobody answers at the ticket's address, or somebody else does; `at_once` when that shows without waiting."""

    def __init__(self, message: str, at_once: bool = False) -> None:
        super().__init__(message)
        self.at_once = at_once


@dataclass(frozen=True, slots=True)
class RemoteBlocks:
    """What a read gave: contents in order, and what the remote knows about the ticket (None: it never issued it)."""

    contents: list[tuple[int, bytes]]
    lease: dict[str, Any] | None


class SideChannelServer:
    """Serves this engine's blocks to decode engines."""

    def __init__(
        self, engine_id: str, pool: BlockPool, leases: Leases, now: Callable[[], float], host: str, port: int
    ) -> None:
        self._engine_id = engine_id
        self._pool = pool
        self._leases = leases
        self._now = now
        self._host, self._port = host, port
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        """Listen.

        Raises:
            OSError: the address is taken or cannot be had.

        """
        self._server = await asyncio.start_server(self._serve, self._host, self._port)

    def close(self) -> None:
        """Stop listening."""
        if self._server is not None:
            self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # cancelled when the engine stops: asyncio's stream callback would print that as an error
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            while True:
                message = await _receive(reader)
                match message["op"]:
                    case "hello":
                        _send(writer, {"engine_id": self._engine_id})
                    case "read":
                        _send(writer, self._read(message))
                    case "heartbeat":
                        self._leases.extend(message["request_id"], self._now())
                    case "done":
                        self._leases.collect(message["request_id"])
        writer.close()

    def _read(self, message: dict[str, Any]) -> dict[str, Any]:
        lease = self._leases.find(message["request_id"])
        known = None
        if lease is not None:
            known = {
                "state": lease.state,
                "readers": lease.readers,
                "prompt": lease.prompt,
                "model": lease.model,
                "params": lease.params,
            }
            lease.readers += 1
        ids = message["blocks"]
        if any(not 0 <= number < self._pool.total for number in ids):
            return {"error": "unknown block", "lease": known}
        blocks = [self._pool.blocks[number] for number in ids]
        return {
            "contents": [[block.entry, base64.b64encode(block.tokens).decode()] for block in blocks],
            "lease": known,
        }


class Remote:
    """A connection to one prefill engine's side channel, made on first use and again when it broke."""

    def __init__(self, host: str, port: int) -> None:
        self.host, self.port = host, port
        self._lock = asyncio.Lock()
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self._engine_id = ""

    def knows(self, engine_id: str) -> bool:
        """Whether there is a connection to that engine."""
        return self._streams is not None and self._engine_id == engine_id and not self._streams[0].at_eof()

    async def hello(self, engine_id: str) -> bool:
        """Shake hands with an engine; False when it is not there."""
        async with self._lock:
            try:
                await self._connected(engine_id)
            except RemoteUnreachableError:
                return False
        return True

    async def _connected(self, engine_id: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        lost = self._streams is not None and self._engine_id == engine_id and self._streams[0].at_eof()
        if self._streams is not None and not self.knows(engine_id):
            self.close()
        if self._streams is None:
            try:
                reader, writer = await asyncio.open_connection(self.host, self.port, limit=2**26)
                _send(writer, {"op": "hello"})
                answer = await _receive(reader)
            except (OSError, asyncio.IncompleteReadError) as error:
                # NIXL learns of the death of a peer that it knows; only a stranger's silence takes its time.
                raise RemoteUnreachableError(f"{self.host}:{self.port}: {error}", at_once=lost) from error
            if answer["engine_id"] != engine_id:
                writer.close()
                message = f"{self.host}:{self.port} is engine {answer['engine_id']}, not {engine_id}"
                raise RemoteUnreachableError(message, at_once=True)
            self._streams, self._engine_id = (reader, writer), engine_id
        return self._streams

    async def read(self, engine_id: str, request_id: str, blocks: list[int]) -> RemoteBlocks:
        """Read blocks of the engine that the ticket names.

        Raises:
            RemoteUnreachableError: the handshake failed.
            UnknownBlockError: it has no such block.

        """
        async with self._lock:
            try:
                reader, writer = await self._connected(engine_id)
                _send(writer, {"op": "read", "request_id": request_id, "blocks": blocks})
                answer = await _receive(reader)
            except (OSError, asyncio.IncompleteReadError) as error:
                self.close()
                raise RemoteUnreachableError(f"{self.host}:{self.port}: {error}", at_once=True) from error
        if "error" in answer:
            raise UnknownBlockError(answer["error"])
        contents = [(entry, base64.b64decode(tokens)) for entry, tokens in answer["contents"]]
        return RemoteBlocks(contents, answer["lease"])

    async def tell(self, engine_id: str, operation: str, request_id: str) -> bool:
        """Send a notification (`done` or `heartbeat`); False when it cannot be delivered."""
        async with self._lock:
            try:
                _, writer = await self._connected(engine_id)
                _send(writer, {"op": operation, "request_id": request_id})
            except (OSError, RemoteUnreachableError):
                return False
        return True

    def close(self) -> None:
        """Close the connection."""
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None


def fill(blocks: list[Block], contents: list[tuple[int, bytes]]) -> None:
    """Put contents that were read into local blocks."""
    for block, (entry, tokens) in zip(blocks, contents, strict=True):
        block.entry, block.tokens = entry, tokens
