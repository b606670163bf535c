"""The router process: put the parts together, serve, end in good order."""

import asyncio
import ctypes
import gc
import logging
import resource
import secrets
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter

import uvloop

from pdrouter.discovery.found import Source
from pdrouter.discovery.sources import DiscoveryError, sources
from pdrouter.fleet.engine import Role
from pdrouter.fleet.fleet import Fleet
from pdrouter.fleet.health import Health
from pdrouter.fleet.rows import Rows
from pdrouter.fleet.scrape import Scrape
from pdrouter.fleet.stall import Stall
from pdrouter.handoff.admission import Admission
from pdrouter.handoff.canary import Canary
from pdrouter.handoff.desk import Desk, Rules
from pdrouter.handoff.overdue import Overdue
from pdrouter.observe import described
from pdrouter.observe.decisions import Decisions
from pdrouter.observe.described import Described
from pdrouter.observe.log import RequestLog, set_up
from pdrouter.observe.metrics import Metrics, Observer, State, page
from pdrouter.observe.recorder import Recorder, RecorderError
from pdrouter.observe.traces import Traces, TracesError
from pdrouter.policies import POLICIES, READ_METRICS, Commons
from pdrouter.server.admin import AdminRoutes
from pdrouter.server.limits import Limits
from pdrouter.server.listener import Listener, ListenError
from pdrouter.server.routes import MetricsRoutes, Routes
from pdrouter.server.tls import Certificate, CertificateError
from pdrouter.settings import Settings, SettingsError, exit_with, load
from pdrouter.upstream.pool import Pool
from pdrouter.workers import Siblings, Worker, Workers

_log = logging.getLogger(__name__)
_HEALTH_TIMEOUT = 3.0
_SALT = secrets.token_bytes(16)  # of recordings; drawn before workers are forked, so that theirs fit together
_BEGAN = perf_counter()
_ADMIN_BODY = 65536
_PR_SET_PDEATHSIG = 1


class Router:
    """All parts of one router process."""

    def __init__(self, settings: Settings, worker: Worker | None = None) -> None:
        """Prepare.

        Args:
            settings: what to do.
            worker: which of several processes this is; None when it is the only one.

        Raises:
            CertificateError: TLS is asked for and cannot be.
            TracesError: traces are asked for and cannot be.
            RecorderError: a recording is asked for and cannot be.
            DiscoveryError: engines are to be found where they cannot be looked for.
        """
        loop = asyncio.get_running_loop()
        self._settings = settings
        self._loop = loop
        self.fleet = Fleet(loop)
        commons = Commons(seed=settings.seed, workers=worker.table.workers if worker is not None else 1)
        policies = {
            Role.PREFILL: POLICIES[settings.prefill_policy or settings.policy]("prefill", commons),
            Role.DECODE: POLICIES[settings.decode_policy or settings.policy]("decode", commons),
        }
        scrapes = settings.scrape_interval_secs > 0 and any(one.name in READ_METRICS for one in policies.values())
        first = worker is None or worker.number == 0
        self.rows = Rows(loop, worker.table, worker.number, first) if worker is not None else None
        self.pool = Pool(loop, settings.connect_timeout_secs, rows=self.rows)
        self._sources: list[Source] = sources(settings, self.fleet.report)
        self.metrics = Metrics(self.fleet, self._gauges)
        self._requests = RequestLog(loop, settings.log_level in ("debug", "info"), settings.log_format)
        self.admission = Admission(
            loop, settings.max_concurrent_requests, settings.queue_size, settings.queue_timeout_secs
        )
        decisions = Decisions(settings.debug_routing) if settings.debug_routing else None
        self._recorder = _recorder(settings, worker)
        self._traces = Traces(settings.otel_endpoint) if settings.otel_endpoint else None
        self.desk = Desk(
            loop, self.fleet, self.pool, policies, Observer(self.metrics, self._requests, self._recorder), decisions,
            self._traces,
            self.admission, _rules(settings),
        )  # fmt: skip
        authorization = f"authorization: Bearer {settings.api_key}\r\n".encode() if settings.api_key else b""
        self._canary = Canary(self.desk, settings.canary_interval_secs, authorization)
        self._stall = Stall(loop, self.fleet, self.pool, settings.stall_timeout_secs)
        self._overdue = Overdue(loop, self.pool, settings.kv_lease_seconds)
        self._health = Health(self.fleet, self.pool, settings.health_interval_secs, _HEALTH_TIMEOUT, settings.api_key)
        self._scrape = Scrape(self.pool, settings.scrape_interval_secs, self.rows) if scrapes and first else None
        self._certificate = None
        if settings.tls_cert_file and settings.tls_key_file:
            self._certificate = Certificate(settings.tls_cert_file, settings.tls_key_file)
        routes = Routes(self.desk, settings, lambda: self.public.draining)
        admin = AdminRoutes(self.fleet, self.desk.edges, decisions, self._tell, self._recorder)
        self._siblings = Siblings(worker, self.metrics.state, admin.change) if worker is not None else None
        self.public = Listener(routes.handle, self._limits(), routes.refused, routes.unwelcome)
        self.scraped = Listener(MetricsRoutes(self._page).handle, Limits(body=0))
        self.admin = Listener(admin.handle, Limits(body=_ADMIN_BODY))

    def _limits(self) -> Limits:
        files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        told = self._settings.limits()
        limits = told.within(files, self._settings.max_concurrent_requests)
        if limits is not told:
            _log.info(
                "max_connections=%d as files=%d may be open, asked=%d", limits.connections, files, told.connections
            )
        return limits

    def _gauges(self) -> Iterator[tuple[Described, tuple[str, ...], float]]:
        yield described.RUNNING, (), self.admission.running
        yield described.QUEUED, (), self.admission.waiting
        desk = self.desk
        yield described.WAITING, ("prefill",), desk.waiting.count(Role.PREFILL)
        yield described.WAITING, ("decode",), desk.waiting.count(Role.DECODE)
        yield described.WAITING, ("room",), desk.waiting.count(None)
        yield described.RETRIES, ("spent",), desk.retries.spent
        yield described.RETRIES, ("refused",), desk.retries.refused
        yield described.HEDGED, (), desk.hedged
        for engine in self.fleet.engines[Role.PREFILL]:
            held, handed = desk.ledger.tickets(engine)
            yield described.TICKETS, (engine.url, "held"), held
            yield described.TICKETS, (engine.url, "handed"), handed
        for (url, cause), count in desk.ledger.ended.items():
            yield described.TICKETS_ENDED, (url, cause.value), count
        for edge in desk.edges:
            ends = (edge.prefill.url, edge.decode.url)
            yield described.EDGE_HANDOFFS, ends, edge.handoffs
            yield described.EDGE_SECONDS, ends, edge.seconds
            yield described.EDGE_CLOSED, ends, int(edge.closed)
        for outcome, count in self._canary.outcomes.items():
            yield described.CANARIES, (outcome,), count
        for ends in self._canary.differing():
            yield described.CANARY_DIFFERS, ends, 1
        for source in self._sources:
            yield described.SOURCE_AGE, (source.name,), source.age

    def _tell(self, what: str, told: dict[str, object]) -> None:
        if self._siblings is not None:
            self._siblings.tell(what, told)

    async def _page(self) -> bytes:
        states: list[State] = [self.metrics.state()] if self._siblings is None else await self._siblings.states()
        return page(states)

    async def start(self) -> None:
        """Listen and look for engines.

        Raises:
            ListenError: a port is taken.
        """
        settings = self._settings
        shared = settings.share_ports or self._siblings is not None
        tls = None
        if self._certificate is not None:
            tls = self._certificate.context
            self._certificate.follow(self._loop)
        await self.public.listen(settings.host, settings.port, "--port", shared=shared, tls=tls)
        await self.scraped.listen(
            settings.prometheus_host, settings.prometheus_port, "--prometheus-port", shared=shared
        )
        if settings.admin_port is not None:
            await self.admin.listen(settings.admin_host, settings.admin_port, "--admin-port", shared=shared)
        if self._siblings is not None:
            await self._siblings.listen()
        self.fleet.watch(self.desk)
        self.fleet.listen(self.desk)
        self.fleet.on_choice = self.desk.waiting.wake
        if self.rows is not None:
            self.fleet.watch(self.rows)
        self.fleet.watch(self._health)
        if self._scrape is not None:
            self.fleet.watch(self._scrape)
        self._canary.start()
        self.fleet.report("command line", settings.found())
        for source in self._sources:
            source.start()

    async def stop(self) -> None:
        """Let requests finish, then close everything."""
        cut = await self.public.drain(self._settings.drain_timeout_secs)
        if cut:
            _log.warning("cut=%d connections were still open after the drain timeout", cut)
        await self.scraped.drain(0)
        await self.admin.drain(0)
        for source in self._sources:
            await source.stop()
        if self._siblings is not None:
            self._siblings.close()
        if self._certificate is not None:
            self._certificate.close()
        self._health.stop()
        self._stall.close()
        self._overdue.close()
        self._canary.close()
        if self._scrape is not None:
            self._scrape.stop()
        self.desk.deadlines.close()
        self.admission.deadlines.close()
        self.pool.close()
        self._requests.flush()
        if self._recorder is not None:
            self._recorder.close()
        if self._traces is not None:
            await asyncio.to_thread(self._traces.close)


def _recorder(settings: Settings, worker: Worker | None) -> Recorder | None:
    if settings.record_dir is None:
        return None
    number = 0 if worker is None else worker.number
    return Recorder(Path(settings.record_dir), settings.record_max_bytes // settings.workers, _SALT, number, _BEGAN)


def _rules(settings: Settings) -> Rules:
    return Rules(
        lease=settings.kv_lease_seconds, request_timeout=settings.request_timeout_secs,
        queue_size=settings.queue_size, queue_timeout=settings.queue_timeout_secs,
        continues=settings.continue_streams, decode_only=settings.decode_only,
        hedge=settings.hedge_prefill_secs, api_key=settings.api_key,
    )  # fmt: skip


async def serve(settings: Settings, worker: Worker | None = None) -> None:
    """Serve until SIGTERM or SIGINT, then drain.

    Raises:
        ListenError: a port is taken.
        CertificateError: TLS is asked for and cannot be.
        TracesError: traces are asked for and cannot be.
        DiscoveryError: engines are to be found where they cannot be looked for.
    """
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ended.set)
    router = Router(settings, worker)
    await router.start()
    # Requests leave no cycles behind, so a collection finds nothing and only costs: look seldom, and never again at
    # what lives as long as the process.
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)
    _log.info(
        "listening=%s:%d metrics=%s:%d worker=%d/%d prefill=%d decode=%d policy=%s",
        settings.host, settings.port, settings.prometheus_host, settings.prometheus_port,
        worker.number + 1 if worker else 1, settings.workers, len(settings.prefill), len(settings.decode),
        settings.policy,
    )  # fmt: skip
    await ended.wait()
    _log.info("draining=%gs", settings.drain_timeout_secs)
    await router.stop()


def _serve(settings: Settings, worker: Worker | None = None) -> None:
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    try:
        uvloop.run(serve(settings, worker))
    except (ListenError, CertificateError, DiscoveryError, RecorderError, TracesError) as error:
        exit_with(str(error), 1)
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def _serve_one_of(settings: Settings, worker: Worker) -> None:
    # A worker without the process that started it would serve on unseen.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    _serve(settings, worker)


def main() -> None:
    """Run the router (console script `pd-router`)."""
    try:
        settings = load(sys.argv[1:])
    except SettingsError as error:
        exit_with(f"error: {error}", 2)
    set_up(settings.log_level, settings.log_format)
    if settings.workers == 1:
        _serve(settings)
        return
    ports = [
        (settings.host, settings.port, "--port"),
        (settings.prometheus_host, settings.prometheus_port, "--prometheus-port"),
    ]
    if settings.admin_port is not None:
        ports.append((settings.admin_host, settings.admin_port, "--admin-port"))
    Workers(settings.workers, ports, lambda worker: _serve_one_of(settings, worker), settings.share_ports).run()
