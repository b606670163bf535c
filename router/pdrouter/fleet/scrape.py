"""What engines say of their own load: four numbers out of each `/metrics` page, several times a second.

A page of vLLM has 60 KB; parsing all of it 64 times a second would cost a tenth of a core. Only the needed lines are
looked for.
"""

import asyncio
import logging
import re
from time import monotonic

from pdrouter.fleet.engine import Engine
from pdrouter.fleet.page import Page
from pdrouter.fleet.rows import Rows
from pdrouter.upstream.pool import Pool

_log = logging.getLogger(__name__)
WAITING = b"vllm:num_requests_waiting"
RUNNING = b"vllm:num_requests_running"
USAGE = b"vllm:kv_cache_usage_perc"
_BLOCKS = re.compile(rb'num_gpu_blocks="(\d+)"')
_BLOCK_SIZE = re.compile(rb'[{,]block_size="(\d+)"')


def values(page: bytes, name: bytes) -> list[float]:
    """Give the values of a metric, one for each engine core of the server.

    Args:
        page: in Prometheus's text format.
        name: the metric's full name.

    Raises:
        ValueError: a value is no number.
    """
    found = []
    start = b"\n" + name + b"{"
    at = page.find(start)
    while at >= 0:
        end = page.find(b"\n", at + 1)
        line = page[at : end if end >= 0 else len(page)]
        found.append(float((line[line.rindex(b"}") + 1 :].split() or [b""])[0]))
        at = page.find(start, at + 1)
    return found


def cache_size(page: bytes) -> tuple[int, int]:
    """Give how many tokens the KV cache of a server holds, and its block size; zeros when the page does not tell."""
    at = page.find(b"\nvllm:cache_config_info{")
    if at < 0:
        return 0, 0
    line = page[at : page.find(b"\n", at + 1)]
    blocks, size = _BLOCKS.search(line), _BLOCK_SIZE.search(line)
    return (int(blocks[1]) * int(size[1]), int(size[1])) if blocks and size else (0, 0)


def read(page: bytes, engine: Engine) -> bool:
    """Put a page's numbers into an engine's load row; tell whether they were there."""
    waiting = values(page, WAITING)
    running = values(page, RUNNING)
    usage = values(page, USAGE)
    if not (waiting and running and usage):
        return False
    engine.waiting, engine.running = sum(waiting), sum(running)
    engine.kv_usage = sum(usage) / len(usage)
    if not engine.kv_tokens:
        engine.kv_tokens, engine.block_size = cache_size(page)
    engine.scraped_at = monotonic()
    return True


class _Reader:
    """Asks one engine, again and again."""

    def __init__(self, engine: Engine, pool: Pool, interval: float, rows: Rows | None) -> None:
        self._engine = engine
        self._rows = rows
        self._pool = pool
        self._interval = interval
        self._page: Page | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._told = False

    def start(self) -> None:
        self._page = Page(self._engine, self._pool, self._heard)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._page is not None:
            self._page.stop()

    def _heard(self, page: bytes | None) -> None:
        """Read the page; when there is none, health checks say why, and `metrics_age` shows it."""
        if page is not None:
            self._read(page)
        self._timer = self._pool.loop.call_later(self._interval, self.start)

    def _read(self, page: bytes) -> None:
        try:
            useful = read(page, self._engine)
        except ValueError:
            useful = False
        if useful and self._rows is not None:
            self._rows.changed(self._engine)
        if not useful and not self._told:
            assert self._page is not None
            self._told = True
            _log.warning(
                "engine=%s its /metrics (status %d) lacks vLLM's load metrics; policies see only what the router "
                "itself gave it to do", self._engine.url, self._page.status,
            )  # fmt: skip


class Scrape:
    """Readers of all engines, as they come and go (`pdrouter.fleet.fleet.Watcher`)."""

    def __init__(self, pool: Pool, interval: float, rows: Rows | None = None) -> None:
        self._pool = pool
        self._interval = interval
        self._rows = rows
        self._readers: dict[Engine, _Reader] = {}

    def joined(self, engine: Engine) -> None:
        """Ask it from now on."""
        reader = self._readers[engine] = _Reader(engine, self._pool, self._interval, self._rows)
        reader.start()

    def left(self, engine: Engine) -> None:
        """Ask it no more."""
        self._readers.pop(engine).stop()

    def stop(self) -> None:
        """Ask nobody any more."""
        for reader in self._readers.values():
            reader.stop()
