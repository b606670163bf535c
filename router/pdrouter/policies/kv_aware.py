"""The P/D rule of vllm-router's `kv_aware`: least work for prefill, fewest requests for decode.

Formulas: vllm-project/router 0.1.17 `src/policies/kv_aware.rs` and `src/routers/http/pd_router.rs`.

Prefill: the engine with the lowest `active_prefill_tokens + new_prefill_tokens`; of equals the one with fewer requests,
then the one listed first. `new_prefill_tokens` are the prompt's tokens less those that the engine holds, at least one.

Decode: the engine with the fewest requests; equals take turns. With a `ttl` a session keeps its engine as long as that
has fewer than `ceil((total + 1) / engines)` requests. At most 10,000 sessions are kept, the longest unused go first.

Different from vllm-router: it reads the engines' KV events (exact, blocks of 16 tokens, tiers of host memory and disk
with credits 0.8, 0.6 and 0.3), where this estimates from what it sent; and a session's `ttl` runs from its last request
there ends, here from when it was routed. Without KV events vllm-router credits nothing.

Known flaws, kept: prefill counts tokens as if each cost the same, so a queue of many short prompts and one long one
weigh alike; decode looks at requests and not at what they hold; the KV of a conversation's last turn on a decode engine
counts for nothing unless sessions are kept.
"""

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence

from pdrouter.policies.choice import C, Candidate, Features, RoleName
from pdrouter.policies.prefix_index import PrefixIndex

MOST_SESSIONS = 10_000


class KvAware:
    """Work for prefill, requests for decode."""

    name = "kv_aware"
    uses_key = False

    def __init__(
        self,
        role: RoleName,
        clock: Callable[[], float] = time.monotonic,
        ttl: float | None = None,
        index: PrefixIndex | None = None,
    ) -> None:
        """Prepare.

        Args:
            role: whose engines are chosen from.
            clock: seconds from any beginning.
            ttl: seconds that a session keeps its decode engine; None (vllm-router's default) keeps none.
            index: what prefill engines hold.
        """
        self._prefill = role == "prefill"
        self._clock = clock
        self._ttl = ttl
        self._turn = 0
        self._sessions: OrderedDict[str, tuple[str, float]] = OrderedDict()
        self.index = index or PrefixIndex()

    def choose(self, request: Features, candidates: Sequence[C]) -> C:
        """Give the engine with the least work or the fewest requests."""
        if not self._prefill:
            return self._choose_decode(request, candidates)
        scores = self.scores(request, candidates)
        top = max(scores)
        if scores.count(top) == 1:
            return candidates[scores.index(top)]
        equals = [candidate for candidate, score in zip(candidates, scores, strict=True) if score == top]
        return min(equals, key=lambda candidate: candidate.in_flight)

    def _choose_decode(self, request: Features, candidates: Sequence[C]) -> C:
        loads = [candidate.in_flight for candidate in candidates]
        session = request.session if self._ttl is not None else None
        if session is not None:
            at = self._sticky(session, candidates, loads)
            if at is not None:
                self._bind(session, candidates[at])
                return candidates[at]
        fewest = min(loads)
        equals = [candidate for candidate, load in zip(candidates, loads, strict=True) if load == fewest]
        chosen = equals[self._turn % len(equals)]
        self._turn += 1
        if session is not None:
            self._bind(session, chosen)
        return chosen

    def _sticky(self, session: str, candidates: Sequence[Candidate], loads: list[int]) -> int | None:
        name, used = self._sessions.get(session, ("", 0.0))
        if not name or self._ttl is None or self._clock() - used >= self._ttl:
            return None
        share = -(-(sum(loads) + 1) // len(loads))
        for at, candidate in enumerate(candidates):
            if candidate.name == name:
                return at if loads[at] < share else None
        return None

    def _bind(self, session: str, candidate: Candidate) -> None:
        self._sessions[session] = candidate.name, self._clock()
        self._sessions.move_to_end(session)
        if len(self._sessions) > MOST_SESSIONS:
            self._sessions.popitem(last=False)

    def scores(self, request: Features, candidates: Sequence[C]) -> list[float]:
        """Give tokens of work or requests, negative, and 1 for the engine that a session keeps."""
        if self._prefill:
            return [
                -candidate.queued_tokens - new
                for candidate, new in zip(candidates, self.index.uncached(request, candidates), strict=True)
            ]
        loads = [candidate.in_flight for candidate in candidates]
        scores = [-float(load) for load in loads]
        if self._ttl is not None and request.session is not None:
            at = self._sticky(request.session, candidates, loads)
            if at is not None:
                scores[at] = 1.0
        return scores

    def uncached(self, request: Features, candidate: Candidate) -> int:
        """Estimate how many of the prompt's tokens the engine would have to compute."""
        return self.index.uncached(request, (candidate,))[0]

    def routed(self, request: Features, candidate: Candidate) -> None:
        """Record that a prefill engine holds the prompt."""
        if self._prefill:
            self.index.held(request.chain, candidate)

    def answered(self, request: Features, candidate: Candidate, generated: bytes) -> None:
        """Record that a prefill engine that also answered holds its answer."""
        if self._prefill:
            self.index.continued(request.prefix, generated, candidate)

    def gone(self, candidate: Candidate) -> None:
        """Forget the engine's blocks and its sessions."""
        self.index.gone(candidate)
        for session in [one for one, (name, _) in self._sessions.items() if name == candidate.name]:
            del self._sessions[session]
