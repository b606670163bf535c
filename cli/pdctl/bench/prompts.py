"""Random prompts of an exact number of tokens, as text or as ids, and prompts that share blocks as a trace says."""

from functools import lru_cache
from random import Random
from typing import Literal, Protocol

from pdctl.bench.trace import BLOCK, Line
from pdsim.engine.tokenizer import Tokenizer

KEPT_BLOCKS = 20_000


class Words(Protocol):
    """A way to write prompts."""

    def draw(
        self, seed: str, tokens: int, *, begins: bool = True, prefix: str = "", shared: int = 0
    ) -> str | list[int]:
        """Draw a prompt.

        Args:
            seed: of its content.
            tokens: its length; the shared prefix counts.
            begins: whether the server adds a begin token, which counts too.
            prefix: seed of the shared prefix.
            shared: its length.
        """

    def blocks(self, line: Line, seed: int) -> str | list[int]:
        """Write a trace's prompt: the same content for the same hash id."""


class Texts:
    """Texts that the simulated model's tokenizer reads as exactly so many tokens, the begin token included."""

    def __init__(self) -> None:
        tokenizer = Tokenizer()
        # words that begin with a space stay apart when they are read again
        self._words = [text for token in tokenizer.words() if (text := tokenizer.text(token)).startswith(" ")]
        self._block = lru_cache(KEPT_BLOCKS)(self._made)

    def _made(self, seed: str, tokens: int) -> list[str]:
        return Random(seed).choices(self._words, k=max(tokens, 0))

    def draw(self, seed: str, tokens: int, *, begins: bool = True, prefix: str = "", shared: int = 0) -> str:
        """Draw a prompt."""
        room = tokens - begins
        first = self._block(prefix, shared - begins)[:room] if shared else []
        return "".join(first) + "".join(self._made(seed, room - len(first)))

    def blocks(self, line: Line, seed: int) -> str:
        """Write a trace's prompt."""
        found = [word for block in line.hash_ids for word in self._block(f"{seed} {block}", BLOCK)]
        return "".join(found[: line.input_length - 1])  # the begin token is the server's


class Ids:
    """Token ids that any model knows: below 8,000 and past the special tokens at the beginning."""

    def __init__(self) -> None:
        self._block = lru_cache(KEPT_BLOCKS)(self._made)

    def _made(self, seed: str, tokens: int) -> list[int]:
        return Random(seed).choices(range(300, 8000), k=max(tokens, 0))

    def draw(self, seed: str, tokens: int, *, begins: bool = True, prefix: str = "", shared: int = 0) -> list[int]:
        """Draw a prompt; a server adds nothing to ids."""
        first = self._block(prefix, shared)[:tokens] if shared else []
        return first + self._made(seed, tokens - len(first))

    def blocks(self, line: Line, seed: int) -> list[int]:
        """Write a trace's prompt."""
        found = [token for block in line.hash_ids for token in self._block(f"{seed} {block}", BLOCK)]
        return found[: line.input_length]


@lru_cache(2)
def words_of(spelling: Literal["text", "ids"]) -> Words:
    """Give the way to write prompts."""
    return Texts() if spelling == "text" else Ids()
