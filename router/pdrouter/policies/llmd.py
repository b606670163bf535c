"""What llm-d's endpoint picker chooses with its published configurations.

Source: llm-d-router (commit ebab6879) `pkg/epp/config/loader/defaults.go` and `deploy/config/pd-epp-config.yaml`; guide
`guides/pd-disaggregation/router/pd-disaggregation.values.yaml` of llm-d/llm-d. An engine's total is the weighted sum of
its scores (`llmd_scorers`); the highest total wins, each of equals being as likely as another (max-score-picker).
Prefixes come from `llmd_index`, whose flaws are named there.

Further flaws, kept: `vllm:num_requests_waiting` and `vllm:kv_cache_usage_perc` are as old as the last scrape, so that
requests between two scrapes all see the same queue; and the first two configurations cannot tell a long queued prompt
from a short one.
"""

import random
from collections.abc import Sequence
from operator import add

from pdrouter.policies.choice import C, Candidate, Commons, Features, RoleName
from pdrouter.policies.llmd_index import LlmdIndex
from pdrouter.policies.llmd_scorers import active_requests, kv_room, prefix_match, queue_depth, sticky, token_load
from pdrouter.policies.ties import highest

NON_CACHED_TOKENS = 16  # of the sample's prefix-based-pd-decider
_LEFT_OUT = -1.0


class _Llmd:
    """The part that all three configurations have: the index and the picker."""

    name: str
    uses_key = False
    most_tokens = 131_072

    def __init__(self, role: RoleName, commons: Commons) -> None:
        self._prefill = role == "prefill"
        self._draw: random.Random = commons.draw()
        self.index = LlmdIndex.of(commons, self.name, self.most_tokens)

    def scores(self, request: Features, candidates: Sequence[C]) -> list[float]:
        """Give each candidate's total."""
        raise NotImplementedError

    def choose(self, request: Features, candidates: Sequence[C]) -> C:
        """Give the engine with the highest total."""
        return highest(candidates, self.scores(request, candidates), self._draw)

    def uncached(self, request: Features, candidate: Candidate) -> int:
        """Give how many of the prompt's tokens the engine is thought to have to compute."""
        return self.index.uncached(request, (candidate,))[0]

    def routed(self, request: Features, candidate: Candidate) -> None:
        """Record the prompt's blocks."""
        self.index.held(request, candidate)

    def answered(self, request: Features, candidate: Candidate, generated: bytes) -> None:
        """Record nothing (flaw 4 of the index)."""

    def gone(self, candidate: Candidate) -> None:
        """Forget the engine's blocks."""
        self.index.gone(candidate)


class LlmdDefault(_Llmd):
    """The picker without a configuration: `2 * queue + 2 * kv + 3 * prefix` for either role."""

    name = "llmd_default"

    def scores(self, request: Features, candidates: Sequence[C]) -> list[float]:
        """Give each candidate's total, up to 7."""
        matches, total = self.index.matches(request, candidates)
        queues = queue_depth([candidate.waiting for candidate in candidates])
        rooms = kv_room([candidate.kv_usage for candidate in candidates])
        prefixes = prefix_match(matches, total)
        return [2 * queue + 2 * room + 3 * prefix for queue, room, prefix in zip(queues, rooms, prefixes, strict=True)]


class LlmdPdSample(_Llmd):
    """The sample P/D configuration: `2 * prefix + queue` for either role, and no prefill for what decode has."""

    name = "llmd_pd_sample"
    most_tokens = 16_384

    def scores(self, request: Features, candidates: Sequence[C]) -> list[float]:
        """Give each candidate's total, up to 3."""
        matches, total = self.index.matches(request, candidates)
        queues = queue_depth([candidate.waiting for candidate in candidates])
        return [2 * prefix + queue for prefix, queue in zip(prefix_match(matches, total), queues, strict=True)]

    def bypass(self, request: Features, prefill: Candidate, decode: Candidate) -> bool:
        """Say whether fewer than 16 of the prompt's tokens are not on the decode engine."""
        return self.index.uncached(request, (decode,))[0] < NON_CACHED_TOKENS


class LlmdPdGuide(_Llmd):
    """The guide's P/D configuration.

    Prefill: engines that have 80 % of the prompt, unless they would be 18 s slower, then the least uncached tokens.
    Decode: the fewest requests.
    """

    name = "llmd_pd_guide"

    def scores(self, request: Features, candidates: Sequence[C]) -> list[float]:
        """Give each candidate's total, up to 1; -1 for engines that the affinity filter leaves out."""
        if not self._prefill:
            return active_requests([candidate.in_flight for candidate in candidates])
        matches, total = self.index.matches(request, candidates)
        queued = [candidate.queued_tokens for candidate in candidates]
        loads = token_load(list(map(add, queued, self.index.uncached(request, candidates))))
        stay = sticky(matches, total, queued)
        return [load if stays else _LEFT_OUT for load, stays in zip(loads, stay, strict=True)]
