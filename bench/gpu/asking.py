"""Requests at temperature 0, and what is compared of their answers."""

import json
import random
import time
import uuid
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import httpx

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
WANTED = {
    "do_remote_decode": True, "do_remote_prefill": False, "remote_engine_id": None, "remote_block_ids": None,
    "remote_host": None, "remote_port": None,
}  # fmt: skip
Told = list[tuple[str, list[float] | None]]  # text and log-probabilities of each choice


class RefusedError(Exception):
    """An answer is no 200."""


@dataclass
class Streamed:
    """What a stream brought.

    Args:
        ids: token ids, in order.
        times: seconds from the request to each of them.
        error: of an error event or of the connection; None when it ended as it has to.
    """

    ids: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    error: str | None = None


def told(answer: dict[str, Any]) -> Told:
    """Give what two equal answers have in common."""
    found: Told = []
    for choice in sorted(answer["choices"], key=lambda one: int(one["index"])):
        text = choice["text"] if "text" in choice else choice["message"]["content"]
        probabilities = choice.get("logprobs") or {}
        content = probabilities.get("content")
        values = [one["logprob"] for one in content] if content else probabilities.get("token_logprobs")
        found.append((text or "", values))
    return found


class Asking(AbstractContextManager["Asking"]):
    """Asks engines and routers for one model."""

    def __init__(self, model: str, vocabulary: int = 100_000) -> None:
        """Prepare; prompts are drawn from ids below `vocabulary`, never the same twice."""
        self._model = model
        self._draw = random.SystemRandom()
        self._vocabulary = vocabulary
        self._client = httpx.Client(timeout=120, limits=httpx.Limits(max_keepalive_connections=0))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._client.close()

    def ids(self, count: int) -> list[int]:
        """Give a prompt as token ids, so that its length is exact with any tokenizer."""
        return [self._draw.randrange(300, self._vocabulary) for _ in range(count)]

    def body(self, prompt: Any, tokens: int, **more: Any) -> dict[str, Any]:
        """Give a request: a prompt, or the messages of a chat."""
        chat = isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], dict)
        what = {"messages" if chat else "prompt": prompt}
        return {"model": self._model, **what, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, **more}

    def post(self, url: str, body: dict[str, Any]) -> dict[str, Any]:
        """Give the JSON of an answer.

        Raises:
            RefusedError: it is no 200.
        """
        path = CHAT if "messages" in body else COMPLETIONS
        answer = self._client.post(url + path, json=body)
        if answer.status_code != 200:
            raise RefusedError(f"{url}{path} answered {answer.status_code}: {answer.text[:300]}")
        found: dict[str, Any] = answer.json()
        return found

    def own(self, url: str, body: dict[str, Any]) -> dict[str, Any]:
        """Give a decode engine's own answer, computing only the last token of the prompt, as after a handoff.

        The request has a `cache_salt`, so that the KV cache that came from prefill is not found, and is sent twice: the
        first time the prompt is computed whole, the second time all but what is behind its last full block is cached.
        A prompt of one token more than full blocks thus goes the same way as in a handoff, to the bit.
        """
        salted = body | {"cache_salt": uuid.uuid4().hex}
        self.post(url, salted)
        return self.post(url, salted)

    def ticket(self, url: str, body: dict[str, Any]) -> dict[str, Any]:
        """Let a prefill engine compute a prompt; give the `kv_transfer_params` of its answer."""
        found: dict[str, Any] = self.post(url, body | {"max_tokens": 1, "kv_transfer_params": WANTED})[
            "kv_transfer_params"
        ]
        return found

    def post_stream(self, url: str, body: dict[str, Any]) -> str:
        """Give the text of a stream.

        Raises:
            RefusedError: it did not end as it has to.
        """
        text, ended = "", False
        with httpx.stream("POST", url + COMPLETIONS, json=body | {"stream": True}, timeout=120) as answer:
            for line in answer.iter_lines():
                ended = ended or line == "data: [DONE]"
                if line.startswith("data: {"):
                    event = json.loads(line[6:])
                    if "error" in event:
                        raise RefusedError(str(event["error"])[:300])
                    text += "".join(choice["text"] for choice in event["choices"])
        if not ended:
            raise RefusedError(f"the stream of {url} ended without [DONE], status {answer.status_code}")
        return text

    def stream(self, url: str, body: dict[str, Any], into: Streamed) -> Streamed:
        """Read a stream with token ids into `into`, which others may look at meanwhile; errors end up there too."""
        began = time.perf_counter()
        sent = body | {"stream": True, "return_token_ids": True}
        try:
            with httpx.stream("POST", url + COMPLETIONS, json=sent, timeout=120) as answer:
                if answer.status_code != 200:
                    into.error = f"{answer.status_code} {answer.read().decode(errors='replace')[:300]}"
                    return into
                into.error = "the stream ended without [DONE]"
                for line in answer.iter_lines():
                    if not line.startswith("data: "):
                        continue
                    if line == "data: [DONE]":
                        into.error = None
                        break
                    event = json.loads(line[6:])
                    if "error" in event:
                        into.error = str(event["error"])[:300]
                        break
                    for choice in event["choices"]:
                        into.ids += choice.get("token_ids") or []
                        into.times += [time.perf_counter() - began] * (len(into.ids) - len(into.times))
        except httpx.HTTPError as error:
            into.error = f"{type(error).__name__}: {error}"
        return into

    def chat(self, url: str, words: int, block: int) -> list[dict[str, str]]:
        """Give a chat whose prompt is, with the template, one token longer than full blocks.

        Raises:
            RefusedError: the engine has no `/tokenize`, or no word of one token.
        """
        said = " ".join(f"w{number}" for number in self.ids(words))
        for _ in range(4):
            messages = [{"role": "user", "content": said}]
            answer = self._client.post(f"{url}/tokenize", json={"model": self._model, "messages": messages})
            if answer.status_code != 200:
                raise RefusedError(f"{url}/tokenize answered {answer.status_code}: {answer.text[:200]}")
            missing = (1 - int(answer.json()["count"])) % block
            if not missing:
                return messages
            said += " a" * missing
        raise RefusedError("no chat of the wished length could be made with this tokenizer")


def first_difference(one: Sequence[Any], other: Sequence[Any]) -> int | None:
    """Give where two sequences part; None when they are equal."""
    for place, (left, right) in enumerate(zip(one, other, strict=False)):
        if left != right:
            return place
    return None if len(one) == len(other) else min(len(one), len(other))
