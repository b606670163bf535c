"""Requests with prompts that no engine has seen."""

import random
from typing import Any

from support.requests import CHAT, COMPLETIONS, completion, prompt

_numbers = random.SystemRandom().sample(range(10**6, 10**9), 1000)


def fresh(words: int = 150) -> str:
    """Give a prompt that no engine has cached, not even its first block."""
    number = _numbers.pop()
    return f"{number} {prompt(number, words)}"


def text(words: int = 150, **fields: Any) -> tuple[str, dict[str, Any]]:
    return COMPLETIONS, completion(fresh(words), **fields)


def chat(words: int = 150, **fields: Any) -> tuple[str, dict[str, Any]]:
    messages = [{"role": "system", "content": "you are"}, {"role": "user", "content": fresh(words)}]
    return CHAT, {"model": "tiny", "messages": messages, "max_tokens": 8, "temperature": 0} | fields


def ids(count: int) -> list[int]:
    draw = random.Random(_numbers.pop())
    return [draw.randrange(300, 8000) for _ in range(count)]
