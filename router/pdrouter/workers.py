"""Several processes behind one public port, and what they have in common.

The first process opens nothing and serves nothing: it starts the workers, clears the load rows of one that died, and
starts another in its place. Workers listen on the same ports (SO_REUSEPORT), so the kernel spreads connections over
them; whichever is asked for metrics or for a change by hand asks or tells the others over a socket of its own.

What must outlive a worker is in files that all of them see, in a folder that goes with the router: the changes by hand,
which a worker that starts later has to know too, and the counters that were shown, which its successor counts on from.
"""

import asyncio
import contextlib
import ctypes
import errno
import fcntl
import logging
import os
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import orjson

from pdrouter.fleet.rows import Table
from pdrouter.observe import described
from pdrouter.server.admin import AdminError

_log = logging.getLogger(__name__)
_ANSWER_WITHIN = 1.0
_EARLY = 2.0  # a worker that ends sooner than this after its start would end again
_LATER = 1.0  # seconds after which its successor is started
_LOOK = 0.02  # seconds between looks whether the first worker listens
_LOCK = 0.005  # seconds between tries to get the lock that another worker has
_PR_SET_PDEATHSIG = 1
_ENDING = (signal.SIGTERM, signal.SIGINT)
_WAITED_FOR = (signal.SIGCHLD, *_ENDING)

State = dict[str, list[list[Any]]]
"""A process's numbers (`pdrouter.observe.metrics.State`)."""


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


def _replace(path: Path, content: bytes) -> None:
    """Write a file so that a reader finds the old content or the new one, whenever the writer is killed."""
    new = path.with_name(f"{path.name}.{os.getpid()}")
    new.write_bytes(content)
    new.replace(path)


class Changes:
    """Engines added and removed by hand, in the order in which that was done: for each the last change counts."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "changes"
        self._lock = folder / "changes.lock"

    def _read(self) -> dict[str, list[Any]]:
        try:
            found: dict[str, list[Any]] = orjson.loads(self._file.read_bytes())
        except FileNotFoundError:
            return {}
        return found

    async def add(self, what: str, told: dict[str, Any]) -> None:
        """Note a change."""
        with self._lock.open("w") as lock:
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    await asyncio.sleep(_LOCK)
            changes = self._read()
            number = max((one[0] for one in changes.values()), default=0) + 1
            changes[str(told["url"])] = [number, what, told]
            _replace(self._file, orjson.dumps(changes))

    def after(self, number: int) -> Iterator[tuple[int, str, dict[str, Any]]]:
        """Give the changes after one, each with its number, in their order; the first is number 1."""
        for change, what, told in sorted(self._read().values(), key=lambda one: int(one[0])):
            if change > number:
                yield change, what, told


def _counted(state: State) -> State:
    """Keep of a process's numbers what only grows, equal labels added up: what its successor starts from."""
    kept: State = {}
    for metric in described.ALL:
        rows = state.get(metric.name, [])
        if metric.kind == "counter":
            sums: dict[tuple[str, ...], float] = {}
            for *labels, number in rows:
                key = tuple(map(str, labels))
                sums[key] = sums.get(key, 0) + number
            kept[metric.name] = [[*key, number] for key, number in sums.items()]
        elif metric.kind == "histogram" and rows:
            counts = [sum(column) for column in zip(*(row[0] for row in rows), strict=True)]
            kept[metric.name] = [[counts, sum(row[1] for row in rows)]]
    return kept


class Siblings:
    """The other workers: asked for their numbers, told of changes."""

    def __init__(self, worker: Worker, state: Callable[[], State], change: Callable[[str, dict[str, Any]], object]):
        """Prepare.

        Args:
            worker: which of them this is.
            state: gives this worker's numbers.
            change: does in this worker what another one was told.
        """
        self._worker = worker
        self._state = state
        self._change = change
        self._changes = Changes(worker.folder)
        self._learnt = 0
        self._past = self._kept(worker.number)
        self._server: asyncio.Server | None = None
        self._told: set[asyncio.Task[None]] = set()

    async def listen(self) -> None:
        """Answer the others from now on; do what was changed by hand before this worker was started."""
        path = self._worker.path(self._worker.number)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        self._server = await asyncio.start_unix_server(self._answer, path, limit=1 << 24)
        self._learn()

    def close(self) -> None:
        """Answer no more."""
        if self._server is not None:
            self._server.close()
            self._shown()

    # what outlives a worker

    def _file(self, number: int) -> Path:
        return self._worker.folder / f"{number}.counted"

    def _kept(self, number: int) -> State:
        try:
            return _counted(orjson.loads(self._file(number).read_bytes()))
        except (OSError, ValueError):
            return {}

    def _shown(self) -> State:
        """Give this worker's numbers, its predecessors' counters included, and keep them: no counter may go back."""
        state = self._state()
        for name, rows in self._past.items():
            state[name] = rows + state.get(name, [])
        try:
            _replace(self._file(self._worker.number), orjson.dumps(state))
        except OSError as error:
            _log.warning("worker=%d its counters are not kept: %s", self._worker.number, error)
        return state

    def _learn(self) -> None:
        for number, what, told in self._changes.after(self._learnt):
            self._learnt = number
            # A removed engine that this worker does not have: done before, or the engine is found later.
            with contextlib.suppress(AdminError):
                self._change(what, told)

    # the others

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(_ANSWER_WITHIN):
                asked = orjson.loads(await reader.readline())
                if asked["what"] == "state":
                    writer.write(orjson.dumps(self._shown()) + b"\n")
                else:
                    self._learn()
                    writer.write(b"{}\n")
                await writer.drain()
        except (OSError, TimeoutError, ValueError, KeyError) as error:
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
            return None  # it is just starting or ending

    def _others(self) -> list[int]:
        return [number for number in range(self._worker.count) if number != self._worker.number]

    async def _state_of(self, number: int) -> State:
        state: State | None = await self._ask(number, b'{"what":"state"}')
        return self._kept(number) if state is None else state

    async def states(self) -> list[State]:
        """Give the numbers of all workers, this one's first; of one that does not answer, the counters it had last."""
        return [self._shown(), *await asyncio.gather(*map(self._state_of, self._others()))]

    def tell(self, what: str, told: dict[str, Any]) -> None:
        """Let the others, and workers that are started later, do what this one was told."""
        task = asyncio.get_running_loop().create_task(self._tell(what, told))
        self._told.add(task)
        task.add_done_callback(self._told.discard)

    async def _tell(self, what: str, told: dict[str, Any]) -> None:
        try:
            await self._changes.add(what, told)
        except OSError as error:
            _log.error("worker=%d the others do not know of %s %s: %s", self._worker.number, what, told, error)
            return
        # This one does it again: where two workers were told at once, all must end with the same change.
        self._learn()
        await asyncio.gather(*(self._ask(number, b'{"what":"changes"}') for number in self._others()))


class Workers:
    """Starts workers and keeps as many running as there should be."""

    def __init__(
        self, count: int, ports: list[tuple[str, int, str]], serve: Callable[[Worker], None], shared: bool = False
    ) -> None:
        """Prepare.

        Args:
            count: how many.
            ports: address, port and flag of each port that the workers share.
            serve: what a worker does until it is told to end; it may raise SystemExit.
            shared: whether another router may have the ports too, as one that ends has for a while.
        """
        self._count = count
        self._ports = ports
        self._serve = serve
        self._shared = shared
        self._table = Table(count)
        self._numbers: dict[int, int] = {}
        self._started: dict[int, float] = {}
        self._due: dict[int, float] = {}
        self._held: list[socket.socket] = []
        self._ending = False
        self._worst = 0

    def run(self) -> NoReturn:
        """Keep workers running until SIGTERM or SIGINT, then end with the worst of their exit codes.

        When the first worker cannot start, neither could any other: its exit code is the router's.
        """
        # Signals are only taken where they are waited for, so none can come between two steps.
        signal.pthread_sigmask(signal.SIG_BLOCK, _WAITED_FOR)
        self._hold_ports()
        try:
            folder = Path(tempfile.mkdtemp(prefix="pd-router-"))
        except OSError as error:
            raise SystemExit(
                f"pd-router: several workers need a folder for temporary files: {error.strerror}; set TMPDIR to one "
                "that can be written, or start with --workers 1"
            ) from None
        try:
            self._start(0, folder)
            first = folder / "0.sock"
            while self._numbers and not first.exists():
                self._wait(_LOOK)
            if self._numbers and not self._ending:
                self._due |= dict.fromkeys(range(1, self._count), 0.0)
                self._keep(folder)
            while self._numbers:
                self._wait(None)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        raise SystemExit(self._worst)

    def _keep(self, folder: Path) -> None:
        """Start workers that are due, until the router shall end."""
        while not self._ending:
            now = time.monotonic()
            for number in [number for number, due in self._due.items() if due <= now]:
                del self._due[number]
                self._start(number, folder)
            self._wait(max(0.0, min(self._due.values()) - now) if self._due else None, again=True)

    def _wait(self, seconds: float | None, *, again: bool = False) -> None:
        """Wait until a worker ends, a signal comes, or the time is over; `again`: one that ended gets a successor."""
        if seconds is None:
            number: int | None = signal.sigwait(_WAITED_FOR)
        else:
            told = signal.sigtimedwait(_WAITED_FOR, seconds)
            number = None if told is None else told.si_signo
        if number in _ENDING:
            self._ending = True
            for pid in self._numbers:
                os.kill(pid, signal.SIGTERM)
        while self._numbers:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            self._ended(self._numbers.pop(pid), os.waitstatus_to_exitcode(status), again)

    def _ended(self, number: int, code: int, again: bool) -> None:
        self._table.clear(number)
        if self._ending or not again:
            # The signal that it was to end by may have come before it could take it.
            orderly = self._ending and -code in _ENDING
            self._worst = max(self._worst, 0 if orderly else 128 - code if code < 0 else code)
            return
        now = time.monotonic()
        early = now - self._started[number] < _EARLY
        self._due[number] = now + _LATER if early else now
        _log.warning("worker=%d ended code=%d; starting another%s", number, code, " in 1 s" if early else "")

    def _hold_ports(self) -> None:
        """See that nobody else has the ports, and keep them.

        A port that is shared lets others join in silently, so that is only done without looking when it is asked for.

        The sockets never listen, so they get no connections.
        """
        for host, port, flag in self._ports:
            try:
                for family, kind, protocol, _, address in socket.getaddrinfo(
                    host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
                ):
                    for shared in (True,) if self._shared else (False, True):
                        self._held.append(socket.socket(family, kind, protocol))
                        if family == socket.AF_INET6:
                            self._held[-1].setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                        self._held[-1].setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                        self._held[-1].setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, shared)
                        self._held[-1].bind(address)
                        if not shared:
                            self._held.pop().close()
            except OSError as error:
                taken = f"the port is in use; stop the program that has it or choose another with {flag}"
                why = taken if error.errno == errno.EADDRINUSE else error.strerror or error
                raise SystemExit(f"pd-router: cannot listen on {host}:{port}: {why}") from None

    def _start(self, number: int, folder: Path) -> None:
        self._started[number] = time.monotonic()
        parent = os.getpid()
        pid = os.fork()
        if pid:
            self._numbers[pid] = number
            return
        code = 0
        try:
            # A worker without the process that started it would serve on unseen.
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
            for ending in _ENDING:
                signal.signal(ending, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _WAITED_FOR)
            for held in self._held:
                held.close()
            if os.getppid() == parent:
                self._serve(Worker(number, self._count, self._table, folder))
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1
        except BaseException:
            _log.exception("worker=%d failed", number)
            code = 1
        finally:
            if os.getppid() != parent:
                shutil.rmtree(folder, ignore_errors=True)
            os._exit(code)
