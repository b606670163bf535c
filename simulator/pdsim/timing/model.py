"""The time model: an engine step, the frontend, a KV transfer.

A step streams the weights or computes the new tokens, whichever lasts longer, and adds what attention costs: for new
tokens by the pairs they form, for decoding sequences by the KV they read. Coefficients are fitted by
`scripts/fit_timing.py` to the figures in `h200.json`; `python -m pdsim.timing` shows both side by side.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

PROFILES = ("h200", "h100")  # the second is derived from the first, as its file tells


class Chunk(NamedTuple):
    """Prompt tokens of one request that one step computes.

    Args:
        new_tokens: tokens computed now.
        context: tokens of the same request already in the KV cache.
    """

    new_tokens: int
    context: int


@dataclass(frozen=True, slots=True)
class Profile:
    """Coefficients of one GPU serving one model; all times in seconds.

    Args:
        name: the profile's name.
        frontend_base: HTTP, validation and hand-over of a request, whatever its length.
        frontend_per_token: the part that grows with a prompt of token ids (parsing, block hashes).
        tokenize_window: how long the tokenizer waits for more texts to take together (vLLM's
            AsyncMicrobatchTokenizer); requests that come within it reach the scheduler together.
        tokenize_per_token: tokenizing and hashing one token of text.
        answer: from the end of a step to bytes on the socket.
        decode_base: a step that only decodes, at batch 0: weights, launches, scheduler.
        decode_per_sequence: added by each decoding sequence (sampling, bookkeeping).
        decode_per_sequence_squared: growth of that cost with the batch.
        decode_per_context_token: reading one token's KV.
        prefill_base: what every step with prompt tokens costs beside its compute.
        prefill_floor: least compute time of such a step (weights are streamed once).
        prefill_per_token: compute of one new token when the step is compute-bound.
        pair: attention of one new token to one earlier token of the same chunk.
        context_pair: the same to a token that is already in the cache.
        context_base: added when any chunk has such context.
        transfer_base: a KV transfer of no tokens (descriptors, posting, completion).
        transfer_per_token: moving one token's KV while the link is free.
        transfer_share: how much each other transfer under way stretches the moving.
        transfer_notice: from the end of the first transfer to the scheduler's next look; it then sees all that ended.
        kv_bytes_per_token: KV cache of one token.
        kv_cache_tokens: tokens the KV cache has room for.
        max_num_batched_tokens: tokens of one step (vLLM's default on this GPU).
        decode_join: what each sequence adds to the step in which it joins a batch with its prompt in the cache already:
            the engine takes in its tokens and block table while all others wait.
    """

    name: str
    frontend_base: float
    frontend_per_token: float
    tokenize_window: float
    tokenize_per_token: float
    answer: float
    decode_base: float
    decode_per_sequence: float
    decode_per_sequence_squared: float
    decode_per_context_token: float
    prefill_base: float
    prefill_floor: float
    prefill_per_token: float
    pair: float
    context_pair: float
    context_base: float
    transfer_base: float
    transfer_per_token: float
    transfer_share: float
    transfer_notice: float
    kv_bytes_per_token: int
    kv_cache_tokens: int
    max_num_batched_tokens: int
    decode_join: float = 0.0

    def step_seconds(self, chunks: Sequence[Chunk], decode_seqs: int, decode_context: int, joining: int = 0) -> float:
        """Give the time of one engine step.

        Args:
            chunks: the prompt tokens it computes.
            decode_seqs: sequences that get one more token.
            decode_context: tokens in the KV cache of these, summed.
            joining: how many of these get their first token.
        """
        decoding = (
            (self.decode_per_sequence + self.decode_per_sequence_squared * decode_seqs) * decode_seqs
            + self.decode_per_context_token * decode_context
            + self.decode_join * joining
        )
        if not chunks:
            return self.decode_base + decoding
        new = pairs = context_pairs = 0
        for chunk in chunks:
            new += chunk.new_tokens
            pairs += chunk.new_tokens * chunk.new_tokens
            context_pairs += chunk.new_tokens * chunk.context
        seconds = self.prefill_base + max(self.prefill_floor, self.prefill_per_token * new)
        seconds += self.pair * pairs / 2 + decoding
        if context_pairs:
            seconds += self.context_base + self.context_pair * context_pairs
        return seconds

    def decode_run(self, sequences: int, context: int) -> tuple[float, float]:
        """Give the time of a step that only decodes, and by how much each later one is longer while nobody joins.

        `k` such steps in a row take `k * first + growth * k * (k - 1) / 2`, the sum of `step_seconds` over them: each
        makes the context longer by a token for each sequence.
        """
        first = self.decode_base + self.decode_per_context_token * context
        first += (self.decode_per_sequence + self.decode_per_sequence_squared * sequences) * sequences
        return first, self.decode_per_context_token * sequences

    def frontend_seconds(self, prompt_tokens: int) -> float:
        """Give the time from the arrival of a prompt of token ids to its being in the scheduler's queue."""
        return self.frontend_base + self.frontend_per_token * prompt_tokens

    def tokenize_seconds(self, prompt_tokens: int) -> float:
        """Give the time from the end of the window to the scheduler's queue, by the longest text of a batch."""
        return self.tokenize_per_token * prompt_tokens

    def answer_seconds(self) -> float:
        """Give the time from the end of a step to bytes on the socket."""
        return self.answer

    def transfer_seconds(self, tokens: int, in_flight: int) -> float:
        """Give the time of moving the KV of `tokens` while `in_flight` other transfers are under way.

        It is what `vllm:nixl_xfer_time_seconds` counts; the scheduler learns of it `transfer_notice` later.
        """
        return self.transfer_base + self.transfer_per_token * tokens * (1 + self.transfer_share * in_flight)


@cache
def _known() -> dict[str, Profile]:
    folder = files("pdsim.timing")
    found = {}
    for name in PROFILES:
        told = json.loads((folder / f"{name}.json").read_text())
        found[name] = Profile(name=name, **told["model"])
    return found


def load_profile(name: str) -> Profile:
    """Give a profile by name, or out of a file that `pdctl calibrate` wrote.

    Raises:
        ValueError: there is none of that name, or the file has none.
    """
    known = _known().get(name)
    if known is not None:
        return known
    path = Path(name)
    if path.suffix != ".json":
        raise ValueError(f"no timing profile {name!r}; known: {', '.join(_known())}, or a file NAME.json")
    try:
        return Profile(name=path.stem, **json.loads(path.read_text())["model"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{name} has no timing profile: {error}") from None
