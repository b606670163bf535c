"""The same items through prefill and decode and through one engine: equal to the last bit, or where not."""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

SHOWN = 60  # characters of a text around the first difference


@dataclass(frozen=True, slots=True)
class Parity:
    """How two sets of answers compare.

    Args:
        compared: prompts that both answered.
        texts_differ: prompts with another text.
        logprobs_differ: prompts with another log-probability of a token.
        largest: the largest difference of a log-probability.
        missing: prompts that only one of them answered.
        examples: the first differences.
    """

    compared: int
    texts_differ: int
    logprobs_differ: int
    largest: float
    missing: int
    examples: list[str]

    @property
    def exact(self) -> bool:
        """Whether everything is equal."""
        return not (self.texts_differ or self.logprobs_differ or self.missing) and self.compared > 0

    def told(self) -> dict[str, Any]:
        """Give it as JSON."""
        return asdict(self) | {"exact": self.exact}


def parity(one: Iterable[dict[str, Any]], other: Iterable[dict[str, Any]], most: int = 10) -> Parity:
    """Compare answers by prompt."""
    first = {answer["prompt"]: answer for answer in one}
    second = {answer["prompt"]: answer for answer in other}
    texts = logprobs = 0
    largest = 0.0
    examples = []
    for prompt in first.keys() & second.keys():
        a, b = first[prompt], second[prompt]
        if a["kind"] == "generate_until":
            if a["text"] != b["text"]:
                texts += 1
                examples.append(f"prompt {prompt}: {_apart(a['text'] or '', b['text'] or '')}")
            continue
        if a["logprobs"] != b["logprobs"]:
            logprobs += 1
            gap, at = _gap(a["logprobs"], b["logprobs"])
            largest = max(largest, gap)
            examples.append(
                f"prompt {prompt}: token {at + 1} of {len(a['logprobs'])}, log-probabilities {gap:.3g} apart"
            )
    return Parity(
        len(first.keys() & second.keys()), texts, logprobs, largest, len(first.keys() ^ second.keys()), examples[:most]
    )


def _gap(one: list[float], other: list[float]) -> tuple[float, int]:
    if len(one) != len(other):
        return math.inf, min(len(one), len(other))
    gaps = [abs(a - b) for a, b in zip(one, other, strict=True)]
    return max(gaps), next(number for number, gap in enumerate(gaps) if gap)


def _apart(one: str, other: str) -> str:
    at = next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    begin = max(0, at - SHOWN // 2)
    return f"at character {at}: {one[begin : at + SHOWN // 2]!r} and {other[begin : at + SHOWN // 2]!r}"
