"""What all handoffs share: the fleet, the policies, the connections, the limits."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from pdrouter.deadlines import Deadlines
from pdrouter.fleet.engine import Engine, Role
from pdrouter.fleet.fleet import Fleet
from pdrouter.handoff.admission import Admission
from pdrouter.handoff.edges import Edges
from pdrouter.handoff.ledger import Ledger
from pdrouter.handoff.legs import Greeting
from pdrouter.handoff.release import Release
from pdrouter.handoff.retries import RetryBudget
from pdrouter.handoff.ticket import Ticket
from pdrouter.handoff.waiting import Parked, Waiting
from pdrouter.observe.decisions import Decisions
from pdrouter.observe.metrics import Observer
from pdrouter.observe.traces import Traces
from pdrouter.openai.features import Prompt
from pdrouter.openai.generated import generated_text
from pdrouter.policies import Bypassing, Learning, Policy, RoutingKey, Scoring, Timed
from pdrouter.upstream.errors import (
    ConnectError,
    ExhaustedError,
    RouterFailureError,
    UpstreamError,
    VanishedError,
)
from pdrouter.upstream.pool import Call, Pool

_BACK_OFF = (0.0, 0.05, 0.2, 0.5)  # seconds before a request is tried again
_GREETING = 1.0  # seconds that an engine has for a sign of life
_TYPICAL_OUTPUT = 256.0  # tokens, until answers have told better
_SMOOTH = 0.05


def decode_by_load(policy: Policy) -> bool:
    """Whether a policy's choice depends on the engines' load, so that it should be made as late as possible."""
    return not policy.uses_key and policy.name not in ("round_robin", "random")


@dataclass(frozen=True)
class Rules:
    """How failures are dealt with. Times are seconds.

    Args:
        lease: the prefill engines' `kv_lease_duration`.
        request_timeout: what a request may take in all.
        queue_size: requests that may wait for an engine or for room.
        queue_timeout: how long each may.
        continues: whether streams go on elsewhere when their engine fails.
        decode_only: whether decode computes prompts when there is no prefill engine, or leases end too soon.
        hedge: after which time without prefill's answer another engine is asked too; 0 never.
        api_key: what engines want to see.
    """

    lease: float
    request_timeout: float
    queue_size: int
    queue_timeout: float
    continues: bool
    decode_only: bool
    hedge: float
    api_key: str | None


class Desk:
    """Shared by all requests of one router process."""

    __slots__ = (
        "_bypassing", "_learning", "_reasons", "_scoring", "_typical", "admission", "chooses_late", "continues",
        "deadlines", "decisions", "decode_only", "edges", "fleet", "hedged", "hedging", "lease", "ledger", "loop",
        "observer", "policies", "pool", "queue_timeout", "release", "retries", "times", "traces", "waiting",
    )  # fmt: skip

    def __init__(
        self, loop: asyncio.AbstractEventLoop, fleet: Fleet, pool: Pool, policies: dict[Role, Policy],
        observer: Observer, decisions: Decisions | None, traces: Traces | None, admission: Admission, rules: Rules,
    ) -> None:  # fmt: skip
        self.loop = loop
        self.fleet = fleet
        self.pool = pool
        self.policies = policies
        self.observer = observer
        self.decisions = decisions
        self.traces = traces
        self.admission = admission
        self.lease = rules.lease
        self.queue_timeout = rules.queue_timeout
        self.continues = rules.continues
        self.decode_only = rules.decode_only
        self.deadlines = Deadlines(loop, rules.request_timeout)
        self.hedging = Deadlines(loop, rules.hedge) if rules.hedge else None
        self.hedged = 0
        self.edges = Edges(loop)
        self.ledger = Ledger(loop, rules.lease, pool.rows)
        self.retries = RetryBudget(loop)
        self.waiting = Waiting(loop, rules.queue_size, rules.queue_timeout)
        self.release = Release(fleet, pool, self.ledger, self.edges, rules.api_key)
        self._typical = _TYPICAL_OUTPUT
        self._reasons: dict[str, str] = {}
        self._learning = {role: policy for role, policy in policies.items() if isinstance(policy, Learning)}
        prefill, decode = policies[Role.PREFILL], policies[Role.DECODE]
        self._scoring = {role: policy for role, policy in policies.items() if isinstance(policy, Scoring)}
        self.times = {role: policy for role, policy in policies.items() if isinstance(policy, Timed)}
        self.chooses_late = decode_by_load(policies[Role.DECODE])
        # One policy must have chosen both: it compares what it knows of the one engine with what it knows of the other.
        self._bypassing = decode if isinstance(decode, Bypassing) and type(prefill) is type(decode) else None

    # choosing

    def choose(
        self, role: Role, asked: Prompt, refused: Sequence[Engine] = (), prefill: Engine | None = None,
        closed: bool = False,
    ) -> Engine | None:  # fmt: skip
        """Choose a healthy engine, or None when there is none.

        An engine without room for the request is only chosen when all are (`has_room`).

        Args:
            role: what it is for.
            asked: the request.
            refused: engines not to be chosen.
            prefill: the other end of the handoff; its way to the chosen engine must be open.
            closed: whether it may be closed too, as long as the engines are of one kind.
        """
        if self.pool.rows is not None:
            self.pool.rows.refresh()
        candidates = self.fleet.healthy(role)
        if refused or prefill is not None:
            fits = self.fleet.compatible if closed else self.fits
            candidates = [
                engine for engine in candidates
                if engine not in refused and (prefill is None or fits(prefill, engine))
            ]  # fmt: skip
        return self._roomy(role, asked, candidates) if candidates else None

    def ends(self, asked: Prompt, refused: Sequence[Engine], prefill: Engine) -> tuple[Engine, Engine] | None:
        """Choose two engines that can exchange KV blocks, or None when there are none.

        Args:
            asked: the request.
            refused: engines not to be chosen.
            prefill: who is to be one of them if possible.
        """
        decodes = [engine for engine in self.fleet.healthy(Role.DECODE) if engine not in refused]
        prefills = [engine for engine in self.fleet.healthy(Role.PREFILL) if engine not in refused]
        roomy = [engine for engine in decodes if self.has_room(engine, asked)]
        large = [engine for engine in decodes if self._could_hold(engine, asked)]
        # A way that is closed is better than none; between engines of different kinds there is none.
        open_, alike = self.fits, self.fleet.compatible
        for those, fits in ((roomy, open_), (large, open_), (large, alike), (decodes, open_), (decodes, alike)):
            found = [engine for engine in prefills if any(fits(engine, decode) for decode in those)]
            if found:
                one = prefill if prefill in found else self._roomy(Role.PREFILL, asked, found)
                return one, self._roomy(Role.DECODE, asked, [decode for decode in those if fits(one, decode)])
        return None

    def _roomy(self, role: Role, asked: Prompt, candidates: Sequence[Engine]) -> Engine:
        """Choose among engines, one with room if there is any, else one that could have it."""
        chosen = self._chosen(role, asked, candidates)
        if chosen.kv_tokens and not self.has_room(chosen, asked):
            roomy = [engine for engine in candidates if self.has_room(engine, asked)]
            roomy = roomy or [engine for engine in candidates if self._could_hold(engine, asked)]
            if roomy:
                chosen = self._chosen(role, asked, roomy)
        return chosen

    def _chosen(self, role: Role, asked: Prompt, candidates: Sequence[Engine]) -> Engine:
        policy = self.policies[role]
        if self.decisions is None:
            return policy.choose(asked, candidates)
        scoring = self._scoring.get(role)
        scores = None if scoring is None else scoring.scores(asked, candidates)
        chosen = policy.choose(asked, candidates)
        self.decisions.add(role, policy.name, asked.key, chosen.url, candidates, scores)
        return chosen

    @property
    def picky(self) -> bool:
        """Whether there are engines that cannot exchange KV blocks."""
        return self.edges.any_closed or self.fleet.mixed

    def fits(self, prefill: Engine, decode: Engine) -> bool:
        """Whether KV blocks can go from one engine to the other."""
        return not self.edges.closed(prefill, decode) and self.fleet.compatible(prefill, decode)

    def needs(self, asked: Prompt) -> int:
        """Predict how many tokens a request will hold on decode: its prompt and what answers have lately had."""
        limit = asked.max_tokens
        typical = int(self._typical)
        return (asked.counted or asked.tokens) + asked.choices * (min(limit, typical) if limit else typical)

    def has_room(self, engine: Engine, asked: Prompt) -> bool:
        """Whether an engine's KV cache has room for a request, as far as its size is known."""
        size = engine.kv_tokens
        if not size:
            return True
        if engine.role is Role.PREFILL:
            return engine.queued_tokens + engine.pinned_tokens + asked.tokens <= size
        return engine.held_tokens + self.needs(asked) <= size

    def _could_hold(self, engine: Engine, asked: Prompt) -> bool:
        size = engine.kv_tokens
        return not size or (asked.tokens if engine.role is Role.PREFILL else self.needs(asked)) <= size

    def unfit(self, asked: Prompt) -> list[Engine]:
        """Give the decode engines that a request has no use for: too small for it, or with no way to them."""
        return [
            engine for engine in self.fleet.healthy(Role.DECODE)
            if not (self._could_hold(engine, asked) and self._reachable(engine))
        ]  # fmt: skip

    def too_large(self, asked: Prompt) -> bool:
        """Whether a request has a use for no decode engine, so that waiting for room is in vain."""
        return len(self.unfit(asked)) == len(self.fleet.healthy(Role.DECODE))

    def _reachable(self, decode: Engine) -> bool:
        prefills = self.fleet.healthy(Role.PREFILL)
        return not self.picky or not prefills or any(self.fits(prefill, decode) for prefill in prefills)

    def answered_with(self, tokens: int) -> None:
        """Learn how long answers are."""
        self._typical += _SMOOTH * (tokens - self._typical)

    def longest_context(self) -> int | None:
        """Give the longest context that all decode engines take, where they tell it."""
        told = [engine.longest_context for engine in self.fleet.engines[Role.DECODE] if engine.longest_context]
        return min(told) if told else None

    def bypass(self, asked: Prompt, prefill: Engine, decode: Engine) -> bool:
        """Say whether the decode engine should serve the request alone."""
        return self._bypassing is not None and self._bypassing.bypass(asked, prefill, decode)

    def routed(self, role: Role, asked: Prompt, engine: Engine) -> int:
        """Let the policy know where a request goes; give how many tokens the engine has to compute for it."""
        learning = self._learning.get(role)
        uncached = asked.tokens
        if learning is not None and not engine.gone:
            uncached = learning.uncached(asked, engine)
            learning.routed(asked, engine)
        engine.uncached += uncached
        engine.cached += asked.tokens - uncached
        return uncached

    def learns(self, role: Role) -> bool:
        """Whether the policy wants to know what engines of a role generate."""
        return role in self._learning

    def answered(self, role: Role, asked: Prompt, engine: Engine, answer: bytes) -> None:
        """Let the policy know what an engine answered."""
        text = b"" if engine.gone else generated_text(answer)
        if text:
            self._learning[role].answered(asked, engine, asked.continued(text))

    def greet(self, engine: Engine, greeting: Greeting) -> Call:
        """Ask an engine for a sign of life; the greeting hears of it within a second."""
        request = b"GET /health HTTP/1.1\r\nhost: %b\r\n\r\n" % engine.authority
        call = greeting.call = self.pool.call(engine, request, greeting, counted=False)
        self.loop.call_later(_GREETING, greeting.late)
        return call

    # trying again

    def broken(self, engine: Engine, error: UpstreamError) -> None:
        """Record what a failed leg says of its engine; some failures are the router's own."""
        if isinstance(error, ConnectError | VanishedError):
            self.fleet.mark(engine, False, error.reason)
        elif not isinstance(error, ExhaustedError | RouterFailureError):
            self.fleet.failed(engine, error.reason)

    def later(self, one: Parked, times: int) -> None:
        """Start a request again, the later the more often it has failed."""
        pause = _BACK_OFF[min(times, len(_BACK_OFF) - 1)]
        if pause:
            self.loop.call_later(pause, one.start)
        else:
            self.loop.call_soon(one.start)

    def issued(self, ticket: Ticket, tokens: int) -> None:
        """Take up a new ticket; where it tells that its engine is another process than before, its ways are new."""
        if self.ledger.issued(ticket, tokens):
            self.edges.forget(ticket.prefill)

    def changed(self, engine: Engine) -> None:
        """An engine's load row changed."""
        if self.pool.rows is not None:
            self.pool.rows.changed(engine)

    # fleet (pdrouter.fleet.fleet.Watcher)

    def joined(self, engine: Engine) -> None:
        """A new engine holds nothing, which is what policies assume."""

    def left(self, engine: Engine) -> None:
        """Its KV cache is gone, and so are connections to it."""
        learning = self._learning.get(engine.role)
        if learning is not None:
            learning.gone(engine)
        self.ledger.void(engine)
        self.edges.forget(engine)
        self.pool.left(engine)

    def turned(self, engine: Engine) -> None:
        """An engine began or ceased to answer; one that comes back may be another process."""
        if not engine.healthy:
            self.edges.forget(engine)
            if engine.role is Role.PREFILL:
                self.ledger.void(engine)

    # for the log

    def _choice_reason(self, role: Role, source: str) -> str:
        policy = self.policies[role]
        return f"{policy.name}:{source}" if policy.uses_key else policy.name

    def pair_reason(self, key: RoutingKey) -> str:
        """Say how both engines are chosen, for the log."""
        reason = self._reasons.get(key.source)
        if reason is None:
            prefill, decode = (self._choice_reason(role, key.source) for role in (Role.PREFILL, Role.DECODE))
            reason = self._reasons[key.source] = prefill if prefill == decode else f"{prefill}/{decode}"
        return reason
