"""Engines by predicted time: the first token for prefill, the time between tokens for decode.

Prefill. A prefill engine computes prompts one after the other at a steady rate, so the first token comes after

    (queued_tokens + uncached) / prefill_rate + handoff_base + handoff_per_token * tokens

where `uncached` are the prompt's tokens that the engine does not hold. A cached engine wins until its queue is longer
than the cached part, which is all the affinity that prefill needs.

Decode. A step streams the weights, serves each request and reads the KV of all, so tokens are apart by

    itl_base + itl_per_request * requests + itl_per_token * held

with this request among them. Moving the part of the prompt that the engine does not hold is spread over the answer's
tokens, so that a conversation returns to its engine when loads are about even. Where the prompt and its answer exceed
the room in the KV cache, vLLM lets the request wait or throws others out, so that engine is `no_room` seconds worse and
more the less fits.

Bypass. The decode engine computes the prompt itself when that is quicker than prefill and the transfer, the time for
which it keeps each of its own requests waiting included.

Left out: attention over long prompts grows with their square (30,000 tokens take 1.06 s and not 0.73 s), generated
tokens count in `held` only by way of `kv_usage`, and batches of few tokens do not reach the full rate.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from pdrouter.policies.choice import C, Candidate, Commons, Features, RoleName
from pdrouter.policies.prefix_index import PrefixIndex
from pdrouter.policies.ties import idlest


@dataclass(frozen=True)
class Costs:
    """What work costs. The figures are of one NVIDIA H200 and a model of Llama 3.1 8B's shape with vLLM 0.26.

    They were measured for the simulator; `simulator/pdsim/timing/h200.json` has them under the names given here. What
    matters to choices are their proportions.

    Args:
        prefill_rate: prompt tokens that an engine computes in a second (`prefill_tokens_per_second`).
        handoff_base: seconds that a first token comes later because another engine generates it: two requests, the
            notice of the transfer, one step (`decode_ttft_ms`, both runs: a line fitted by relative error).
        handoff_per_token: seconds to move one token's KV and to hash it (the same line's slope).
        itl_base: seconds between tokens at batch 0 (`itl_ms`: a plane fitted by relative error, off by at most 5 %).
        itl_per_request: seconds that one more request adds (the same plane).
        itl_per_token: seconds that one more token of held KV adds (the same plane).
        no_room: seconds between tokens that an engine without room for the request is worse; any figure far over those
            that load can make will do.
        full: share of the KV cache in use from which an engine of unknown size has no room.
        expected_output: tokens that an answer is thought to have where the client's limit is higher or missing; the
            benchmark's 200 (`router_runs`).
        fresh: seconds for which a scraped `kv_usage` is believed.
        stall_weight: how much a second counts for which a request on the decode engine waits because of a prompt that
            is computed there, against a second of this request's.
    """

    prefill_rate: float = 40_915.0
    handoff_base: float = 0.0179
    handoff_per_token: float = 1.97e-6
    itl_base: float = 4.84e-3
    itl_per_request: float = 1.50e-5
    itl_per_token: float = 2.81e-8
    no_room: float = 1.0
    full: float = 0.95
    expected_output: int = 200
    fresh: float = 5.0
    stall_weight: float = 1.0


class PdCost:
    """The engine with the least predicted time."""

    name = "pd_cost"
    uses_key = False

    def __init__(
        self, role: RoleName, draw: random.Random, indexes: dict[RoleName, PrefixIndex], costs: Costs | None = None
    ) -> None:
        """Prepare.

        Args:
            role: whose engines are chosen from.
            draw: for ties.
            indexes: what the engines of each role hold.
            costs: what work costs.
        """
        self._prefill = role == "prefill"
        self._draw = draw
        self._indexes = indexes
        self.costs = costs or Costs()
        self.index = indexes[role]

    @classmethod
    def of(cls, role: RoleName, commons: Commons) -> "PdCost":
        """Make a role's policy, which knows the other role's index for the bypass."""
        indexes = commons.shared.setdefault(
            "pd_cost", {"prefill": PrefixIndex(commons.block_tokens), "decode": PrefixIndex(commons.block_tokens)}
        )
        assert isinstance(indexes, dict)
        return cls(role, commons.draw(), indexes)

    def choose(self, request: Features, candidates: Sequence[C]) -> C:
        """Give the engine with the least predicted time, of equals one with the fewest requests."""
        return idlest(candidates, self.scores(request, candidates), self._draw)

    def scores(self, request: Features, candidates: Sequence[C]) -> list[float]:
        """Give the predicted seconds, negative: to the first token (prefill) or between tokens (decode)."""
        uncached = self.index.uncached(request, candidates)
        costs, tokens = self.costs, request.tokens
        if self._prefill:
            handoff, rate = costs.handoff_base + costs.handoff_per_token * tokens, costs.prefill_rate
            return [
                -(candidate.queued_tokens + own) / rate - handoff
                for candidate, own in zip(candidates, uncached, strict=True)
            ]
        limit = request.max_tokens
        output = min(limit, costs.expected_output) if limit else costs.expected_output
        moving = costs.handoff_per_token / output
        needed = tokens + (limit or costs.expected_output)
        fixed = costs.itl_base + costs.itl_per_request + costs.itl_per_token * tokens
        scores = []
        for candidate, own in zip(candidates, uncached, strict=True):
            held = candidate.held_tokens
            load = costs.itl_per_request * candidate.in_flight + costs.itl_per_token * held
            seconds = fixed + load + moving * own
            over = self._over(candidate, held, needed)
            if over > 0:
                seconds += costs.no_room * (1 + over)
            scores.append(-seconds)
        return scores

    def _over(self, candidate: Candidate, held: int, needed: int) -> float:
        """Give by how much of its KV cache an engine lacks room, as a share; 0 or less when it has room."""
        size = candidate.kv_tokens
        if size <= 0:
            known = candidate.metrics_age < self.costs.fresh
            return candidate.kv_usage - self.costs.full if known else 0.0
        # Both counts may be below the truth: held tokens lack what was generated, a scrape lacks the newest requests.
        if held + needed > size:
            return (held + needed) / size - 1
        if candidate.metrics_age < self.costs.fresh:
            return candidate.kv_usage + needed / size - 1
        return 0.0

    def bypass(self, request: Features, prefill: Candidate, decode: Candidate) -> bool:
        """Say whether the decode engine is thought to be quicker alone than after prefill and the transfer."""
        costs = self.costs
        there = self._indexes["prefill"].uncached(request, (prefill,))[0]
        here = self._indexes["decode"].uncached(request, (decode,))[0]
        handed = (prefill.queued_tokens + there) / costs.prefill_rate + costs.handoff_base
        handed += costs.handoff_per_token * here
        stalled = costs.stall_weight * decode.in_flight
        alone = (decode.queued_tokens + here * (1 + stalled)) / costs.prefill_rate
        return alone < handed

    def uncached(self, request: Features, candidate: Candidate) -> int:
        """Estimate how many of the prompt's tokens the engine would have to compute or fetch."""
        return self.index.uncached(request, (candidate,))[0]

    def routed(self, request: Features, candidate: Candidate) -> None:
        """Record that the engine holds the prompt."""
        self.index.held(request.chain, candidate)

    def answered(self, request: Features, candidate: Candidate, generated: bytes) -> None:
        """Record that the engine holds the prompt and its answer."""
        self.index.continued(request.prefix, generated, candidate)

    def gone(self, candidate: Candidate) -> None:
        """Forget what the engine held."""
        self.index.gone(candidate)
