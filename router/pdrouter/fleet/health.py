"""Whether engines answer: `GET /health` about once a second, and now and then what they are and serve.

A failed connection of a real request marks an engine down at once (`Fleet.mark`); only a successful check here marks
it up again. One that has left the fleet is asked as long as it has requests, for nothing else would tell that it died
over them; it comes up no more.
"""

import asyncio
import logging
import random
from collections.abc import Callable

import orjson

from pdrouter.fleet.engine import Engine
from pdrouter.fleet.fleet import Fleet
from pdrouter.fleet.scrape import cache_size
from pdrouter.upstream.connection import Headers
from pdrouter.upstream.errors import ExhaustedError, RouterFailureError, StalledError, UpstreamError
from pdrouter.upstream.pool import Call, Pool

_log = logging.getLogger(__name__)
_FACTS_EVERY = 30.0
_FACTS = {"/v1/models": "/version", "/version": "/metrics", "/metrics": ""}  # what is asked after what


class Probe:
    """Asks one engine, again and again."""

    def __init__(
        self, engine: Engine, fleet: Fleet, pool: Pool, interval: float, timeout: float, api_key: str | None
    ) -> None:
        self._engine = engine
        self._fleet = fleet
        self._pool = pool
        self._interval = interval
        self._timeout = timeout
        self._authorization = f"authorization: Bearer {api_key}\r\n" if api_key else ""
        self._failures = 0
        self._facts_due = 0.0
        self._path = "/health"
        self._heard = 0
        self._roots: list[str] = []
        self._status = 0
        self._chunks: list[bytes] = []
        self._call: Call | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._over: Callable[[Engine], object] | None = None

    def start(self) -> None:
        """Ask now."""
        if self._over is not None and not self._pool.open(self._engine):
            self._over(self._engine)
        else:
            self._ask("/health")

    def leave(self, over: Callable[[Engine], object]) -> None:
        """Ask on, though the engine has left, until it has no calls under way any more; then `over` is told."""
        self._over = over

    def stop(self) -> None:
        """Ask no more."""
        if self._timer is not None:
            self._timer.cancel()
        if self._call is not None:
            self._call.abort()

    def _ask(self, path: str) -> None:
        self._path = path
        self._heard = self._engine.heard
        self._chunks.clear()
        told = "" if path == "/health" else self._authorization
        head = f"GET {path} HTTP/1.1\r\nhost: {self._engine.authority.decode()}\r\n{told}\r\n".encode()
        self._timer = self._pool.loop.call_later(self._timeout, self._timed_out)
        self._call = self._pool.call(self._engine, head, self, counted=False)

    def _timed_out(self) -> None:
        if self._call is not None:
            self._call.abort()
        why = f"no_answer_within_{self._timeout:g}s"
        silent = self._engine.heard == self._heard
        self._down(why)
        if silent:
            # Not a byte, to anybody, for as long as a check may take: the process is stopped or cut off.
            self._fleet.mark(self._engine, False, why)
            self._pool.give_up(self._engine, StalledError(f"{self._engine.url} gives no answer, not even to /health"))

    def head(self, status: int, headers: Headers) -> None:
        """Take the status."""
        self._status = status

    def body(self, data: bytes) -> None:
        """Take a piece of the body."""
        self._chunks.append(data)

    def end(self) -> None:
        """Judge the answer."""
        if self._over is not None:
            self._again()  # it lives, which is all that still matters
        elif self._path != "/health":
            self._learn()
            following = _FACTS[self._path]
            if following:
                self._cancel_timer()
                self._ask(following)
            else:
                self._facts_due = self._pool.loop.time() + _FACTS_EVERY
                self._fleet.mark(self._engine, True, "health_200")
                self._again()
        elif self._status == 200:
            self._failures = 0
            # One that comes back may have become another: it is not chosen before it has told what it is.
            if not self._engine.healthy or self._pool.loop.time() >= self._facts_due:
                self._cancel_timer()
                self._ask("/v1/models")
            else:
                self._again()
        else:
            self._down(f"health_{self._status}")

    def failed(self, error: UpstreamError) -> None:
        """The engine did not answer, unless it is the router that failed: then nothing is known of the engine."""
        if isinstance(error, ExhaustedError | RouterFailureError):
            self._again()
        else:
            self._down(error.reason)

    def _learn(self) -> None:
        if self._status != 200:
            return
        engine, page = self._engine, b"".join(self._chunks)
        try:
            if self._path == "/v1/models":
                listed = orjson.loads(page)["data"]
                engine.models = {one["id"]: one.get("root") or one["id"] for one in listed}
                # Adapters come and go; what has no parent is the model itself.
                self._roots = sorted({engine.models[one["id"]] for one in listed if not one.get("parent")})
                engine.longest_context = min((int(one.get("max_model_len") or 0) for one in listed), default=0)
            elif self._path == "/version":
                engine.version = str(orjson.loads(page)["version"])
            else:
                engine.kv_tokens, engine.block_size = cache_size(page)
                self._group()
        except (orjson.JSONDecodeError, KeyError, TypeError, ValueError):
            _log.warning("engine=%s its %s is not what vLLM's is; less is checked for it", engine.url, self._path)

    def _group(self) -> None:
        engine = self._engine
        if engine.version and engine.block_size:
            facts = (f"vLLM {engine.version}", f"block size {engine.block_size}", *self._roots)
            self._fleet.grouped(engine, ", ".join(facts))

    def _down(self, why: str) -> None:
        self._again()  # first: no bug in those that hear of the mark may end the checks
        self._failures += 1
        # One lost check may be a busy engine; an engine that refuses connections is down.
        if self._over is None and (self._failures > 1 or why == "connect"):
            self._fleet.mark(self._engine, False, why)

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _again(self) -> None:
        self._call = None
        self._cancel_timer()
        delay = self._interval * random.uniform(0.9, 1.1)  # so that many routers do not ask in step
        self._timer = self._pool.loop.call_later(delay, self.start)


class Health:
    """Probes of all engines, as they come and go (`pdrouter.fleet.fleet.Watcher`)."""

    def __init__(self, fleet: Fleet, pool: Pool, interval: float, timeout: float, api_key: str | None = None) -> None:
        self._fleet = fleet
        self._pool = pool
        self._interval = interval
        self._timeout = timeout
        self._api_key = api_key
        self._probes: dict[Engine, Probe] = {}

    def joined(self, engine: Engine) -> None:
        """Ask it from now on."""
        probe = Probe(engine, self._fleet, self._pool, self._interval, self._timeout, self._api_key)
        self._probes[engine] = probe
        probe.start()

    def left(self, engine: Engine) -> None:
        """Ask it no more, but as long as it has calls under way."""
        if self._pool.open(engine):
            self._probes[engine].leave(self._probes.pop)
        else:
            self._probes.pop(engine).stop()

    def stop(self) -> None:
        """Stop asking."""
        for probe in self._probes.values():
            probe.stop()
