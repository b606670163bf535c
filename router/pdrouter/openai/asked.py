"""What a request asks for, as far as the router must know, and whether its JSON is one that anybody should read."""

import json
import re
from collections.abc import Mapping
from typing import Any

import orjson

from pdrouter.openai.errors import RequestError
from pdrouter.openai.legs import encoded, without_transfers

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
DEEPEST = 100  # objects and lists within one another; schemas of tools have ten or twenty, orjson writes up to 254
MOST_VALUES = 2 * 1024 * 1024  # a batch of 1024 prompts of 2000 token ids
_BEYOND = float(2**63)
MOST_CONTAINERS = 32 * 1024  # objects and lists; each takes 60 to 230 bytes and as much time as a kilobyte of text
_NO_MARKS = bytes(byte for byte in range(256) if byte not in b",[{")
_NO_BRACKETS = bytes(byte for byte in range(256) if byte not in b"[{")
_TEXT = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)  # its end may be missing: else it would be tried anew
_TRUE = frozenset(("1", "t", "true", "y", "yes", "on"))  # in any case, as pydantic reads them for vLLM
_FALSE = frozenset(("0", "f", "false", "n", "no", "off"))
_FORMS = (b"multipart/form-data", b"application/x-www-form-urlencoded")


class Asked:
    """A request body read once.

    `body` and `bare`, its JSON, are without what a client may not set (`pdrouter.openai.legs`), and `stream` in them is
    a boolean however the client has spelled it, unless no engine would take that. `alone` is the reason
    why one engine must serve it without a handoff, or None. `prompts` has the prompts of a batch, which become one
    handoff each, or is None.
    """

    __slots__ = ("alone", "bare", "body", "prompts", "stream")

    def __init__(
        self, body: dict[str, Any], bare: bytes, alone: str | None, prompts: list[Any] | None, stream: bool
    ) -> None:
        self.body = body
        self.bare = bare
        self.alone = alone
        self.prompts = prompts
        self.stream = stream


def _many_brackets(raw: bytes) -> bool:
    """Tell whether JSON has so many brackets that it could be nested too deeply; those inside of texts count."""
    return raw.count(b"{") + raw.count(b"[") > DEEPEST


def _many_containers(raw: bytes) -> bool:
    if len(raw.translate(None, _NO_BRACKETS)) <= MOST_CONTAINERS:
        return False
    return len(_TEXT.sub(b"", raw).translate(None, _NO_BRACKETS)) > MOST_CONTAINERS


def _deep(value: Any) -> bool:
    level = [value]
    for _ in range(DEEPEST):
        below: list[Any] = []
        for one in level:
            below.extend(inner for inner in (one.values() if isinstance(one, dict) else one)
                         if isinstance(inner, dict | list))  # fmt: skip
        if not below:
            return False
        level = below
    return True


def _exactly(raw: bytes) -> dict[str, Any]:
    try:
        told: dict[str, Any] = json.loads(raw)
    except (ValueError, RecursionError) as error:  # a number of thousands of digits
        raise RequestError(400, f"The body is not JSON that can be read: {error}") from None
    return told


def parsed(raw: bytes) -> dict[str, Any]:
    """Parse a body.

    A body of 64 MiB in tiny values would take gigabytes and stop all other requests for half a minute, so it is looked
    at before it is parsed.

    Raises:
        RequestError: it is no JSON object, has too many values or is nested too deeply.
    """
    if len(raw) > MOST_VALUES and len(raw.translate(None, _NO_MARKS)) > MOST_VALUES:
        raise RequestError(400, f"The body may have {MOST_VALUES:,} values.")
    if len(raw) > MOST_CONTAINERS and _many_containers(raw):
        raise RequestError(400, f"The body may have {MOST_CONTAINERS:,} objects and lists.")
    try:
        body = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise RequestError(400, f"The body is not valid JSON: {error}") from None
    if not isinstance(body, dict):
        raise RequestError(400, "The body must be a JSON object.")
    told: dict[str, Any] = body
    exact = nested = False
    for value in told.values():
        if isinstance(value, dict | list):
            nested = True
        # orjson makes floats of integers above 64 bits. Python's own parser does not, and is ten times as slow.
        elif isinstance(value, float) and (value >= _BEYOND or value <= -_BEYOND):
            exact = True
    if nested and _many_brackets(raw) and _deep(body):
        raise RequestError(400, f"The body may have {DEEPEST} objects and lists within one another.")
    return _exactly(raw) if exact else told


def passed(kind: bytes, raw: bytes) -> bytes:
    """Give the body of a request that goes on as it is: its very bytes, without what a client may not set.

    Args:
        kind: the media type that it is sent with.
        raw: the body.

    Raises:
        RequestError: it is JSON that the router cannot read, so that nobody knows what an engine would read in it.
    """
    if not raw or kind.lower().startswith(_FORMS):
        return raw
    return without_transfers(parsed(raw), raw)


def read(path: str, raw: bytes, most_prompts: int) -> Asked:
    """Read the body of a request for text.

    Args:
        path: the request's.
        raw: the body.
        most_prompts: how many prompts it may have.

    Raises:
        RequestError: it cannot be parsed or has too many prompts; what its fields hold is for the engine to judge.
    """
    if not raw:
        raise RequestError(400, "The request has no body; send a JSON object.")
    body = parsed(raw)
    bare = without_transfers(body, raw)
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) > most_prompts and not _ids(prompt):
        raise RequestError(400, f"A request may have {most_prompts} prompts; this one has {len(prompt)}.", "prompts")
    stream = body.get("stream")
    if not isinstance(stream, bool | None) and (meant := truth(stream)) is not None:
        body["stream"] = stream = meant
        bare = encoded(body)
    prompts = _batch(body) if path == COMPLETIONS else None
    return Asked(body, bare, why_alone(body), prompts, stream is True)


def truth(value: Any) -> bool | None:
    """Give what vLLM reads where a boolean belongs (pydantic's lax mode), or None for what it refuses."""
    told = value.lower() if isinstance(value, str) else str(int(value)) if value in (0, 1) else ""
    return True if told in _TRUE else False if told in _FALSE else None


def why_alone(body: Mapping[str, Any]) -> str | None:
    """Say why a request is not for two engines, or None.

    Scores of the prompt make vLLM 0.32 compute the prompt again on decode and drop what was transferred
    (`skip_reading_prefix_cache`), so a handoff is wasted; with `max_tokens` 0 nothing is left to decode. Beam search
    and several choices start many generations from one request, of which a ticket can serve one: each choice fetches
    for itself, and the first that has done so frees the blocks, which may hold another prompt when the next one has
    room. Embedded prompts and mixed batches have no single prompt to hand over.
    """
    if not body:
        return "empty_body"
    if body.get("prompt_logprobs") is not None:
        return "prompt_logprobs"
    if body.get("echo") and body.get("logprobs") is not None:
        return "echo_logprobs"
    if body.get("max_tokens") == 0 or body.get("max_completion_tokens") == 0:
        return "max_tokens_0"
    if body.get("use_beam_search"):
        return "beam_search"
    if body.get("n") not in (None, 1):  # in any spelling that vLLM takes (`"2"`, `2.0`); it refuses what is no number
        return "several_choices"
    if body.get("prompt_embeds") is not None:
        return "prompt_embeds"
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) > 1 and not _ids(prompt) and _kind(prompt) is None:
        return "mixed_prompts"
    return None


def _ids(prompt: list[Any]) -> bool:
    return type(prompt[0]) is int


def _kind(prompts: list[Any]) -> type | None:
    kind = type(prompts[0])
    if kind in (str, list) and all(type(prompt) is kind for prompt in prompts):
        return kind
    return None


def _batch(body: Mapping[str, Any]) -> list[Any] | None:
    """Give the prompts of a batch of two or more; one prompt in a list is a single request."""
    prompt = body.get("prompt")
    if not isinstance(prompt, list) or len(prompt) < 2 or _ids(prompt) or _kind(prompt) is None:
        return None
    return prompt
