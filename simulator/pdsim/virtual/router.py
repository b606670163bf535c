"""The router in virtual time: the way of `pdrouter.handoff.pair`, with the router's own policies.

Policies see what they see in a router: its own counts at once, engines' metrics as old as they are, and an index of
what was sent where. How long an answer will be nobody knows.
"""

from collections import deque
from collections.abc import Sequence as Ordered

from pdrouter.policies import POLICIES, Bypassing, Commons, Learning, Policy, Timed
from pdsim.virtual.clock import Clock
from pdsim.virtual.engine import Engine, Sequence
from pdsim.virtual.workload import Asked

TYPICAL_OUTPUT = 256.0  # as `pdrouter.handoff.desk`
SMOOTH = 0.05


class Row:
    """An engine as the router knows it (`pdrouter.policies.choice.Candidate`)."""

    __slots__ = (
        "_clock", "engine", "held_tokens", "in_flight", "kv_tokens", "kv_usage", "name", "queued_tokens",
        "running", "scraped_at", "waiting",
    )  # fmt: skip

    def __init__(self, engine: Engine, kv_tokens: int, clock: Clock) -> None:
        self.engine = engine
        self.name = engine.name
        self.in_flight = self.queued_tokens = self.held_tokens = 0
        self.waiting = self.running = self.kv_usage = 0.0
        self.kv_tokens = kv_tokens
        self.scraped_at = float("-inf")
        self._clock = clock

    @property
    def metrics_age(self) -> float:
        """Seconds since its metrics were read."""
        return self._clock.now - self.scraped_at


class Journey:
    """One request under way and what it met."""

    __slots__ = (
        "alone", "arrived", "asked", "cached", "coming", "decode", "done", "fetched", "first", "held", "lacking",
        "met", "number", "prefill", "queued", "sent", "ticket",
    )  # fmt: skip

    def __init__(self, asked: Asked, number: int, arrived: float) -> None:
        self.asked = asked
        self.number = number
        self.arrived = arrived
        self.prefill: Row | None = None
        self.decode: Row | None = None
        self.sent = -1.0
        self.first = self.done = -1.0
        self.queued = self.held = self.coming = self.lacking = self.met = 0
        self.alone = False
        self.ticket = -1.0
        self.cached = self.fetched = 0


class Router:
    """Chooses engines and sends both legs. Hears of engines as their listener."""

    def __init__(self, clock: Clock, policies: tuple[str, str], seed: int, block_tokens: int, hop: float) -> None:
        """Prepare.

        Args:
            clock: virtual time.
            policies: the names of the prefill and of the decode policy.
            seed: of their random choices.
            block_tokens: tokens of a full block in the chains of requests.
            hop: seconds from the router to an engine or back, the router's own work included.
        """
        self.clock = clock
        self.prefills: Ordered[Row] = ()
        self.decodes: Ordered[Row] = ()
        self.journeys: list[Journey] = []
        self.parked: deque[Journey] = deque()
        self.bypassed = 0
        self._hop = hop
        commons = Commons(seed=seed, clock=clock, block_tokens=block_tokens)
        self._prefill = POLICIES[policies[0]]("prefill", commons)
        self._decode = POLICIES[policies[1]]("decode", commons)
        self._prefill_learns = self._prefill if isinstance(self._prefill, Learning) else None
        self._decode_learns = self._decode if isinstance(self._decode, Learning) else None
        same = type(self._prefill) is type(self._decode)
        self._bypass = self._decode if isinstance(self._decode, Bypassing) and same else None
        self._prefill_times = self._prefill if isinstance(self._prefill, Timed) else None
        self._decode_times = self._decode if isinstance(self._decode, Timed) else None
        self._late = not self._decode.uses_key and self._decode.name not in ("round_robin", "random")
        self._typical = TYPICAL_OUTPUT
        self.over = self._over

    def of(self, prefills: Ordered[Row], decodes: Ordered[Row]) -> None:
        """Take the engines."""
        self.prefills, self.decodes = prefills, decodes

    # --- choosing, as `pdrouter.handoff.desk`

    def _needs(self, asked: Asked) -> int:
        limit, typical = asked.max_tokens, int(self._typical)
        return asked.tokens + (min(limit, typical) if limit else typical)

    def _choose(self, policy: Policy, asked: Asked, rows: Ordered[Row], needed: int) -> Row:
        chosen = policy.choose(asked, rows)
        if chosen.kv_tokens and not self._has_room(chosen, needed):
            roomy = [row for row in rows if self._has_room(row, needed)]
            if roomy:
                chosen = policy.choose(asked, roomy)
        return chosen

    @staticmethod
    def _has_room(row: Row, needed: int) -> bool:
        held = row.held_tokens
        return held == 0 or held + needed <= row.kv_tokens

    # --- a request's way

    def arrive(self, now: float, asked: Asked, number: int) -> None:
        """Take a request."""
        journey = Journey(asked, number, now)
        self.journeys.append(journey)
        if self.parked or not self._start(now, journey):
            self.parked.append(journey)

    def _start(self, now: float, journey: Journey) -> bool:
        asked = journey.asked
        needed = self._needs(asked)
        decode = self._choose(self._decode, asked, self.decodes, needed)
        if not self._has_room(decode, needed):
            return False
        prefill = self._choose(self._prefill, asked, self.prefills, asked.tokens) if self.prefills else None
        if prefill is None or (self._bypass is not None and self._bypass.bypass(asked, prefill, decode)):
            self._alone(now, journey, decode, needed)
            return True
        journey.prefill, journey.decode = prefill, decode
        journey.coming = needed
        decode.held_tokens += needed
        uncached = asked.tokens
        learns = self._prefill_learns
        if learns is not None:
            uncached = learns.uncached(asked, prefill)
            learns.routed(asked, prefill)
        journey.queued = uncached
        journey.alone = not prefill.in_flight
        prefill.in_flight += 1
        prefill.held_tokens += asked.tokens
        prefill.queued_tokens += uncached
        journey.sent = now
        prefill.engine.submit(now + self._hop, Sequence(journey, asked.keys, asked.tokens, 1))
        return True

    def prefilled(self, now: float, sequence: Sequence) -> None:
        """The prefill engine has its answer, which the router has a little later."""
        self.clock.at(now + self.prefills[0].engine.profile.answer + self._hop, self._hand_over, sequence)

    def _hand_over(self, now: float, sequence: Sequence) -> None:
        journey: Journey = sequence.about
        asked, prefill, decode = journey.asked, journey.prefill, journey.decode
        assert prefill is not None
        assert decode is not None
        prefill.in_flight -= 1
        prefill.held_tokens -= asked.tokens
        prefill.queued_tokens -= journey.queued
        journey.cached = sequence.cached
        journey.ticket = now
        if journey.alone and self._prefill_times is not None:
            self._prefill_times.prefilled(journey.queued, now - journey.sent)
        decode.held_tokens -= journey.coming
        if self._late:
            decode = journey.decode = self._choose(self._decode, asked, self.decodes, self._needs(asked))
        if self._decode_learns is not None:
            journey.lacking = self._decode_learns.uncached(asked, decode)
            self._decode_learns.routed(asked, decode)
        self._send(now, journey, decode, self._needs(asked), (prefill.engine, sequence))

    def _alone(self, now: float, journey: Journey, decode: Row, needed: int) -> None:
        """Let decode compute the prompt too."""
        journey.prefill, journey.decode = None, decode
        uncached = journey.asked.tokens
        if self._decode_learns is not None:
            uncached = self._decode_learns.uncached(journey.asked, decode)
            self._decode_learns.routed(journey.asked, decode)
        journey.queued = uncached
        decode.queued_tokens += uncached
        journey.sent = now
        self.bypassed += 1
        self._send(now, journey, decode, needed, None)

    def _send(
        self, now: float, journey: Journey, decode: Row, held: int, source: tuple[Engine, Sequence] | None
    ) -> None:
        asked = journey.asked
        journey.held = held
        decode.in_flight += 1
        decode.held_tokens += held
        decode.engine.submit(now + self._hop, Sequence(journey, asked.keys, asked.tokens, asked.output, source))

    def began(self, now: float, sequence: Sequence) -> None:
        """The first token will be at the router at `sequence.first` and the way back."""
        journey: Journey = sequence.about
        journey.first = sequence.first + self._hop
        assert journey.decode is not None
        journey.met = journey.decode.held_tokens
        if journey.prefill is None:
            journey.cached = sequence.cached
            self.clock.at(journey.first, self._computed, journey)
        elif self._decode_times is not None:
            self._decode_times.handed_over(journey.lacking, journey.first - journey.ticket)

    def _computed(self, now: float, journey: Journey) -> None:
        assert journey.decode is not None
        journey.decode.queued_tokens -= journey.queued

    def fetched(self, now: float, sequence: Sequence, blocks: int) -> None:
        """KV has moved."""
        sequence.about.fetched = blocks

    def decoded(self, now: float, sequence: Sequence) -> None:
        """The last token is on its way."""
        self.clock.at(now + self._hop, self.over, sequence.about)

    def _over(self, now: float, journey: Journey) -> None:
        journey.done = now
        decode = journey.decode
        assert decode is not None
        decode.in_flight -= 1
        decode.held_tokens -= journey.held
        if self._decode_times is not None:
            held = (journey.met + decode.held_tokens) / 2
            self._decode_times.generated(held, journey.asked.output, now - journey.first)
        self._typical += SMOOTH * (journey.asked.output - self._typical)
        while self.parked and self._start(now, self.parked[0]):
            self.parked.popleft()
