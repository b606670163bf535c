"""Load rows in memory that all worker processes of a router share.

Each worker has a table of its own and writes only there; it reads the tables of the others. So nothing is locked, and
the rows of a worker that died can be cleared as a whole. A number has eight bytes and is written at once, so a reader
sees the old or the new value. Rows are found by a hash of role and name, for workers may know engines in different
orders.

An engine keeps its row while it is there. Where rows come and go, the table's generation is odd; a reader that sees it
odd or changed reads again, so it never takes one engine's numbers for another's.
"""

import asyncio
import mmap
from hashlib import blake2b
from heapq import heappop, heappush
from time import monotonic

from pdrouter.fleet.engine import Engine

ENGINES = 1024  # rows of a table; engines beyond that are balanced by each worker's own load only
_GENERATION, _ROWS, _FIRST = range(3)
_KEY, _IN_FLIGHT, _QUEUED, _HELD, _PINNED, _WAITING, _RUNNING, _USAGE, _KV_TOKENS, _SCRAPED, _SUSPECTED, _FIELDS = (
    range(12)
)
_MILLION = 1_000_000
_FRESH = 0.001  # seconds for which what was read of the others is used
_TRIES = 4
_NOTHING = (0, 0, 0, 0)
_MOST = 1 << 62


def _key(engine: Engine) -> int:
    told = f"{engine.role.value} {engine.name}".encode()
    return int.from_bytes(blake2b(told, digest_size=7).digest(), "big") + 1


def _whole(number: float) -> int:
    """What an engine's metrics say may be anything, NaN and infinity too."""
    return int(number) if 0 <= number < _MOST else 0


def _within(number: int) -> int:
    """A row holds 64 bits; one engine's number that does not fit must not keep all others from being published."""
    if number <= 0:
        return 0
    return number if number < _MOST else _MOST


class Table:
    """The memory: one table for each worker. Made before the workers are forked."""

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self._size = _FIRST + ENGINES * _FIELDS
        self._memory = mmap.mmap(-1, 8 * self._size * workers)
        self.numbers = memoryview(self._memory).cast("q")

    def start(self, worker: int) -> int:
        """Where a worker's table begins: its generation, its count of rows, its rows."""
        return worker * self._size

    def begin(self, worker: int) -> None:
        """Rows are going to come or go."""
        self.numbers[self.start(worker) + _GENERATION] |= 1

    def end(self, worker: int) -> None:
        """Rows may be read again."""
        self.numbers[self.start(worker) + _GENERATION] += 1

    def rows(self, worker: int) -> list[int] | None:
        """Give the numbers of a worker's rows, or None while they come and go (or it died in the middle of that)."""
        start, numbers = self.start(worker), self.numbers
        for _ in range(_TRIES):
            generation = numbers[start + _GENERATION]
            first = start + _FIRST
            values = numbers[first : first + numbers[start + _ROWS] * _FIELDS].tolist()
            if not generation & 1 and numbers[start + _GENERATION] == generation:
                return values
        return None

    def clear(self, worker: int) -> None:
        """Forget what a worker that is gone had under way."""
        start = self.start(worker)
        self.begin(worker)
        self.numbers[start + _ROWS : start + self._size] = memoryview(bytes(8 * (self._size - _ROWS))).cast("q")
        self.end(worker)


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
        self._free = list(range(ENGINES))
        self._without: dict[Engine, None] = {}
        self._by_key: dict[int, Engine] = {}
        self._dirty: set[Engine] = set()
        self._seen: list[list[int]] = [[] for _ in range(table.workers)]
        self._read = 0.0
        table.clear(worker)

    def joined(self, engine: Engine) -> None:
        """Give it a row, as long as there are any."""
        self._by_key[_key(engine)] = engine
        if self._free:
            self._place(engine)
        else:
            self._without[engine] = None

    def left(self, engine: Engine) -> None:
        """Take its row back; requests that it still has are not counted any more."""
        key = _key(engine)
        if self._by_key.get(key) is engine:
            del self._by_key[key]
        engine.elsewhere = _NOTHING
        self._without.pop(engine, None)
        at = self._places.pop(engine, -1)
        if at < 0:
            return
        start, numbers = self._table.start(self._worker), self._table.numbers
        self._table.begin(self._worker)
        for field in range(_FIELDS):
            numbers[at + field] = 0
        last = max(self._places.values(), default=start + _FIRST - _FIELDS)
        numbers[start + _ROWS] = (last - start - _FIRST) // _FIELDS + 1
        self._table.end(self._worker)
        heappush(self._free, (at - start - _FIRST) // _FIELDS)
        if self._without:
            one = next(iter(self._without))
            del self._without[one]
            self._place(one)

    def _place(self, engine: Engine) -> None:
        place = heappop(self._free)
        start, numbers = self._table.start(self._worker), self._table.numbers
        at = self._places[engine] = start + _FIRST + place * _FIELDS
        self._table.begin(self._worker)
        numbers[at + _KEY] = _key(engine)
        self._write(engine, at)
        numbers[start + _ROWS] = max(numbers[start + _ROWS], place + 1)
        self._table.end(self._worker)

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
        numbers[at + _QUEUED] = _within(engine.own_queued)
        numbers[at + _HELD] = _within(engine.own_held + engine.own_coming)
        numbers[at + _PINNED] = _within(engine.own_pinned)
        numbers[at + _SUSPECTED] = engine.suspected
        if self._scrapes and engine.scraped_at > 0:
            numbers[at + _WAITING] = _whole(engine.waiting)
            numbers[at + _RUNNING] = _whole(engine.running)
            numbers[at + _USAGE] = _whole(engine.kv_usage * _MILLION)
            numbers[at + _KV_TOKENS] = _whole(engine.kv_tokens)
            numbers[at + _SCRAPED] = int(engine.scraped_at * _MILLION)

    def refresh(self) -> None:
        """Read the others' rows, unless that was done within the last millisecond."""
        now = monotonic()
        if now - self._read < _FRESH:
            return
        self._read = now
        for engine in self._by_key.values():
            engine.elsewhere = _NOTHING
        for worker in range(self._table.workers):
            if worker != self._worker:
                values = self._table.rows(worker)
                if values is not None:
                    self._seen[worker] = values
                self._add(self._seen[worker])

    def _add(self, values: list[int]) -> None:
        for at in range(0, len(values), _FIELDS):
            in_flight, scraped = values[at + _IN_FLIGHT], values[at + _SCRAPED]
            held, pinned, suspected = values[at + _HELD], values[at + _PINNED], values[at + _SUSPECTED]
            if not (in_flight or scraped or held or pinned or suspected):
                continue
            engine = self._by_key.get(values[at + _KEY])
            if engine is None:
                continue
            if in_flight or held or pinned:
                told = engine.elsewhere
                engine.elsewhere = (
                    told[0] + in_flight, told[1] + values[at + _QUEUED], told[2] + held, told[3] + pinned,
                )  # fmt: skip
            if suspected > engine.suspected:  # this row tells it too, so that it outlives the worker who found it
                engine.suspected = suspected
                self.changed(engine)
            # The same reading is taken again: it may have been half written when it was read before.
            if scraped and not self._scrapes and scraped / _MILLION >= engine.scraped_at:
                engine.waiting, engine.running = float(values[at + _WAITING]), float(values[at + _RUNNING])
                engine.kv_usage = values[at + _USAGE] / _MILLION
                engine.kv_tokens = values[at + _KV_TOKENS] or engine.kv_tokens
                engine.scraped_at = scraped / _MILLION
