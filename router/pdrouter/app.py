"""The router process: put the parts together, serve, end in good order."""

import asyncio
import gc
import logging
import signal
import sys

import uvloop

from pdrouter.fleet.engine import Role
from pdrouter.fleet.fleet import Fleet
from pdrouter.fleet.health import Health
from pdrouter.fleet.scrape import Scrape
from pdrouter.handoff.desk import Desk
from pdrouter.observe.log import RequestLog, set_up
from pdrouter.observe.metrics import Metrics, Observer
from pdrouter.policies import POLICIES, READ_METRICS, Commons
from pdrouter.server.limits import Limits
from pdrouter.server.listener import Listener, ListenError
from pdrouter.server.routes import MetricsRoutes, Routes
from pdrouter.settings import Settings, SettingsError, exit_with, load
from pdrouter.upstream.pool import Pool

_log = logging.getLogger(__name__)
_HEALTH_TIMEOUT = 3.0


class Router:
    """All parts of one router process."""

    def __init__(self, settings: Settings) -> None:
        loop = asyncio.get_running_loop()
        self._settings = settings
        self.fleet = Fleet(loop)
        self.pool = Pool(loop, settings.connect_timeout_secs)
        self.metrics = Metrics(self.fleet)
        self._requests = RequestLog(loop, settings.log_level in ("debug", "info"))
        commons = Commons(seed=settings.seed)
        policies = {
            Role.PREFILL: POLICIES[settings.prefill_policy or settings.policy]("prefill", commons),
            Role.DECODE: POLICIES[settings.decode_policy or settings.policy]("decode", commons),
        }
        self.desk = Desk(
            loop,
            self.fleet,
            self.pool,
            policies,
            Observer(self.metrics, self._requests),
            settings.kv_lease_seconds,
            settings.request_timeout_secs,
        )
        self._health = Health(self.fleet, self.pool, settings.health_interval_secs, _HEALTH_TIMEOUT, settings.api_key)
        self._scrape = Scrape(self.pool, settings.scrape_interval_secs)
        self._scrapes = settings.scrape_interval_secs > 0 and any(one.name in READ_METRICS for one in policies.values())
        limits = Limits(body=settings.max_payload_size)
        routes = Routes(self.desk, settings.api_key, lambda: self.public.draining)
        self.public = Listener(routes.handle, limits, routes.refused)
        self.scraped = Listener(MetricsRoutes(self.metrics.page).handle, Limits(body=0))

    async def start(self) -> None:
        """Listen and look for engines.

        Raises:
            ListenError: a port is taken.
        """
        settings = self._settings
        await self.public.listen(settings.host, settings.port, "--port")
        await self.scraped.listen(settings.prometheus_host, settings.prometheus_port, "--prometheus-port")
        self.fleet.watch(self.desk)
        self.fleet.watch(self._health)
        if self._scrapes:
            self.fleet.watch(self._scrape)
        self.fleet.report("command line", settings.found())

    async def stop(self) -> None:
        """Let requests finish, then close everything."""
        cut = await self.public.drain(self._settings.drain_timeout_secs)
        if cut:
            _log.warning("cut=%d connections were still open after the drain timeout", cut)
        await self.scraped.drain(0)
        self._health.stop()
        self._scrape.stop()
        self.pool.close()
        self._requests.flush()


async def serve(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT, then drain.

    Raises:
        ListenError: a port is taken.
    """
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ended.set)
    router = Router(settings)
    await router.start()
    # Requests leave no cycles behind, so a collection finds nothing and only costs: look seldom, and never again at
    # what lives as long as the process.
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)
    _log.info(
        "listening=%s:%d metrics=%s:%d prefill=%d decode=%d policy=%s",
        settings.host, settings.port, settings.prometheus_host, settings.prometheus_port,
        len(settings.prefill), len(settings.decode), settings.policy,
    )  # fmt: skip
    await ended.wait()
    _log.info("draining=%gs", settings.drain_timeout_secs)
    await router.stop()


def main() -> None:
    """Run the router (console script `pd-router`)."""
    try:
        settings = load(sys.argv[1:])
    except SettingsError as error:
        exit_with(f"error: {error}", 2)
    set_up(settings.log_level)
    try:
        uvloop.run(serve(settings))
    except ListenError as error:
        exit_with(str(error), 1)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
