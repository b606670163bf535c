"""Load rows in memory that all worker processes of a router share.

Each worker has a table of its own and writes only there; it reads the tables of the others. So nothing is locked, and
the rows of a worker that died can be cleared as a whole. A number has eight bytes and is written at once, so a reader
sees the old or the new value. Rows are found by a hash of role and name, for workers may know engines in different
orders.
"""

import asyncio
import mmap
from hashlib import blake2b
from time import monotonic

from pdrouter.fleet.engine import Engine

ENGINES = 1024  # rows of a table; engines beyond that are balanced by each worker's own load only
_KEY, _IN_FLIGHT, _QUEUED, _HELD, _WAITING, _RUNNING, _USAGE, _KV_TOKENS, _SCRAPED, _FIELDS = range(10)
_MILLION = 1_000_000
_FRESH = 0.001  # seconds for which what was read of the others is used


def _key(engine: Engine) -> int:
    told = f"{engine.role.value} {engine.name}".encode()
    return int.from_bytes(blake2b(told, digest_size=7).digest(), "big") + 1


class Table:
    """The memory: one table for each worker. Made before the workers are forked."""

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self._size = 1 + ENGINES * _FIELDS
        self._memory = mmap.mmap(-1, 8 * self._size * workers)
        self.numbers = memoryview(self._memory).cast("q")

    def start(self, worker: int) -> int:
        """Where a worker's table begins: its count of rows."""
        return worker * self._size

    def clear(self, worker: int) -> None:
        """Forget what a worker that is gone had under way."""
        start = self.start(worker)
        self.numbers[start] = 0
        self.numbers[start + 1 : start + self._size] = memoryview(bytes(8 * (self._size - 1))).cast("q")


class Rows:
    """One worker's view: publishes its own load, adds up that of the others (`pdrouter.fleet.fleet.Watcher`)."""

    def __init__(self, loop: asyncio.AbstractEventLoop, table: Table, worker: int, scrapes: bool) -> None:
        """Prepare.

        Args:
            loop: publishes at the end of its turns.
            table: the shared memory.
            worker: whose table is written.
            scrapes: whether this worker reads the engines' metrics; the others take them from its rows.
        """
        self._loop = loop
        self._table = table
        self._worker = worker
        self._scrapes = scrapes
        self._places: dict[Engine, int] = {}
        self._by_key: dict[int, Engine] = {}
        self._dirty: set[Engine] = set()
        self._read = 0.0
        table.clear(worker)

    def joined(self, engine: Engine) -> None:
        """Give it a row."""
        self._by_key[_key(engine)] = engine
        self._lay_out()

    def left(self, engine: Engine) -> None:
        """Take its row back; requests that it still has are not counted any more."""
        if self._by_key.get(_key(engine)) is engine:
            del self._by_key[_key(engine)]
        self._lay_out()

    def _lay_out(self) -> None:
        start, numbers = self._table.start(self._worker), self._table.numbers
        numbers[start] = 0
        self._places = {}
        for place, (key, engine) in enumerate(list(self._by_key.items())[:ENGINES]):
            at = start + 1 + place * _FIELDS
            self._places[engine] = at
            numbers[at + _KEY] = key
            self._write(engine, at)
        numbers[start] = len(self._places)

    def changed(self, engine: Engine) -> None:
        """Publish an engine's row at the end of this turn of the loop."""
        if not self._dirty:
            self._loop.call_soon(self._publish)
        self._dirty.add(engine)

    def _publish(self) -> None:
        dirty, self._dirty = self._dirty, set()
        for engine in dirty:
            at = self._places.get(engine)
            if at is not None:
                self._write(engine, at)

    def _write(self, engine: Engine, at: int) -> None:
        numbers = self._table.numbers
        numbers[at + _IN_FLIGHT] = engine.own_in_flight
        numbers[at + _QUEUED] = engine.own_queued
        numbers[at + _HELD] = engine.own_held
        if self._scrapes and engine.scraped_at > 0:
            numbers[at + _WAITING] = int(engine.waiting)
            numbers[at + _RUNNING] = int(engine.running)
            numbers[at + _USAGE] = int(engine.kv_usage * _MILLION)
            numbers[at + _KV_TOKENS] = engine.kv_tokens
            numbers[at + _SCRAPED] = int(engine.scraped_at * _MILLION)

    def refresh(self) -> None:
        """Read the others' rows, unless that was done within the last millisecond."""
        now = monotonic()
        if now - self._read < _FRESH:
            return
        self._read = now
        sums: dict[Engine, list[int]] = {}
        for worker in range(self._table.workers):
            if worker != self._worker:
                self._add(worker, sums)
        for engine in self._places:
            told = sums.get(engine)
            engine.elsewhere = (told[0], told[1], told[2]) if told is not None else (0, 0, 0)

    def _add(self, worker: int, sums: dict[Engine, list[int]]) -> None:
        start, numbers = self._table.start(worker), self._table.numbers
        rows = numbers[start]
        values = numbers[start + 1 : start + 1 + rows * _FIELDS].tolist()
        for at in range(0, len(values), _FIELDS):
            engine = self._by_key.get(values[at])
            if engine is None:
                continue
            told = sums.setdefault(engine, [0, 0, 0])
            told[0] += values[at + _IN_FLIGHT]
            told[1] += values[at + _QUEUED]
            told[2] += values[at + _HELD]
            scraped = values[at + _SCRAPED] / _MILLION
            if not self._scrapes and scraped > engine.scraped_at:
                engine.waiting, engine.running = float(values[at + _WAITING]), float(values[at + _RUNNING])
                engine.kv_usage = values[at + _USAGE] / _MILLION
                engine.kv_tokens = values[at + _KV_TOKENS]
                engine.scraped_at = scraped
