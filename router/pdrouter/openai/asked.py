"""What a generation request asks for, as far as the router must know."""

from collections.abc import Mapping
from typing import Any

import orjson

from pdrouter.openai.errors import RequestError

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"


class Asked:
    """A request body read once.

    `alone` is the reason why one engine must serve it without a handoff, or None. `prompts` has the prompts of a
    batch, which become one handoff each, or is None.
    """

    __slots__ = ("alone", "body", "prompts", "stream")

    def __init__(self, body: dict[str, Any], alone: str | None, prompts: list[Any] | None, stream: bool) -> None:
        self.body = body
        self.alone = alone
        self.prompts = prompts
        self.stream = stream


def read(path: str, raw: bytes) -> Asked:
    """Read a body.

    Raises:
        RequestError: it is no JSON object; what the fields hold is for the engine to judge.
    """
    if not raw:
        raise RequestError(400, "The request has no body; send a JSON object.")
    try:
        body = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise RequestError(400, f"The body is not valid JSON: {error}") from None
    if not isinstance(body, dict):
        raise RequestError(400, "The body must be a JSON object.")
    stream = body.get("stream")
    prompts = _batch(body) if path == COMPLETIONS else None
    alone = why_alone(body)
    if alone is None and prompts is not None:
        # vLLM takes more spellings (`"stream": "yes"`, `"n": "2"`) than the merging of answers could trust.
        if not isinstance(stream, bool | None):
            alone = "odd_stream"
        elif not isinstance(body.get("n"), int | None):
            alone = "odd_n"
    return Asked(body, alone, prompts, stream is True)


def why_alone(body: Mapping[str, Any]) -> str | None:
    """Say why a request is not for two engines, or None.

    Scores of the prompt make vLLM 0.32 compute the prompt again on decode and drop what was transferred
    (`skip_reading_prefix_cache`), so a handoff is wasted; with `max_tokens` 0 nothing is left to decode. Beam search
    starts many generations from one request, of which a ticket can serve one. Embedded prompts and mixed batches have
    no single prompt to hand over.
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
