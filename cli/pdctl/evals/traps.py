"""Scores that look like scores and are none: chance level, empty or equal answers, prompts cut short."""

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from pdctl.evals.scores import Score

FEWEST = 20  # samples below which chance cannot be told from skill
SIGMAS = 2.0
_CHOSEN = ("acc", "exact_match")


def chances(samples: Iterable[dict[str, Any]]) -> dict[str, tuple[float, int]]:
    """Give each task's score by chance and its samples: one over the number of choices, 0 where texts are generated."""
    shares: dict[str, dict[int, float]] = defaultdict(dict)
    for sample in samples:
        kinds = sample.get("arguments") or sample.get("resps") or []
        choices = len(kinds) if _chooses(sample) else 0
        shares[sample["task"]][sample["doc_id"]] = 1 / choices if choices > 1 else 0.0
    return {task: (sum(by_doc.values()) / len(by_doc), len(by_doc)) for task, by_doc in shares.items()}


def _chooses(sample: dict[str, Any]) -> bool:
    first = (sample.get("filtered_resps") or [None])[0]
    return isinstance(first, list) and len(first) == 2 and not isinstance(first[0], str)


def by_chance(scores: list[Score], samples: Iterable[dict[str, Any]]) -> list[str]:
    """Say which tasks' scores are not above chance by two standard errors, all samples of a group taken together."""
    known = chances(samples)
    judged = [one for one in scores if not one.group and one.metric in _CHOSEN and one.task in known]
    chosen = [one for one in judged if known[one.task][0] > 0]
    written = [one for one in judged if known[one.task][0] == 0]
    return [text for some in (chosen, written) if (text := _judged(some, known)) is not None]


def _judged(scores: list[Score], known: dict[str, tuple[float, int]]) -> str | None:
    count = sum(known[one.task][1] for one in scores)
    if count < FEWEST:
        return None
    score = sum(one.value * known[one.task][1] for one in scores) / count
    chance = sum(known[one.task][0] * known[one.task][1] for one in scores) / count
    error = math.sqrt(chance * (1 - chance) / count)
    if score > chance + SIGMAS * error:
        return None
    names = sorted({one.task for one in scores})
    shown = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
    return (
        f"chance level: {score:.3f} over {count} samples of {shown}, where guessing gives {chance:.3f}; such a score "
        "says nothing about the model"
    )


def of_texts(answers: Iterable[dict[str, Any]]) -> list[str]:
    """Say it when generated texts are all empty or all the same."""
    texts = [str(one["text"] or "") for one in answers if one["kind"] == "generate_until"]
    if len(texts) < 5:
        return []
    if not any(text.strip() for text in texts):
        return [f"all {len(texts)} generated texts are empty"]
    if len(set(texts)) == 1:
        return [f"all {len(texts)} generated texts are the same"]
    return []
