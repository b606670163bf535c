"""vllm-router's `cache_aware`: the longest known prefix while loads are even, the least loaded engine otherwise.

Formulas: vllm-project/router 0.1.17 `src/policies/cache_aware.rs` (the way it takes for P/D, with tokenized prompts):
loads are uneven when `max - min > 64` and `max > 1.5 * min`. Then, or when no engine has had more than 0.3 of the
prompt's tokens, the engine with the fewest requests gets it, of equals the one listed first; otherwise the one with
fewest requests of those that have had most. Thresholds are those of its command line (its library has 32, 1.1, 0.5).

What engines have had is kept in a tree of texts. Every 120 s, engines over 2^25 characters lose the leaves that were
used longest ago. Here it is bytes of `Features.prefix` instead of characters of token ids in hexadecimal, four a token
instead of eight, and the first request after the 120 s pays for the clearing instead of a thread.

Known flaws, kept:
    - the tree tells what was sent, not what the KV cache still has: 2^25 bytes are 8 million tokens, ten times what an
      H200 holds beside an 8B model;
    - generated text is not recorded;
    - requests are counted, not their tokens, so one engine may get all long prompts;
    - at low load nothing spreads: a prefix shared by all (a system prompt over 0.3 of each prompt) sends everything to
      one engine until it has 64 requests more than another;
    - the bound is checked only every 120 s, and up to 32 MB for each engine are kept by design.
"""

import heapq
import time
from collections.abc import Callable, Sequence

from pdrouter.policies.choice import C, Candidate, Features

MOST_APART = 64
MOST_TIMES = 1.5
LEAST_MATCH = 0.3
CLEAR_SECONDS = 120.0
MOST_BYTES = 2**25
BYTES_PER_TOKEN = 4


def _common(one: bytes, other: bytes) -> int:
    """Give the length of the common beginning, which is found by halving as comparing bytes is quick."""
    low, high = 0, min(len(one), len(other))
    if one[:high] == other[:high]:
        return high
    while high - low > 1:
        middle = (low + high) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle
    return low


class _Node:
    __slots__ = ("children", "text", "used")

    def __init__(self, text: bytes, used: dict[str, int]) -> None:
        self.text = text
        self.used = used  # when each engine used it, as a count of insertions
        self.children: dict[int, _Node] = {}


class TextTree:
    """A radix tree of texts that knows which engines have had which."""

    def __init__(self) -> None:
        self._root = _Node(b"", {})
        self._count = 0
        self.sizes: dict[str, int] = {}

    def matches(self, text: bytes) -> dict[str, int]:
        """Give how many bytes of the text's beginning each engine has had; engines without any may be missing."""
        found: dict[str, int] = {}
        node, at = self._root, 0
        while at < len(text):
            child = node.children.get(text[at])
            if child is None:
                break
            whole = text.startswith(child.text, at)
            at += len(child.text) if whole else _common(child.text, text[at : at + len(child.text)])
            for engine in child.used:
                found[engine] = at
            if not whole:
                break
            node = child
        return found

    def insert(self, text: bytes, engine: str) -> None:
        """Record that the engine has had the text."""
        self._count += 1
        sizes = self.sizes
        sizes.setdefault(engine, 0)
        node, at = self._root, 0
        while at < len(text):
            child = node.children.get(text[at])
            if child is None:
                node.children[text[at]] = _Node(text[at:], {engine: self._count})
                sizes[engine] += len(text) - at
                return
            if not text.startswith(child.text, at):
                common = _common(child.text, text[at : at + len(child.text)])
                upper = _Node(child.text[:common], dict(child.used))
                child.text = child.text[common:]
                upper.children[child.text[0]] = child
                node.children[text[at]] = child = upper
            if engine not in child.used:
                # Only the end of a text is dated; what is before it is no leaf and cannot be cleared.
                child.used[engine] = 0
                sizes[engine] += len(child.text)
            at += len(child.text)
            node = child
        if node is not self._root:
            node.used[engine] = self._count

    def clear(self, most: int) -> None:
        """Take from engines with more than `most` bytes the leaves that they used longest ago."""
        over = {engine for engine, size in self.sizes.items() if size > most}
        if not over:
            return
        parents: dict[int, _Node] = {}
        leaves: list[tuple[int, int, str, _Node]] = []
        stack = [self._root]
        while stack:
            node = stack.pop()
            for child in node.children.values():
                parents[id(child)] = node
                stack.append(child)
            leaves.extend((when, id(node), engine, node) for engine, when in node.used.items()
                          if engine in over and self._leaf(node, engine))  # fmt: skip
        heapq.heapify(leaves)
        while leaves and over:
            _, _, engine, node = heapq.heappop(leaves)
            if engine not in over:
                continue
            parent = parents[id(node)]
            self._take(node, engine, parent)
            if self.sizes[engine] <= most:
                over.discard(engine)
            elif engine in parent.used and self._leaf(parent, engine):
                heapq.heappush(leaves, (parent.used[engine], id(parent), engine, parent))

    @staticmethod
    def _leaf(node: _Node, engine: str) -> bool:
        return all(engine not in child.used for child in node.children.values())

    def _take(self, node: _Node, engine: str, parent: _Node) -> None:
        del node.used[engine]
        self.sizes[engine] -= len(node.text)
        if not node.used and not node.children:
            del parent.children[node.text[0]]

    def remove(self, engine: str) -> None:
        """Forget all of an engine."""
        self.sizes.pop(engine, None)
        nodes = [(self._root, child) for child in self._root.children.values()]
        for _, node in nodes:  # grows while it is walked; parents come before children
            nodes.extend((node, child) for child in node.children.values())
        for parent, node in reversed(nodes):
            node.used.pop(engine, None)
            if not node.used and not node.children:
                del parent.children[node.text[0]]


class CacheAware:
    """The engine that has had most of the prompt, or the least loaded."""

    name = "cache_aware"
    uses_key = False

    def __init__(self, clock: Callable[[], float] = time.monotonic, most_bytes: int = MOST_BYTES) -> None:
        """Prepare.

        Args:
            clock: seconds from any beginning.
            most_bytes: what an engine may have in the tree after each clearing.
        """
        self._clock = clock
        self._most_bytes = most_bytes
        self._cleared = clock()
        self._last: tuple[bytes, dict[str, int]] = (b"", {})
        self.tree = TextTree()

    def choose(self, request: Features, candidates: Sequence[C]) -> C:
        """Give the engine by prefix or by load."""
        scores = self.scores(request, candidates)
        return candidates[scores.index(max(scores))]

    def scores(self, request: Features, candidates: Sequence[C]) -> list[float]:
        """Give the requests in flight, negative; minus infinity for engines out of the choice."""
        loads = [candidate.in_flight for candidate in candidates]
        scores = [-float(load) for load in loads]
        least, most = min(loads), max(loads)
        if most - least > MOST_APART and most > MOST_TIMES * least:
            return scores
        rates = self._rates(request, candidates)
        best = max(rates)
        if best > LEAST_MATCH:
            return [score if rate == best else float("-inf") for score, rate in zip(scores, rates, strict=True)]
        return scores

    def _rates(self, request: Features, candidates: Sequence[Candidate]) -> list[float]:
        prefix = request.prefix
        total = len(prefix) // BYTES_PER_TOKEN
        if not total:
            return [0.0] * len(candidates)
        matches = self._matches(prefix)
        return [matches.get(candidate.name, 0) // BYTES_PER_TOKEN / total for candidate in candidates]

    def _matches(self, prefix: bytes) -> dict[str, int]:
        last, matches = self._last
        if last is not prefix:
            matches = self.tree.matches(prefix)
            self._last = prefix, matches
        return matches

    def uncached(self, request: Features, candidate: Candidate) -> int:
        """Estimate how many of the prompt's tokens the engine has not had: at least one."""
        size = len(request.prefix)
        cached = request.tokens * self._matches(request.prefix).get(candidate.name, 0) // size if size else 0
        return max(1, request.tokens - cached)

    def routed(self, request: Features, candidate: Candidate) -> None:
        """Record the prompt, whether load or prefix decided."""
        self.tree.insert(request.prefix, candidate.name)
        now = self._clock()
        if now - self._cleared >= CLEAR_SECONDS:
            self._cleared = now
            self.tree.clear(self._most_bytes)
        self._last = b"", {}

    def answered(self, request: Features, candidate: Candidate, generated: bytes) -> None:
        """Record nothing: vllm-router does not know what is generated."""

    def gone(self, candidate: Candidate) -> None:
        """Forget the engine."""
        self.tree.remove(candidate.name)
        self._last = b"", {}
