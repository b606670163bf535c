"""Text of generated tokens as vLLM 0.32 gives it, one token at a time.

A token may hold a part of a character only. Its bytes are held back until a later token completes the character; what
is never completed is never given. Two habits of the real one (`v1/engine/detokenizer.py`, `v1/engine/logprobs.py`),
which somebody meets who continues a stream from its token ids, are here on purpose: a prompt that ends within a
character makes the first text begin with the text of the whole prompt, and beside a score such a token is named by
what it adds to those before it.
"""

from collections.abc import Sequence

from pdsim.engine.tokenizer import Tokenizer

UNFINISHED = "\ufffd"  # what a decoder puts for bytes that are no character
_CONTEXT = 4  # tokens before one that may belong to its character: UTF-8 has no longer ones


class Detokenizer:
    """The text of one sequence as it grows.

    Args:
        tokenizer: knows what tokens mean.
        texts: the text of each token alone, without special ones when these are skipped.
        prompt: the sequence's prompt.
        skip_special: whether special tokens have no text.

    """

    __slots__ = ("_pending", "_skip_special", "_texts", "_tokenizer")

    def __init__(self, tokenizer: Tokenizer, texts: Sequence[str], prompt: list[int], skip_special: bool) -> None:
        self._tokenizer = tokenizer
        self._texts = texts
        self._skip_special = skip_special
        self._pending: list[int] = []
        ends_unfinished = bool(prompt) and texts[prompt[-1]].endswith(UNFINISHED)
        if ends_unfinished and tokenizer.decode(prompt, skip_special).endswith(UNFINISHED):
            self._pending = list(prompt)

    def step(self, token: int) -> str:
        """Give the text that a token adds."""
        if not self._pending and not self._texts[token].endswith(UNFINISHED):
            return self._texts[token]
        self._pending.append(token)
        text = self._tokenizer.decode(self._pending, self._skip_special)
        if text.endswith(UNFINISHED):
            return ""
        self._pending = []
        return text


def name(tokenizer: Tokenizer, token: int, before: Sequence[int]) -> str:
    """Give a token's text beside its score; `before` are the tokens that were generated before it."""
    text = tokenizer.text(token)
    if not text.endswith(UNFINISHED):
        return text
    for count in range(1, min(len(before), _CONTEXT) + 1):
        context = list(before[-count:])
        whole = tokenizer.decode([*context, token])
        if whole.endswith(UNFINISHED):
            continue
        while context and tokenizer.text(context[-1]).endswith(UNFINISHED):
            del context[-1]
        return whole.removeprefix(tokenizer.decode(context)) if context else whole
    return ""
