"""Whether the core of an engine works that sends nothing, by the counters of its `/metrics`.

vLLM's frontend answers `/metrics` while its core hangs, with the numbers of before. A core that works changes one of
them with every step: tokens, steps, or how full the KV cache is while a long prompt is computed.
"""

from pdrouter.fleet.engine import Engine
from pdrouter.fleet.scrape import values
from pdrouter.upstream.connection import Headers
from pdrouter.upstream.errors import UpstreamError
from pdrouter.upstream.pool import Call, Pool

_GENERATED = b"vllm:generation_tokens_total"
_MORE = (b"vllm:prompt_tokens_total", b"vllm:iteration_tokens_total_count", b"vllm:kv_cache_usage_perc")
_TIMEOUT = 2.0


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

    __slots__ = ("_asked", "_call", "_counters", "_engine", "_every", "_pieces", "_pool", "_since", "_status", "stood")

    def __init__(self, engine: Engine, pool: Pool, every: float) -> None:
        """Prepare.

        Args:
            engine: whom to ask.
            pool: connections to it.
            every: how often.
        """
        self.stood = 0.0
        self._engine = engine
        self._pool = pool
        self._every = every
        self._call: Call | None = None
        self._asked = pool.loop.time()
        self._since = 0.0
        self._status = 0
        self._counters: list[float] = []
        self._pieces: list[bytes] = []

    def look(self, now: float) -> None:
        """Ask, if it is time to; `stood` tells for how long the counters have been seen standing still."""
        if self._call is not None:
            if now - self._asked < _TIMEOUT:
                return
            self.stop()
        elif now - self._asked < self._every:
            return
        self._asked = now
        self._pieces.clear()
        request = b"GET /metrics HTTP/1.1\r\nhost: %b\r\n\r\n" % self._engine.authority
        self._call = self._pool.call(self._engine, request, self, counted=False)

    def stop(self) -> None:
        """Wait for no answer."""
        call, self._call = self._call, None
        if call is not None:
            call.abort()

    def head(self, status: int, headers: Headers) -> None:
        """Take the status."""
        self._status = status

    def body(self, data: bytes) -> None:
        """Take a piece."""
        self._pieces.append(data)

    def end(self) -> None:
        """Compare with what the counters were."""
        self._call = None
        try:
            told = counters(b"".join(self._pieces)) if self._status == 200 else []
        except ValueError:
            told = []
        if told and told == self._counters:
            # From when the first answer was read to when the last one was asked for: what the router itself
            # slept through between an engine's answer and its reading must not count.
            self.stood = self._asked - self._since
        else:
            self.stood = 0.0
            self._counters = told
            self._since = self._pool.loop.time()

    def failed(self, error: UpstreamError) -> None:
        """No answer says nothing; whether the engine answers at all is for health checks."""
        self._call = None
