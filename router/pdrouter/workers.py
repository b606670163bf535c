"""Several processes behind one public port, and what they have in common.

The first process opens nothing and serves nothing: it starts the workers, clears the load rows of one that died, and
starts another in its place. Workers listen on the same ports (SO_REUSEPORT), so the kernel spreads connections over
them; whichever is asked for metrics or for a change by hand asks or tells the others over a socket of its own.
"""

import asyncio
import contextlib
import logging
import os
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import orjson

from pdrouter.fleet.rows import Table

_log = logging.getLogger(__name__)
_ANSWER_WITHIN = 1.0
_EARLY = 2.0  # a worker that ends sooner than this after its start would end again


@dataclass(frozen=True)
class Worker:
    """What one worker knows of all of them."""

    number: int
    count: int
    table: Table
    folder: Path

    def path(self, number: int) -> str:
        """Where a worker listens for the others."""
        return str(self.folder / f"{number}.sock")


class Siblings:
    """The other workers: asked for their numbers, told of changes."""

    def __init__(
        self, worker: Worker, state: Callable[[], dict[str, Any]], change: Callable[[str, dict[str, Any]], object]
    ) -> None:
        """Prepare.

        Args:
            worker: which of them this is.
            state: gives this worker's numbers.
            change: does in this worker what another one was told.
        """
        self._worker = worker
        self._state = state
        self._change = change
        self._server: asyncio.Server | None = None
        self._told: set[asyncio.Task[Any]] = set()

    async def listen(self) -> None:
        """Answer the others from now on."""
        path = self._worker.path(self._worker.number)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        self._server = await asyncio.start_unix_server(self._answer, path, limit=1 << 24)

    def close(self) -> None:
        """Answer no more."""
        if self._server is not None:
            self._server.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            asked = orjson.loads(await reader.readline())
            if asked["what"] == "state":
                writer.write(orjson.dumps(self._state()) + b"\n")
            else:
                self._change(asked["what"], asked["told"])
                writer.write(b"{}\n")
            await writer.drain()
        except (OSError, ValueError, KeyError) as error:
            _log.warning("sibling=unanswered why=%s", error)
        finally:
            writer.close()

    async def _ask(self, number: int, asked: bytes) -> Any:
        try:
            async with asyncio.timeout(_ANSWER_WITHIN):
                reader, writer = await asyncio.open_unix_connection(self._worker.path(number), limit=1 << 24)
                try:
                    writer.write(asked + b"\n")
                    return orjson.loads(await reader.readline())
                finally:
                    writer.close()
        except (OSError, TimeoutError, ValueError):
            return None  # it is just starting or ending; its numbers are missing from this page

    async def _ask_all(self, asked: bytes) -> list[Any]:
        others = [number for number in range(self._worker.count) if number != self._worker.number]
        told = await asyncio.gather(*(self._ask(number, asked) for number in others))
        return [one for one in told if one is not None]

    async def states(self) -> list[dict[str, Any]]:
        """Give the numbers of all workers, this one's first."""
        return [self._state(), *await self._ask_all(b'{"what":"state"}')]

    def tell(self, what: str, told: dict[str, Any]) -> None:
        """Let the others do what this one was told."""
        task = asyncio.get_running_loop().create_task(self._ask_all(orjson.dumps({"what": what, "told": told})))
        self._told.add(task)
        task.add_done_callback(self._told.discard)


class Workers:
    """Starts workers and keeps as many running as there should be."""

    def __init__(self, count: int, ports: list[tuple[str, int, str]], serve: Callable[[Worker], None]) -> None:
        """Prepare.

        Args:
            count: how many.
            ports: address, port and flag of each port that the workers share.
            serve: what a worker does until it is told to end; it may raise SystemExit.
        """
        self._count = count
        self._ports = ports
        self._serve = serve
        self._table = Table(count)
        self._numbers: dict[int, int] = {}
        self._started: dict[int, float] = {}
        self._ending = False

    def run(self) -> NoReturn:
        """Keep workers running until SIGTERM or SIGINT, then end with the worst of their exit codes."""
        self._check_ports()
        folder = Path(tempfile.mkdtemp(prefix="pd-router-"))
        worst = 0
        try:
            for ending in (signal.SIGTERM, signal.SIGINT):
                signal.signal(ending, self._end)
            for number in range(self._count):
                self._start(number, folder)
            while self._numbers:
                pid, status = os.wait()
                code = os.waitstatus_to_exitcode(status)
                number = self._numbers.pop(pid)
                self._table.clear(number)
                if self._ending:
                    worst = max(worst, abs(code))
                    continue
                _log.warning("worker=%d ended code=%d; starting another", number, code)
                if time.monotonic() - self._started[number] < _EARLY:
                    time.sleep(_EARLY / 2)
                if not self._ending:
                    self._start(number, folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        raise SystemExit(worst)

    def _check_ports(self) -> None:
        """See that nobody else has the ports: sharing would let another program of ours join in silently."""
        for host, port, flag in self._ports:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            with socket.socket(family) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    probe.bind((host, port))
                except OSError as error:
                    raise SystemExit(
                        f"pd-router: cannot listen on {host}:{port}: {error.strerror}; stop the program that has it or "
                        f"choose another with {flag}"
                    ) from None

    def _start(self, number: int, folder: Path) -> None:
        self._started[number] = time.monotonic()
        pid = os.fork()
        if pid:
            self._numbers[pid] = number
            return
        code = 0
        try:
            for name in (signal.SIGTERM, signal.SIGINT):
                signal.signal(name, signal.SIG_DFL)
            self._serve(Worker(number, self._count, self._table, folder))
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1
        except BaseException:
            _log.exception("worker=%d failed", number)
            code = 1
        finally:
            os._exit(code)

    def _end(self, number: int, frame: object) -> None:
        self._ending = True
        for pid in list(self._numbers):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
