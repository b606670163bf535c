"""What policies may know of a request (`pdrouter.policies.choice.Features`), read from its body when they ask."""

import json
from array import array
from collections.abc import Iterable, Mapping
from typing import Any
from zlib import crc32

import orjson

from pdrouter.policies.block_chain import BlockChain, block_chain
from pdrouter.policies.routing_key import RoutingKey

_MOST_TOKENS = 1 << 31  # no engine generates as many: who allows more means no limit
BYTES_PER_TOKEN = 4  # of English text with Llama 3.1's tokenizer: 4.2 to 4.5
PICTURE = 1500  # tokens; the bytes of a picture, or of sound, say nothing of how many it takes
_END = b"\x01"


def _part(value: Any) -> bytes:
    if isinstance(value, str):
        return value.encode("utf-8", "surrogatepass")
    try:
        return orjson.dumps(value, option=orjson.OPT_SORT_KEYS)
    except TypeError:  # an integer above 64 bits
        return json.dumps(value, sort_keys=True).encode("utf-8", "surrogatepass")


def _message(message: Any) -> bytes:
    if not isinstance(message, Mapping):
        return _part(message) + _END
    rest = {name: value for name, value in message.items() if name not in ("role", "content")}
    more = _part(rest) if rest else b""
    return b"%b\x00%b\x00%b%b" % (_part(message.get("role")), _part(message.get("content")), more, _END)


def _messages(messages: Any) -> Iterable[bytes]:
    return map(_message, messages) if isinstance(messages, list) else (_part(messages),)


def _no_text(messages: Any) -> Iterable[Mapping[str, Any]]:
    """Give the parts of a conversation that are pictures or the like."""
    for message in messages if isinstance(messages, list) else ():
        content = message.get("content") if isinstance(message, Mapping) else None
        for part in content if isinstance(content, list) else ():
            if isinstance(part, Mapping) and not isinstance(part.get("text"), str):
                yield part


class Prompt:
    """A request as policies see it. `counted` is how many tokens the prompt has, once an engine has told; else 0."""

    __slots__ = ("_body", "_chain", "_prefix", "_tokens", "counted", "key", "session")

    def __init__(self, key: RoutingKey, body: Mapping[str, Any], session: str | None = None) -> None:
        """Prepare.

        Args:
            key: by which the request is recognised.
            body: its parsed JSON with one prompt, or an empty mapping for requests without a prompt.
            session: what it names as its session.
        """
        self.counted = 0
        self.key = key
        self.session = session
        self._body = body
        self._prefix: bytes | None = None
        self._chain: BlockChain | None = None
        self._tokens = -1

    @property
    def salt(self) -> Any:
        """The client's `cache_salt`."""
        return self._body.get("cache_salt")

    @property
    def prefix(self) -> bytes:
        """The prompt as bytes that begin alike where prompts do.

        Model, `cache_salt` and tools come first, for they change what the engine may reuse. The first two are no part
        of the prompt and so take one token's place: written out, they would be most of a short prompt, and all short
        prompts would seem alike. Text is UTF-8, a token id has four bytes; of a conversation each message ends with a
        byte that text cannot hold, so that the next turn's bytes begin with this turn's.
        """
        if self._prefix is None:
            body = self._body
            named = crc32(b"%b\x00%b" % (_part(body.get("model")), _part(body.get("cache_salt"))))
            first = named.to_bytes(BYTES_PER_TOKEN, "little")
            tools = body.get("tools")
            if tools is not None:
                first += _part(tools) + _END
            if "messages" in body:
                self._prefix = first + b"".join(_messages(body["messages"]))
            else:
                self._prefix = first + self._completion_prompt()
        return self._prefix

    def _completion_prompt(self) -> bytes:
        prompt = self._body.get("prompt")
        if isinstance(prompt, list) and len(prompt) == 1 and not isinstance(prompt[0], int):
            prompt = prompt[0]
        if isinstance(prompt, list):
            try:
                return array("I", prompt).tobytes()
            except (TypeError, OverflowError):
                return _part(prompt)
        return _part(prompt)

    @property
    def chain(self) -> BlockChain:
        """The prompt as blocks."""
        if self._chain is None:
            self._chain = block_chain(self.prefix)
        return self._chain

    @property
    def tokens(self) -> int:
        """How many tokens the prompt has, from its length."""
        if self._tokens < 0:
            prompt = self._body.get("prompt")
            if isinstance(prompt, str):
                size = len(prompt)
            elif self._body:
                size = len(self.prefix)
                for part in _no_text(self._body.get("messages")):
                    size += PICTURE * BYTES_PER_TOKEN - len(_part(part))
            else:
                size = 0
            self._tokens = max(1, size // BYTES_PER_TOKEN)
        return self._tokens

    @property
    def max_tokens(self) -> int:
        """How many tokens may be generated; 0 without a limit.

        What is no number of tokens is for the engine to refuse, and must not count as load meanwhile.
        """
        limit = self._body.get("max_completion_tokens") or self._body.get("max_tokens")
        return limit if isinstance(limit, int) and 0 < limit <= _MOST_TOKENS else 0

    def continued(self, text: bytes) -> bytes:
        """Give generated text as it will stand in the next turn's `prefix`."""
        return b"assistant\x00%b\x00%b" % (text, _END) if "messages" in self._body else text

    @property
    def choices(self) -> int:
        """How many answers are asked for; what is no such number is for the engine to refuse."""
        n = self._body.get("n")
        return n if isinstance(n, int) and n > 1 else 1
