"""Random prompts of an exact number of tokens."""

import random

from pdsim.engine.tokenizer import Tokenizer


def random_texts(count: int, tokens: int, seed: int) -> list[str]:
    """Make texts that the simulated model's tokenizer reads as exactly `tokens` tokens, the begin token included."""
    tokenizer = Tokenizer()
    # words that begin with a space stay apart when they are read again
    words = [text for token in tokenizer.words() if (text := tokenizer.text(token)).startswith(" ")]
    draw = random.Random(seed)
    return ["".join(draw.choices(words, k=max(tokens - 1, 0))) for _ in range(count)]


def random_ids(count: int, tokens: int, seed: int) -> list[list[int]]:
    """Make prompts of token ids that any model knows: below 8,000 and past the special tokens at the beginning."""
    draw = random.Random(seed)
    return [[draw.randrange(300, 8000) for _ in range(tokens)] for _ in range(count)]
