"""A list of prompts as one request each, and their answers as one answer.

vLLM returns one ticket for a whole batch, and decode loads the first prompt's KV for every prompt: status 200, wrong
text, and a poisoned prefix cache. So a batch is split, and merged as vLLM orders it: the choice of prompt i has index
i, usage is the sum, one id, one `[DONE]`. Several choices a prompt are not for two engines, so there is one of each.
"""

from collections.abc import Mapping
from typing import Any

import orjson

from pdrouter.openai.legs import encoded

DONE = b"data: [DONE]\n\n"


def part_body(body: Mapping[str, Any], prompt: Any) -> dict[str, Any]:
    """Give the body of one prompt."""
    return {**body, "prompt": prompt}


def repeated(body: Mapping[str, Any]) -> int:
    """Give how many bytes the bodies of all parts have beside the prompts: what is sent once goes on once a prompt."""
    shared = {name: value for name, value in body.items() if name != "prompt"}
    return len(encoded(shared)) * len(body["prompt"])


def add_usage(total: dict[str, Any], usage: Mapping[str, Any]) -> None:
    """Add a usage object to a sum: numbers, also of nested objects; what only one side has is kept."""
    for name, value in usage.items():
        held = total.get(name)
        if isinstance(value, dict):
            inner = dict(held) if isinstance(held, dict) else {}
            add_usage(inner, value)
            total[name] = inner
        elif isinstance(value, int) and isinstance(held, int):
            total[name] = held + value
        elif held is None:
            total[name] = value


def merge_answers(answers: list[dict[str, Any]], whole_id: str | None) -> dict[str, Any]:
    """Merge complete answers in the order of their prompts."""
    merged = dict(answers[0])
    if whole_id is not None:
        merged["id"] = whole_id
    choices: list[dict[str, Any]] = []
    usage: dict[str, Any] = {}
    for number, answer in enumerate(answers):
        for choice in answer["choices"]:
            choice["index"] += number
            choices.append(choice)
        add_usage(usage, answer.get("usage") or {})
    merged["choices"] = choices
    merged["usage"] = usage
    return merged


class StreamMerge:
    """Merges the event streams of the prompts of one batch."""

    def __init__(self, prompts: int) -> None:
        self._open = [True] * prompts
        self._rest = [b""] * prompts
        self.usage: dict[str, Any] = {}
        self._usage_chunk: dict[str, Any] | None = None

    def feed(self, number: int, data: bytes, whole_id: str | None) -> bytes:
        """Take bytes of one prompt's stream; give the events they complete, as the batch's.

        Raises:
            ValueError: an event is no JSON object.
        """
        *events, self._rest[number] = (self._rest[number] + data).split(b"\n\n")
        out: list[bytes] = []
        for event in events:
            if event.startswith(b"data: ") and event != b"data: [DONE]":
                chunk = orjson.loads(event[6:])
                told = self._told(number, chunk, whole_id)
                if told is not None:
                    out.append(b"data: %b\n\n" % orjson.dumps(told))
        return b"".join(out)

    def _told(self, number: int, chunk: dict[str, Any], whole_id: str | None) -> dict[str, Any] | None:
        choices = chunk.get("choices")
        if choices is None:  # an error event
            return chunk
        if whole_id is not None:
            chunk["id"] = whole_id
        if not choices and chunk.get("usage") is not None:
            add_usage(self.usage, chunk["usage"])
            self._usage_chunk = chunk
            return None
        for choice in choices:
            choice["index"] += number
        if "system_fingerprint" in chunk:
            # vLLM puts it into the last chunk of a stream, and each part had its own last chunk.
            self._open[number] = False
            if any(self._open):
                del chunk["system_fingerprint"]
        return chunk

    def close(self) -> bytes:
        """Give what ends the whole stream: one usage chunk if there were any, and `[DONE]`."""
        if self._usage_chunk is None:
            return DONE
        return b"data: %b\n\n" % orjson.dumps(self._usage_chunk | {"usage": self.usage}) + DONE
