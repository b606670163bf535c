"""llm-d's scorers and its affinity filter as plain formulas. Scores are from 0 (worst) to 1.

Source: llm-d-router (commit ebab6879) `pkg/epp/framework/plugins/scheduling/`, whose folder each function names.
"""

from collections.abc import Sequence

MOST_TOKENS = 4_194_304  # queueThresholdTokens of the token-load scorer
STICKY_SHARE = 0.80  # affinityThreshold
MOST_PENALTY_MS = 18_000.0  # maxTTFTPenaltyMs
PEAK_PREFILL = 33_821.0  # peakPrefillThroughput of the guide, tokens/s (gpt-oss-120b, one H200)


def queue_depth(waiting: Sequence[float]) -> list[float]:
    """`scorer/queuedepth`: the shortest queue among the candidates 1, the longest 0; all 1 when equal."""
    longest, shortest = max(waiting), min(waiting)
    spread = longest - shortest
    return [(longest - queue) / spread for queue in waiting] if spread > 0 else [1.0] * len(waiting)


def kv_room(usage: Sequence[float]) -> list[float]:
    """`scorer/kvcacheutilization`: the free share of the KV cache."""
    return [1.0 - used if used < 1.0 else 0.0 for used in usage]


def prefix_match(matches: Sequence[int], total: int) -> list[float]:
    """`scorer/prefix` with `matchLengthWeight` 0: the share of the prompt's blocks that the engine has."""
    return [match / total for match in matches] if total else [0.0] * len(matches)


def token_load(tokens: Sequence[int]) -> list[float]:
    """`scorer/tokenload`: 1 for no uncached tokens in flight (this request's included), 0 for 4,194,304 or more."""
    return [1.0 - min(count, MOST_TOKENS) / MOST_TOKENS for count in tokens]


def active_requests(in_flight: Sequence[int]) -> list[float]:
    """`scorer/activerequest` with thresholds 0 and 1: an idle engine 1, the busiest 0."""
    most = max(in_flight)
    return [(most - count) / most if count > 0 else 1.0 for count in in_flight]


def sticky(
    matches: Sequence[int],
    total: int,
    tokens: Sequence[int],
    share: float = STICKY_SHARE,
    most_penalty_ms: float = MOST_PENALTY_MS,
    peak: float = PEAK_PREFILL,
) -> list[bool]:
    """`filter/prefixcacheaffinity`: say which engines stay in the choice.

    Engines that have at least `share` of the prompt's blocks stay alone, unless the quickest of them would give the
    first token over `most_penalty_ms` later than the quickest of the others. The time to the first token is taken to be
    the tokens in flight divided by the peak throughput: what this request itself would cost on either is left out,
    which is a flaw of the original.

    Args:
        matches: matched blocks of each engine.
        total: blocks of the prompt.
        tokens: uncached tokens in flight on each engine.
        share: how much of a prompt an engine must have.
        most_penalty_ms: how much longer a first token may take for the cache's sake.
        peak: prompt tokens that an engine computes in a second.
    """
    near = [total > 0 and match / total >= share for match in matches]
    if all(near) or not any(near):
        return [True] * len(matches)
    here = min(count for count, stays in zip(tokens, near, strict=True) if stays)
    elsewhere = min(count for count, stays in zip(tokens, near, strict=True) if not stays)
    if (here - elsewhere) / peak * 1000 > most_penalty_ms:
        return [True] * len(matches)
    return near
