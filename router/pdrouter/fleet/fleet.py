"""All engines, and which of them may be chosen."""

import asyncio
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from math import inf
from time import monotonic
from typing import Protocol

from pdrouter.discovery.found import Found
from pdrouter.fleet.breaker import Breaker
from pdrouter.fleet.engine import Engine, Role

_log = logging.getLogger(__name__)
BY_HAND = "by hand"
BLAMED_SECONDS = 5.0  # for which an engine's failures are load after the last one: a breaker's first pause


class Watcher(Protocol):
    """Hears which engines there are."""

    def joined(self, engine: Engine) -> None:
        """An engine is new, or came back under its name at another address."""

    def left(self, engine: Engine) -> None:
        """An engine is gone; what it was given before may still end."""


class Audience(Protocol):
    """Hears how engines are."""

    def turned(self, engine: Engine) -> None:
        """An engine began or ceased to answer."""


def _each_place_once(wanted: dict[tuple[Role, str], Found]) -> dict[tuple[Role, str], Found]:
    """Leave out all but one name of an engine that sources call differently.

    A name that was found is better than the URL, for it outlives a restart; and of two lives at one address the one
    that goes on. All workers must come to the same, whichever source they heard first.
    """
    best: dict[tuple[Role, str], Found] = {}
    for one in wanted.values():
        place = one.role, one.url
        other = best.get(place)
        if other is None or _worth(one) < _worth(other):
            best[place] = one
    return {key: one for key, one in wanted.items() if best[one.role, one.url] is one}


def _worth(one: Found) -> tuple[bool, bool, str]:
    return one.name == one.url, one.terminating, one.name


class Fleet:
    """The engines of both roles, as their sources report them.

    A source (the command line, DNS, EndpointSlices, an administrator) reports its complete set; an engine that several
    report is one engine, under whatever names they know it. An engine that leaves or is terminating gets nothing new
    and finishes what it has.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.engines: dict[Role, tuple[Engine, ...]] = {Role.PREFILL: (), Role.DECODE: ()}
        self._loop = loop
        self._healthy: dict[Role, tuple[Engine, ...]] = {Role.PREFILL: (), Role.DECODE: ()}
        self._reports: dict[str, tuple[Found, ...]] = {}
        self._refused: set[str] = set()
        self._breakers: dict[Engine, Breaker] = {}
        self._watchers: list[Watcher] = []
        self._audience: list[Audience] = []
        self.mixed = False
        self.on_choice: Callable[[], object] | None = None

    def __iter__(self) -> Iterator[Engine]:
        yield from self.engines[Role.PREFILL]
        yield from self.engines[Role.DECODE]

    def watch(self, watcher: Watcher) -> None:
        """Tell of every engine there is, and of each that joins or leaves from now on."""
        self._watchers.append(watcher)
        for engine in self:
            watcher.joined(engine)

    def listen(self, audience: Audience) -> None:
        """Tell of every engine that begins or ceases to answer."""
        self._audience.append(audience)

    # membership

    def report(self, source: str, found: Iterable[Found]) -> None:
        """Take the complete set that a source finds now."""
        self._reports[source] = tuple(found)
        by_hand = self._reports.get(BY_HAND)
        if by_hand:
            # What a source finds is the source's: it must not stay when the source finds it no more.
            others = [found for source, found in self._reports.items() if source != BY_HAND]
            theirs = {(one.role, one.url) for found in others for one in found}
            self._reports[BY_HAND] = tuple(one for one in by_hand if (one.role, one.url) not in theirs)
        self._reconcile()

    def add(self, one: Found) -> None:
        """Add an engine by hand; where a source finds it, that only takes back that it was removed."""
        self._refused.discard(one.url)
        others = [other for other in self._reports.get(BY_HAND, ()) if other.url != one.url]
        self.report(BY_HAND, (*others, one))

    def remove(self, url: str) -> bool:
        """Remove an engine by hand, whoever reports it; tell whether there was one."""
        known = any(engine.url == url for engine in self)
        self._refused.add(url)
        self.report(BY_HAND, tuple(one for one in self._reports.get(BY_HAND, ()) if one.url != url))
        return known

    def _reconcile(self) -> None:
        wanted: dict[tuple[Role, str], Found] = {}
        for found in self._reports.values():
            for one in found:
                if one.url not in self._refused:
                    wanted.setdefault((one.role, one.name), one)
        wanted = _each_place_once(wanted)
        held = {(engine.role, engine.name): engine for engine in self}
        gone = [engine for key, engine in held.items() if key not in wanted or wanted[key].url != engine.url]
        come = []
        for key, one in wanted.items():
            engine = held.get(key)
            if engine is None or engine.url != one.url:
                engine = held[key] = Engine(one.url, one.role, one.name)
                come.append(engine)
            if engine.leaving != one.terminating:
                engine.leaving = one.terminating
                _log.info("engine=%s role=%s leaving=%s", engine.url, engine.role, str(engine.leaving).lower())
        for role in Role:
            self.engines[role] = tuple(held[key] for key in wanted if key[0] is role)
        for engine in gone:
            engine.gone = True
            self._breakers.pop(engine).close()
        for engine in come:
            self._breakers[engine] = Breaker(self._loop, partial(self._breaker_turned, engine))
        self._look_for_groups()
        for engine in gone:
            _log.info("engine=%s role=%s left", engine.url, engine.role)
            for watcher in self._watchers:
                watcher.left(engine)
        for engine in come:
            for watcher in self._watchers:
                watcher.joined(engine)
        self._choose_from()

    # health

    def healthy(self, role: Role) -> Sequence[Engine]:
        """Give the engines of a role that may be chosen: the same object until one changes, so rings can be kept."""
        return self._healthy[role]

    def ready(self) -> bool:
        """Whether a request could be served by a pair."""
        return bool(self._healthy[Role.PREFILL] and self._healthy[Role.DECODE])

    def tripped(self, engine: Engine) -> bool:
        """Whether the engine failed too many requests in a row and is left alone for a while."""
        breaker = self._breakers.get(engine)
        return breaker is not None and breaker.open

    def mark(self, engine: Engine, healthy: bool, why: str) -> None:
        """Record that an engine answers or does not; a change is logged with its reason."""
        if engine.healthy == healthy:
            return
        engine.healthy = healthy
        if healthy:
            engine.failures = 0  # what failed while it went down says nothing of how it is now
        level = logging.INFO if healthy else logging.WARNING
        _log.log(level, "engine=%s role=%s healthy=%s why=%s", engine.url, engine.role, str(healthy).lower(), why)
        for one in self._audience:
            one.turned(engine)
        self._choose_from()

    def succeeded(self, engine: Engine) -> None:
        """Record that a leg of a request ended well."""
        engine.answered += 1
        engine.failures = 0
        breaker = self._breakers.get(engine)
        if breaker is not None:  # one on trial must hear of it although the engine has no failures since it came back
            breaker.succeeded()

    def ended(self, engine: Engine, status: int) -> None:
        """Record how an engine answered; a 4xx is the client's fault and says that the engine works."""
        if status >= 500:
            self.failed(engine, f"status_{status}")
        else:
            self.succeeded(engine)

    def failed(self, engine: Engine, why: str) -> None:
        """Record that a leg failed by the engine's fault: a 5xx, a cut connection, an answer that is none."""
        breaker = self._blame(engine)
        if breaker is not None:
            breaker.failed(engine.failures, f"{engine.url} role={engine.role} why={why}")

    def stalled(self, engine: Engine) -> None:
        """Record that an engine is silent although it has requests: it is left alone for a while."""
        breaker = self._blame(engine)
        if breaker is not None:
            breaker.trip(f"{engine.url} role={engine.role} why=stalled")

    def _blame(self, engine: Engine) -> Breaker | None:
        engine.failures += 1
        engine.failed += 1
        engine.blamed_until = monotonic() + BLAMED_SECONDS
        return self._breakers.get(engine)

    def _breaker_turned(self, engine: Engine) -> None:
        if not self.tripped(engine):
            # It is to be tried, which policies that go by load would not do. The failures stay counted: where every
            # engine fails, an engine's next failure must not seem to be the first (`pdrouter.handoff.edges`).
            engine.blamed_until = -inf
        self._choose_from()

    def may_serve(self, engine: Engine) -> bool:
        """Whether an engine is among those that may be chosen."""
        return engine in self._healthy[engine.role]

    # who may exchange KV blocks with whom

    def grouped(self, engine: Engine, group: str) -> None:
        """Record what an engine's blocks are like: vLLM's version, block size and so on; empty when unknown."""
        if engine.group == group:
            return
        engine.group = group
        self._look_for_groups()

    def _look_for_groups(self) -> None:
        groups = {engine.group for engine in self if engine.group}
        mixed = len(groups) > 1
        if mixed and not self.mixed:
            _log.warning(
                "groups=%d engines of different kinds are not paired: %s", len(groups), "; ".join(sorted(groups))
            )
        self.mixed = mixed

    @staticmethod
    def compatible(prefill: Engine, decode: Engine) -> bool:
        """Whether two engines' KV blocks are alike, as far as is known."""
        return prefill.group == decode.group or not prefill.group or not decode.group

    def _choose_from(self) -> None:
        for role in Role:
            answering = tuple(one for one in self.engines[role] if one.healthy and not one.leaving)
            # With every breaker open, engines that fail are better than none.
            candidates = tuple(one for one in answering if not self.tripped(one)) or answering
            if candidates != self._healthy[role]:
                self._healthy[role] = candidates
        if self.on_choice is not None:
            self.on_choice()
