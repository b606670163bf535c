"""Whether engines answer: `GET /health` about once a second, and now and then which models they serve.

A failed connection of a real request marks an engine down at once (`Fleet.mark`); only a successful check here marks
it up again.
"""

import asyncio
import logging
import random

import orjson

from pdrouter.fleet.engine import Engine
from pdrouter.fleet.fleet import Fleet
from pdrouter.upstream.connection import Headers
from pdrouter.upstream.errors import UpstreamError
from pdrouter.upstream.pool import Call, Pool

_log = logging.getLogger(__name__)
_MODELS_EVERY = 30.0


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
        self._models_due = 0.0
        self._asks_models = False
        self._status = 0
        self._chunks: list[bytes] = []
        self._call: Call | None = None
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Ask now."""
        self._ask("/health")

    def stop(self) -> None:
        """Ask no more."""
        if self._timer is not None:
            self._timer.cancel()
        if self._call is not None:
            self._call.abort()

    def _ask(self, path: str) -> None:
        self._asks_models = path != "/health"
        self._chunks.clear()
        told = self._authorization if self._asks_models else ""
        head = f"GET {path} HTTP/1.1\r\nhost: {self._engine.authority.decode()}\r\n{told}\r\n".encode()
        self._timer = self._pool.loop.call_later(self._timeout, self._timed_out)
        self._call = self._pool.call(self._engine, head, self, counted=False)

    def _timed_out(self) -> None:
        if self._call is not None:
            self._call.abort()
        self._down(f"no_answer_within_{self._timeout:g}s")

    def head(self, status: int, headers: Headers) -> None:
        """Take the status."""
        self._status = status

    def body(self, data: bytes) -> None:
        """Take a piece of the body."""
        self._chunks.append(data)

    def end(self) -> None:
        """Judge the answer."""
        if self._asks_models:
            self._learn_models()
            self._again()
        elif self._status == 200:
            self._failures = 0
            back = not self._engine.healthy
            self._fleet.mark(self._engine, True, "health_200")
            if back or self._pool.loop.time() >= self._models_due:
                self._cancel_timer()
                self._ask("/v1/models")
            else:
                self._again()
        else:
            self._down(f"health_{self._status}")

    def failed(self, error: UpstreamError) -> None:
        """The engine did not answer."""
        self._down(error.reason)

    def _learn_models(self) -> None:
        if self._status != 200:
            return
        try:
            listed = orjson.loads(b"".join(self._chunks))["data"]
            self._engine.models = {one["id"]: one.get("root") or one["id"] for one in listed}
        except (orjson.JSONDecodeError, KeyError, TypeError):
            _log.warning(
                "engine=%s its /v1/models is not what OpenAI's is; model checks use names only", self._engine.url
            )
        self._models_due = self._pool.loop.time() + _MODELS_EVERY

    def _down(self, why: str) -> None:
        self._failures += 1
        # One lost check may be a busy engine; an engine that refuses connections is down.
        if self._failures > 1 or why == "connect":
            self._fleet.mark(self._engine, False, why)
        self._again()

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
        """Ask it no more."""
        self._probes.pop(engine).stop()

    def stop(self) -> None:
        """Stop asking."""
        for probe in self._probes.values():
            probe.stop()
