"""Engines by predicted time, of the request itself and of those that it delays.

Prefill. A prefill engine computes prompts one after the other at a steady rate, so the first token comes after

    (queued_tokens + uncached) / prefill_rate + handoff_base + handoff_per_token * tokens

where `uncached` are the prompt's tokens that the engine does not hold. But work is not only this request's: whoever
comes later waits for it too, which makes a second of work cost about `1 + full / (1 - busy)` seconds of everybody's,
where `full` is how often all prefill engines are busy and `busy` how much of the time one is (waiting time in a queue
with several servers, Erlang's C over what is left of them): the policy sees both when requests come. By this `dearness`
uncached tokens are multiplied: on busy engines it takes a longer queue to leave a cached prefix.

Decode. A step streams the weights, serves each request and reads the KV of all, so tokens are apart by

    itl_base + itl_per_request * requests + itl_per_token * held

A request of `tokens` makes every other one on the engine slower by `itl_per_request + itl_per_token * tokens` for each
token that it generates. The sum over both sides is what a choice costs: long prompts go where few are delayed by them,
short ones where little KV is read. That beats even loads: the mean over tokens is a harmonic one over engines, so
engines that differ give quicker tokens; `evenness` above 1 keeps the slowest engine within bounds. What the engine does
not hold of the prompt has to be moved, or computed here if that costs less than prefill, which is spread over the
answer's tokens; so a conversation returns to its engine. When tokens are further apart than usual, `evenness` grows:
that is when the slowest of them are made. Where the prompt and its answer exceed the room in the KV
cache, vLLM lets the request wait or throws others out, so that engine is `no_room` seconds worse and more the less
fits.

Bypass. The decode engine computes the prompt itself when that is quicker than prefill and the transfer, the time for
which it keeps each of its own requests waiting included, and as long as all such waiting makes answers longer by no
more than `bypass_share`. Prefill engines will lack what they did not compute when the conversation comes back to them,
which is what `parting` stands for.

What work costs is learned: a line through what prompts took that were alone on their engine, one through what handoffs
took, one through the times between tokens, and the length of answers (`pdrouter.policies.fit`).

Left out: attention over long prompts grows with their square (30,000 tokens take 1.06 s and not 0.73 s), and generated
tokens count in `held` only by way of `kv_usage`.
"""

import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pdrouter.policies.choice import C, Candidate, Commons, Features, RoleName
from pdrouter.policies.fit import Line
from pdrouter.policies.prefix_index import PrefixIndex
from pdrouter.policies.ties import idlest

_SMOOTH = 0.01
_SMOOTH_USUAL = 0.001
_SHORTEST = 16  # tokens of an answer from which times between tokens can be told
_FAR = 16_384.0  # tokens of a long prompt
_MUCH = 300_000.0  # tokens that a busy engine holds


@dataclass(frozen=True)
class Costs:
    """What work costs at first, and what is weighed how.

    The first group is learned from then on. Its figures are of one NVIDIA H200 and a model of Llama 3.1 8B's shape with
    vLLM 0.26; `simulator/pdsim/timing/h200.json` has them under the names given here.

    Args:
        prefill_rate: prompt tokens that an engine computes in a second (`prefill_tokens_per_second`).
        prefill_base: seconds that an idle engine needs for any prompt (`prefill_ms`, its least).
        handoff_base: seconds that a first token comes later because another engine generates it: two requests, the
            notice of the transfer, one step (`decode_ttft_ms`, both runs: a line fitted by relative error).
        handoff_per_token: seconds to move one token's KV and to hash it (the same line's slope).
        itl_base: seconds between tokens at batch 0 (`itl_ms`: a plane fitted by relative error, off by at most 5 %).
        itl_per_token: seconds that one more token of held KV adds (the same plane).
        expected_output: tokens that an answer is thought to have where the client's limit is higher or missing; the
            benchmark's 200 (`router_runs`).

        itl_per_request: seconds that one more request adds to the time between tokens (the same plane).
        dearest: the most that an uncached token counts against one that is queued already.
        evenness: how much this request's own time between tokens counts against that of each other one.
        peak: by how many times tokens are further apart than usual at a peak.
        peak_evenness: what is added to `evenness` by how many times they are further apart than that.
        stall_weight: how much a second counts for which a request on the decode engine waits because of a prompt that
            is computed there, against a second of this request's.
        parting: how much more a token counts that only a decode engine computes.
        bypass_share: by how much prompts that decode engines compute may make answers longer.
        bypass_saved: seconds of waiting that may be saved up for.
        bypass_tokens: tokens' time as which the shortest wait counts: no more than `bypass_share / bypass_tokens` of
            all tokens, 0.5 %, come late for it, which leaves the p99 between tokens alone.
        no_room: seconds between tokens that an engine without room for the request is worse; any figure far over those
            that load can make will do.
        full: share of the KV cache in use from which an engine of unknown size has no room.
        fresh: seconds for which a scraped `kv_usage` is believed.
    """

    prefill_rate: float = 40_915.0
    prefill_base: float = 0.0145
    handoff_base: float = 0.0179
    handoff_per_token: float = 1.97e-6
    itl_base: float = 4.84e-3
    itl_per_token: float = 2.81e-8
    expected_output: int = 200

    itl_per_request: float = 1.50e-5
    dearest: float = 8.0
    evenness: float = 1.5
    peak: float = 1.05
    peak_evenness: float = 30.0
    stall_weight: float = 5.0
    parting: float = 2.0
    bypass_share: float = 0.03
    bypass_saved: float = 10.0
    bypass_tokens: float = 6.0
    no_room: float = 1.0
    full: float = 0.95
    fresh: float = 5.0


class Learned:
    """What both roles of a router have learned: costs, load, and what engines hold."""

    __slots__ = (
        "busy", "costs", "full", "handoff", "indexes", "itl", "output", "prefill", "prefills", "saved", "usual",
    )  # fmt: skip

    def __init__(self, costs: Costs, block_tokens: int) -> None:
        self.costs = costs
        self.indexes: dict[RoleName, PrefixIndex] = {
            "prefill": PrefixIndex(block_tokens),
            "decode": PrefixIndex(block_tokens),
        }
        self.prefill = Line(costs.prefill_base, 1 / costs.prefill_rate, _FAR)
        self.handoff = Line(costs.handoff_base, costs.handoff_per_token, _FAR)
        self.itl = Line(costs.itl_base, costs.itl_per_token, _MUCH)
        self.output = float(costs.expected_output)
        self.busy = self.full = 0.0
        self.prefills: Sequence[Candidate] = ()
        self.saved = costs.bypass_saved
        self.usual = 0.0

    @property
    def dearness(self) -> float:
        """How much an uncached token counts against one that is queued already."""
        return min(self.costs.dearest, 1 + self.full / max(1 - self.busy, 0.01))

    def apart(self, requests: float, held: float) -> float:
        """Give the seconds between tokens on a decode engine with so many requests and tokens."""
        return self.itl.base + self.costs.itl_per_request * requests + self.itl.slope * held


class PdCost:
    """The engine with the least predicted time."""

    name = "pd_cost"
    uses_key = False

    def __init__(
        self, role: RoleName, draw: random.Random, learned: Learned, clock: Callable[[], float] = time.monotonic,
        workers: int = 1,
    ) -> None:  # fmt: skip
        """Prepare.

        Args:
            role: whose engines are chosen from.
            draw: for ties.
            learned: what both roles know.
            clock: seconds from any beginning.
            workers: processes that choose as this one does.
        """
        self._prefill = role == "prefill"
        self._draw = draw
        self._clock = clock
        self._chose = clock()
        self._share = learned.costs.bypass_share / workers
        self.learned = learned
        self.index = learned.indexes[role]

    @classmethod
    def of(cls, role: RoleName, commons: Commons, costs: Costs | None = None) -> "PdCost":
        """Make a role's policy, which shares what it learns with the other role's."""
        learned = commons.shared.get("pd_cost")
        if learned is None:
            learned = commons.shared["pd_cost"] = Learned(costs or Costs(), commons.block_tokens)
        assert isinstance(learned, Learned)
        return cls(role, commons.draw(), learned, commons.clock, commons.workers)

    def choose(self, request: Features, candidates: Sequence[C]) -> C:
        """Give the engine with the least cost, of equals one with the fewest requests."""
        chosen = idlest(candidates, self.scores(request, candidates), self._draw)
        if self._prefill:
            self.learned.prefills = candidates
            self._see_load(candidates)
        else:
            self._see_tokens(candidates)
        return chosen

    def _see_load(self, candidates: Sequence[Candidate]) -> None:
        """Learn how busy prefill engines are: who comes at random sees the average."""
        busy = 0
        for candidate in candidates:
            if candidate.queued_tokens > 0:
                busy += 1
        learned = self.learned
        learned.busy += _SMOOTH * (busy / len(candidates) - learned.busy)
        learned.full += _SMOOTH * ((busy == len(candidates)) - learned.full)

    def _see_tokens(self, candidates: Sequence[Candidate]) -> None:
        """Learn how far tokens usually are apart; allow for more waiting by the time answers took since last time."""
        now, learned, requests, held = self._clock(), self.learned, 0, 0
        for candidate in candidates:
            requests += candidate.in_flight
            held += candidate.held_tokens
        apart = learned.apart(requests / len(candidates), held / len(candidates))
        learned.usual += (_SMOOTH_USUAL if learned.usual else 1.0) * (apart - learned.usual)
        saved = learned.saved + self._share * (now - self._chose) * requests
        learned.saved = min(saved, learned.costs.bypass_saved)
        self._chose = now

    def scores(self, request: Features, candidates: Sequence[C]) -> list[float]:
        """Give the costs, negative, as seconds: until the first token (prefill), for each token (decode)."""
        uncached = self.index.uncached(request, candidates)
        return self._prefill_scores(candidates, uncached) if self._prefill else self._decode_scores(
            request, candidates, uncached
        )  # fmt: skip

    def _prefill_scores(self, candidates: Sequence[C], uncached: list[int]) -> list[float]:
        seconds, dearness = self.learned.prefill.slope, self.learned.dearness
        return [
            -(candidate.queued_tokens + dearness * own) * seconds
            for candidate, own in zip(candidates, uncached, strict=True)
        ]

    def _decode_scores(self, request: Features, candidates: Sequence[C], uncached: list[int]) -> list[float]:
        learned, costs = self.learned, self.learned.costs
        limit, output, tokens = request.max_tokens, learned.output, request.tokens
        if limit and limit < output:
            output = float(limit)
        needed = tokens + (limit or int(output))
        moving, computing, handed = learned.handoff.slope, learned.prefill.slope, self._handed(request)
        for_each = costs.itl_per_request + learned.itl.slope * (tokens + output / 2)
        loads = [(candidate.in_flight, candidate.held_tokens) for candidate in candidates]
        evenness = self._evenness(loads)
        scores = []
        for candidate, (requests, held), own in zip(candidates, loads, uncached, strict=True):
            seconds = evenness * (learned.apart(requests, held) + for_each)
            alone = own * computing * (1 + costs.parting + costs.stall_weight * requests)
            seconds += for_each * requests + (moving * own + (alone if alone < handed else handed)) / output
            over = self._over(candidate, held, needed)
            if over > 0:
                seconds += costs.no_room * (1 + over)
            scores.append(-seconds)
        return scores

    def _evenness(self, loads: Sequence[tuple[int, int]]) -> float:
        learned, costs, many = self.learned, self.learned.costs, len(loads)
        requests = held = 0
        for load in loads:
            requests += load[0]
            held += load[1]
        apart = learned.apart(requests / many, held / many)
        more = apart / learned.usual - costs.peak if learned.usual else 0.0
        return costs.evenness + (costs.peak_evenness * more if more > 0 else 0.0)

    def _handed(self, request: Features) -> float:
        """Give what it costs to let a prefill engine compute the prompt, as far as such engines are known."""
        learned = self.learned
        prefills, dearness = learned.prefills, learned.dearness
        if not prefills:
            return learned.handoff.base
        least = math.inf
        for candidate, own in zip(prefills, learned.indexes["prefill"].uncached(request, prefills), strict=True):
            least = min(least, candidate.queued_tokens + dearness * own)
        return least * learned.prefill.slope + learned.handoff.base

    def _over(self, candidate: Candidate, held: int, needed: int) -> float:
        """Give by how much of its KV cache an engine lacks room, as a share; 0 or less when it has room."""
        costs, size = self.learned.costs, candidate.kv_tokens
        if size <= 0:
            known = candidate.metrics_age < costs.fresh
            return candidate.kv_usage - costs.full if known else 0.0
        # Both counts may be below the truth: held tokens lack what was generated, a scrape lacks the newest requests.
        if held + needed > size:
            return (held + needed) / size - 1
        if candidate.metrics_age < costs.fresh:
            return candidate.kv_usage + needed / size - 1
        return 0.0

    def bypass(self, request: Features, prefill: Candidate, decode: Candidate) -> bool:
        """Say whether the decode engine serves alone what it can do quicker; a yes uses up what was saved for it."""
        learned, seconds = self.learned, self.learned.prefill.slope
        here = learned.indexes["decode"].uncached(request, (decode,))[0]
        waiting = decode.in_flight * here * seconds
        there = learned.indexes["prefill"].uncached(request, (prefill,))[0]
        handed = (prefill.queued_tokens + learned.dearness * there) * seconds
        handed += learned.handoff.base + learned.handoff.slope * here
        alone = (decode.queued_tokens + here * (1 + learned.costs.parting)) * seconds
        alone += learned.costs.stall_weight * waiting
        late = decode.in_flight * learned.costs.bypass_tokens * learned.apart(decode.in_flight, decode.held_tokens)
        spent = waiting if waiting > late else late
        if alone < handed and spent <= learned.saved:
            learned.saved -= spent
            return True
        return False

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

    def prefilled(self, uncached: int, seconds: float) -> None:
        """Learn what a prompt took that was alone on its engine."""
        self.learned.prefill.observe(uncached, seconds)

    def handed_over(self, uncached: int, seconds: float) -> None:
        """Learn what it took from the ticket to the first token."""
        self.learned.handoff.observe(uncached, seconds)

    def generated(self, held: float, tokens: int, seconds: float) -> None:
        """Learn how long answers are, and what this one took from its first to its last token."""
        learned = self.learned
        learned.output = max(1.0, learned.output + _SMOOTH * (tokens - learned.output))
        if tokens >= _SHORTEST:
            learned.itl.observe(held, seconds / (tokens - 1))
