"""The tokenizer of the simulated model: byte-level BPE with 8,000 entries in Hugging Face's format, shipped with it."""

import json
from functools import lru_cache
from importlib.resources import as_file, files
from typing import Any

from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer as BytePairs


class Tokenizer:
    """Text to token ids and back, with a chat template."""

    def __init__(self, vocabulary: int = 8192) -> None:
        folder = files("pdsim.engine") / "tokenizer"
        with as_file(folder / "tokenizer.json") as path:
            self._pairs = BytePairs.from_file(str(path))
        self.config: dict[str, Any] = json.loads((folder / "tokenizer_config.json").read_text())
        self.chat_template = (folder / "chat_template.jinja").read_text()
        self.vocabulary = vocabulary
        self.bos = self._id(self.config["bos_token"])
        self.eos = self._id(self.config["eos_token"])
        added = self._pairs.get_added_tokens_decoder()
        self.special = {int(token) for token in added}
        self.added_tokens = {str(number): token.content for number, token in added.items()}
        self._template = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(
            self.chat_template
        )

    def _id(self, token: str) -> int:
        number = self._pairs.token_to_id(token)
        if number is None:
            raise ValueError(f"the tokenizer has no token {token}")
        return int(number)

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Give the token ids of a text, led by the begin-of-sequence token when `special`."""
        return list(self._pairs.encode(text, add_special_tokens=special).ids)

    def decode(self, ids: list[int], skip_special: bool = False) -> str:
        """Give the text of token ids; ids beyond the tokenizer's own have none."""
        return str(self._pairs.decode(ids, skip_special_tokens=skip_special))

    @lru_cache(maxsize=16384)  # noqa: B019 one tokenizer lives as long as its process
    def text(self, token: int) -> str:
        """Give the text of one token, special tokens by name."""
        return self.decode([token])

    def piece(self, token: int) -> str:
        """Give a token as the vocabulary spells it (a space is `Ġ`)."""
        return self._pairs.id_to_token(token) or ""

    def words(self) -> list[int]:
        """Give the ids whose text is plain words: ASCII letters, perhaps behind a space."""
        found = []
        for token in range(self._pairs.get_vocab_size()):
            text = self.text(token)
            if token not in self.special and text.isascii() and len(text) > 1 and text.removeprefix(" ").isalpha():
                found.append(token)
        return found

    def chat(self, messages: list[dict[str, Any]], generation_prompt: bool, continue_final: bool) -> list[int]:
        """Render messages by the chat template and give their token ids."""
        text = self._template.render(
            messages=messages, add_generation_prompt=generation_prompt, bos_token=self.config["bos_token"]
        )
        if continue_final:
            last = str(messages[-1]["content"])
            text = text[: text.rindex(last) + len(last)]
        return self.encode(text, special=False)
