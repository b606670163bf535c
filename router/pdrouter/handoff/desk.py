"""What all handoffs share: the fleet, the policies, the connections, the limits."""

import asyncio
from collections.abc import Sequence

from pdrouter.deadlines import Deadlines
from pdrouter.fleet.engine import Engine, Role
from pdrouter.fleet.fleet import Fleet
from pdrouter.handoff.admission import Admission
from pdrouter.observe.decisions import Decisions
from pdrouter.observe.metrics import Observer
from pdrouter.observe.traces import Traces
from pdrouter.openai.features import Prompt
from pdrouter.openai.generated import generated_text
from pdrouter.policies import Bypassing, Learning, Policy, RoutingKey, Scoring
from pdrouter.upstream.pool import Pool


def decode_by_load(policy: Policy) -> bool:
    """Whether a policy's choice depends on the engines' load, so that it should be made as late as possible."""
    return not policy.uses_key and policy.name not in ("round_robin", "random")


class Desk:
    """Shared by all requests of one router process. Times are seconds."""

    __slots__ = (
        "_bypassing", "_learning", "_reasons", "_scoring", "admission", "chooses_late", "deadlines", "decisions",
        "fleet", "lease", "loop", "observer", "policies", "pool", "traces",
    )  # fmt: skip

    def __init__(
        self, loop: asyncio.AbstractEventLoop, fleet: Fleet, pool: Pool, policies: dict[Role, Policy],
        observer: Observer, decisions: Decisions | None, traces: Traces | None, admission: Admission,
        lease: float, request_timeout: float,
    ) -> None:  # fmt: skip
        self.loop = loop
        self.fleet = fleet
        self.pool = pool
        self.policies = policies
        self.observer = observer
        self.decisions = decisions
        self.traces = traces
        self.admission = admission
        self.lease = lease
        self.deadlines = Deadlines(loop, request_timeout)
        self._reasons: dict[str, str] = {}
        self._learning = {role: policy for role, policy in policies.items() if isinstance(policy, Learning)}
        prefill, decode = policies[Role.PREFILL], policies[Role.DECODE]
        self._scoring = {role: policy for role, policy in policies.items() if isinstance(policy, Scoring)}
        self.chooses_late = decode_by_load(policies[Role.DECODE])
        # One policy must have chosen both: it compares what it knows of the one engine with what it knows of the other.
        self._bypassing = decode if isinstance(decode, Bypassing) and type(prefill) is type(decode) else None

    # choosing

    def choose(self, role: Role, asked: Prompt, refused: Sequence[Engine] = ()) -> Engine | None:
        """Choose a healthy engine that is not in `refused`, or None when there is none."""
        if self.pool.rows is not None:
            self.pool.rows.refresh()
        candidates = self.fleet.healthy(role)
        if refused:
            candidates = [engine for engine in candidates if engine not in refused]
        if not candidates:
            return None
        policy = self.policies[role]
        if self.decisions is None:
            return policy.choose(asked, candidates)
        scoring = self._scoring.get(role)
        scores = None if scoring is None else scoring.scores(asked, candidates)
        chosen = policy.choose(asked, candidates)
        self.decisions.add(role, policy.name, asked.key, chosen.url, candidates, scores)
        return chosen

    def bypass(self, asked: Prompt, prefill: Engine, decode: Engine) -> bool:
        """Say whether the decode engine should serve the request alone."""
        return self._bypassing is not None and self._bypassing.bypass(asked, prefill, decode)

    def routed(self, role: Role, asked: Prompt, engine: Engine) -> int:
        """Let the policy know where a request goes; give how many tokens the engine has to compute for it."""
        learning = self._learning.get(role)
        uncached = asked.tokens
        if learning is not None:
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
        text = generated_text(answer)
        if text:
            self._learning[role].answered(asked, engine, asked.continued(text))

    # fleet (pdrouter.fleet.fleet.Watcher)

    def joined(self, engine: Engine) -> None:
        """A new engine holds nothing, which is what policies assume."""

    def left(self, engine: Engine) -> None:
        """Its KV cache is gone, and so are connections to it."""
        learning = self._learning.get(engine.role)
        if learning is not None:
            learning.gone(engine)
        self.pool.left(engine)

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
