"""Sessions stay where they began, and begin where the fewest sessions are.

Formulas: vllm-project/router 0.1.17 `src/policies/sticky_least_loaded.rs`. A known session goes to its engine while
that is healthy and the session was used within 7200 s; otherwise it is a new one. A new session goes to the engine
with the fewest sessions, of equals to the one with the highest `fbi_hash("SESSION:URL")`, the first of equal hashes. A
request without a session is placed in the same way and counts for nothing; its tie-break is its routing key's text
here and its body's text there. Expired sessions are counted until the next sweep, at most one a minute. A sweep looks
at all sessions (a million take about 0.1 s).

Known flaws, kept:
    - what is balanced are sessions, whether they send much or nothing;
    - a request without a session adds no load, so that a burst of them that hashes alike stays on one engine;
    - where a client sends only `x-request-id`, each request is a session of its own that is counted for two hours;
    - a session keeps its engine however overloaded it is;
    - the number of sessions is not bounded.
"""

import time
from collections.abc import Callable, Sequence

from pdrouter.policies.choice import C, Features
from pdrouter.policies.fbi_hash import fbi_hash

SESSION_SECONDS = 7200.0
SWEEP_SECONDS = 60.0


class StickyLeastLoaded:
    """An engine for a session's life."""

    name = "sticky_least_loaded"
    uses_key = False

    def __init__(self, clock: Callable[[], float] = time.monotonic, ttl: float = SESSION_SECONDS) -> None:
        """Prepare.

        Args:
            clock: seconds from any beginning.
            ttl: seconds after its last request at which a session ends.
        """
        self._clock = clock
        self._ttl = ttl
        self._sessions: dict[str, tuple[str, float]] = {}
        self._counts: dict[str, int] = {}
        self._swept = clock()

    @property
    def sessions(self) -> dict[str, int]:
        """How many sessions each engine has, by its name; engines without any are left out."""
        return dict(self._counts)

    def choose(self, request: Features, candidates: Sequence[C]) -> C:
        """Give the session's engine, which a new session gets now."""
        now = self._clock()
        self._sweep(now)
        session = request.session
        if session is None:
            return self._fewest(request.key.text, candidates)
        known = self._sessions.get(session)
        if known is not None:
            name, used = known
            if now - used < self._ttl:
                for candidate in candidates:
                    if candidate.name == name:
                        self._sessions[session] = name, now
                        return candidate
            self.finished(session)
        chosen = self._fewest(session, candidates)
        self._sessions[session] = chosen.name, now
        self._counts[chosen.name] = self._counts.get(chosen.name, 0) + 1
        return chosen

    def scores(self, request: Features, candidates: Sequence[C]) -> list[float]:
        """Give the number of sessions, negative, and 1 for the engine that the session has."""
        scores = [-float(self._counts.get(candidate.name, 0)) for candidate in candidates]
        known = None if request.session is None else self._sessions.get(request.session)
        if known is None:
            return scores
        name, used = known
        if self._clock() - used < self._ttl:
            return [
                1.0 if candidate.name == name else score for candidate, score in zip(candidates, scores, strict=True)
            ]
        # The session leaves its engine before it is placed anew.
        return [score + (candidate.name == name) for candidate, score in zip(candidates, scores, strict=True)]

    def finished(self, session: str) -> None:
        """End a session (vllm-router's `POST /finish_session`)."""
        known = self._sessions.pop(session, None)
        if known is not None:
            left = self._counts[known[0]] - 1
            if left:
                self._counts[known[0]] = left
            else:
                del self._counts[known[0]]

    def _fewest(self, text: str, candidates: Sequence[C]) -> C:
        counts = [self._counts.get(candidate.name, 0) for candidate in candidates]
        fewest = min(counts)
        if counts.count(fewest) == 1:
            return candidates[counts.index(fewest)]
        chosen, highest = candidates[0], -1
        for candidate, count in zip(candidates, counts, strict=True):
            if count == fewest:
                weight = fbi_hash(f"{text}:{candidate.name}")
                if weight > highest:
                    chosen, highest = candidate, weight
        return chosen

    def _sweep(self, now: float) -> None:
        if now - self._swept < SWEEP_SECONDS:
            return
        self._swept = now
        for session in [one for one, (_, used) in self._sessions.items() if now - used >= self._ttl]:
            self.finished(session)
