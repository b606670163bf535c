"""The simulated language model: the next token as a function of the context that the KV cache really holds.

No weights: the digest of the context is hashed into a ranking of a few candidate tokens with falling log-probabilities.
Equal contexts give equal rankings on every engine and in every process; any difference in the KV content gives another.
Candidates are tokens whose text is whole ASCII, so that each token's text stands for itself.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from pdsim.engine.kv import mix

RANKED = 20  # candidates with a log-probability of their own; vLLM's default --max-logprobs
EOS_PERIOD = 256  # one context in this many ranks the end-of-sequence token first


@dataclass(frozen=True, slots=True)
class Scored:
    """A token with its log-probability and its rank (1 is the most likely)."""

    token: int
    logprob: float
    rank: int


class Language:
    """Rankings over a vocabulary.

    Args:
        words: token ids that may be generated.
        eos: the end-of-sequence token.
        vocabulary: number of token ids.

    """

    def __init__(self, words: list[int], eos: int, vocabulary: int) -> None:
        self._words = words
        self._count = len(words)
        self._eos = eos
        self._vocabulary = vocabulary

    def first(self, state: int, barred: Collection[int] = ()) -> int:
        """Give the most likely token in a context; tokens in `barred` are passed over."""
        if state % EOS_PERIOD == 0 and self._eos not in barred:
            return self._eos
        token = self._words[(state >> 8) % self._count]
        if barred and token in barred:
            return self.ranked(state, barred)[0].token
        return token

    def ranked(
        self,
        state: int,
        barred: Collection[int] = (),
        allowed: Collection[int] = (),
        bias: Mapping[int, float] | None = None,
    ) -> list[Scored]:
        """Rank the candidates of a context, the most likely first.

        Args:
            state: digest of the context.
            barred: tokens that cannot come now (`min_tokens` bars the end of the sequence).
            allowed: when given, the only tokens that can come (`allowed_token_ids`).
            bias: added to the log-probability of a token (`logit_bias`).

        """
        logprob = -0.2 - (state >> 40) % 2000 / 1000
        scores: dict[int, float] = {}
        if state % EOS_PERIOD == 0:
            scores[self._eos] = logprob
        words = sorted(allowed) if allowed else self._words
        draw = state
        for _ in range(min(RANKED, len(words)) * 3):
            token = words[(draw >> 8) % len(words)]
            if token not in scores:
                logprob -= 0.05 + (draw >> 20) % 400 / 1000 if scores else 0.0
                scores[token] = logprob
                if len(scores) == RANKED:
                    break
            draw = mix(draw, 1)
        if allowed:
            scores = {token: score for token, score in scores.items() if token in allowed}
        for token, added in (bias or {}).items():
            scores[token] = scores.get(token, self.logprob(state, token).logprob) + added
        usable = [(score, token) for token, score in scores.items() if token not in barred]
        usable.sort(key=lambda pair: (-pair[0], pair[1]))
        return [Scored(token, score, rank) for rank, (score, token) in enumerate(usable, 1)]

    def logprob(self, state: int, token: int) -> Scored:
        """Score one token, ranked or not, in a context."""
        for scored in self.ranked(state):
            if scored.token == token:
                return scored
        draw = mix(state, token)
        return Scored(token, -8.0 - draw % 16000 / 1000, RANKED + 1 + draw % (self._vocabulary - RANKED))

    def sample(self, ranked: list[Scored], temperature: float, top_p: float, top_k: int, draw: int) -> Scored:
        """Sample a candidate.

        Args:
            ranked: candidates of the context.
            temperature: above 0; it flattens the distribution.
            top_p: smallest share of probability to keep.
            top_k: candidates to keep; 0 or less keeps all.
            draw: 64 random bits.

        """
        kept = ranked[:top_k] if top_k > 0 else ranked
        weights = [math.exp((scored.logprob - kept[0].logprob) / temperature) for scored in kept]
        total, share, end = sum(weights), 0.0, len(weights)
        for index, weight in enumerate(weights):
            share += weight / total
            if share >= top_p:
                end = index + 1
                break
        point = draw / 2**64 * sum(weights[:end])
        for scored, weight in zip(kept[:end], weights[:end], strict=True):
            point -= weight
            if point < 0:
                return scored
        return kept[end - 1]
