"""Whether the core of an engine works that sends nothing, by the counters of its `/metrics`.

vLLM's frontend answers `/metrics` while its core hangs, with the numbers of before. A core that works changes one of
them with every step: tokens, steps, or how full the KV cache is while a long prompt is computed. One that has nothing
but requests that wait has no room for them, which is as it should be while tickets pin its blocks (so seen on a full
prefill engine of vLLM 0.32: none runs, four wait, three blocks of ten free, all else stands still).
"""

from math import inf

from pdrouter.fleet.engine import Engine
from pdrouter.fleet.page import Page
from pdrouter.fleet.scrape import RUNNING, USAGE, WAITING, values
from pdrouter.upstream.pool import Pool

_GENERATED = b"vllm:generation_tokens_total"
_MORE = (b"vllm:prompt_tokens_total", b"vllm:iteration_tokens_total_count", USAGE)


def counters(page: bytes) -> list[float]:
    """Give the numbers that a working core changes, or nothing when the page does not have vLLM's.

    Raises:
        ValueError: a value is no number.
    """
    generated = values(page, _GENERATED)
    if not generated:
        return []
    for name in _MORE:
        generated += values(page, name)
    return generated


class Pulse:
    """Asks one engine as long as it is silent, though not at once: most silences are short, and a page costs vLLM time.

    Times are those of the loop, in seconds.
    """

    __slots__ = ("_asked", "_counters", "_engine", "_every", "_page", "_pool", "_since", "stood", "well")

    def __init__(self, engine: Engine, pool: Pool, every: float) -> None:
        """Prepare.

        Args:
            engine: whom to ask.
            pool: connections to it.
            every: how often.
        """
        self.stood = 0.0
        self.well = -inf
        self._engine = engine
        self._pool = pool
        self._every = every
        self._page: Page | None = None
        self._asked = pool.loop.time()
        self._since = 0.0
        self._counters: list[float] = []

    def look(self, now: float) -> None:
        """Ask, if it is time to.

        `stood` tells how long the counters have been seen standing still, `well` when they last told that the core
        works, or waits for its tickets to be used.
        """
        if self._page is None and now - self._asked >= self._every:
            self._asked = now
            self._page = Page(self._engine, self._pool, self._heard)

    def stop(self) -> None:
        """Wait for no answer."""
        if self._page is not None:
            self._page.stop()

    def _heard(self, page: bytes | None) -> None:
        """Compare with what the counters were; no answer says nothing, and health checks ask why."""
        self._page = None
        if page is None:
            return
        try:
            told, full = counters(page), self._full(page)
        except ValueError:
            told, full = [], False
        if told and told == self._counters:
            # From when the first answer was read to when the last one was asked for: what the router itself
            # slept through between an engine's answer and its reading must not count.
            self.stood = self._asked - self._since
        else:
            self.stood = 0.0
            self._since = self._pool.loop.time()
            if told and self._counters:
                self.well = self._since
            self._counters = told
        if full:
            self.well = self._pool.loop.time()

    def _full(self, page: bytes) -> bool:
        """Whether nothing runs since what waits, which may be twice as long as is thought, finds no room."""
        engine = self._engine
        if not engine.pinned_tokens or sum(values(page, WAITING)) == 0 or sum(values(page, RUNNING)) > 0:
            return False
        longest = max((call.held for call in self._pool.open(engine)), default=0)
        free = (1 - max(values(page, USAGE), default=1.0)) * engine.kv_tokens
        return free < 2 * longest + engine.block_size
