"""Prompts and bodies."""

import random
from typing import Any

WORDS = (  # common in the text that the tokenizer was trained on
    "return over def in class brown quick dog dict value import the lazy fox list jumps self range print os"
).split()
WANT_TICKET: dict[str, Any] = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}
COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"


def prompt(seed: int, words: int = 200) -> str:
    """Give `words` random words, the same for the same seed."""
    draw = random.Random(seed)
    return " ".join(draw.choice(WORDS) for _ in range(words))


def completion(text: Any, **fields: Any) -> dict[str, Any]:
    """Make a body for /v1/completions at temperature 0."""
    return {"model": "tiny", "prompt": text, "max_tokens": 8, "temperature": 0} | fields
