"""What a client was answered, and in what two answers differ."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx

DONE = "[DONE]"


def line(text: object, most: int = 160) -> str:
    """Give a text as one short line."""
    told = " ".join(str(text).split())
    return told if len(told) <= most else told[: most - 1] + "…"


def why(error: Exception) -> str:
    """Say in a client's words what happened to its exchange."""
    match error:
        case httpx.ConnectError():
            return "cannot connect"
        case httpx.TimeoutException():
            return "nothing came"
        case httpx.TransportError():
            return "the connection broke"
    return line(repr(error), 80)


@dataclass(slots=True)
class Answer:
    """One answer.

    Args:
        status: of HTTP; 0 when there was no answer.
        headers: of the answer, names in lower case.
        body: its bytes, as many as came.
        broken: why the exchange broke off; empty when it came to its end.
    """

    status: int = 0
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    broken: str = ""

    @property
    def events(self) -> list[str]:
        """Data of the server-sent events that came whole."""
        parts = self.body.decode(errors="replace").replace("\r\n", "\n").split("\n\n")[:-1]
        return [part.removeprefix("data:").strip() for part in parts if part.startswith("data:")]

    @property
    def streamed(self) -> bool:
        """Whether it is a stream, whatever its content type says."""
        return self.body.lstrip().startswith(b"data:")

    @property
    def ended(self) -> bool:
        """Whether it claims to be whole: HTTP came to its end, and a stream to `[DONE]`."""
        return not self.broken and (not self.streamed or self.events[-1:] == [DONE])

    @property
    def failure(self) -> str:
        """Why this is no whole, successful answer; empty when it is one."""
        for event in self.events if self.streamed else ():
            if event.startswith('{"error"'):
                return f"an error in the stream: {line(event, 110)}"
        if self.broken:
            return f"{self.broken} after status {self.status}" if self.status else self.broken
        if self.status != 200:
            return f"status {self.status}: {line(self.body.decode(errors='replace'), 110)}"
        return "" if self.ended else "the stream ends without [DONE]"

    def json(self) -> Any:
        """Give the body as JSON, or nothing."""
        try:
            return json.loads(self.body)
        except ValueError:
            return None

    def told(self) -> dict[str, Any]:
        """Give what the answer says, the same for a stream and a whole answer: choices by index, and usage."""
        choices: dict[int, dict[str, Any]] = {}
        usage: Any = None
        messages = [json.loads(event) for event in self.events if event != DONE] if self.streamed else [self.json()]
        for message in messages:
            if not isinstance(message, dict):
                continue
            usage = message.get("usage") or usage
            for choice in message.get("choices") or ():
                _add(choices.setdefault(choice.get("index", 0), {"text": ""}), choice)
        counted = {key: value for key, value in (usage or {}).items() if isinstance(value, int)}
        return {"choices": choices, "usage": counted}

    @property
    def text(self) -> str:
        """Text of the first choice."""
        return str(self.told()["choices"].get(0, {}).get("text", ""))


def _add(state: dict[str, Any], choice: dict[str, Any]) -> None:
    said = choice.get("delta") or choice.get("message") or {}
    state["text"] += choice.get("text") or said.get("content") or ""
    for key in ("finish_reason", "stop_reason", "prompt_logprobs"):
        if choice.get(key) is not None:
            state[key] = choice[key]
    for key in ("token_ids",):
        if choice.get(key):
            state[key] = state.get(key, []) + choice[key]
    for name, values in (choice.get("logprobs") or {}).items():
        if values:
            lists = state.setdefault("logprobs", {})
            lists[name] = lists.get(name, []) + values


def _alike(one: Any, other: Any) -> bool:
    """Whether two values are the same but for the last digits of a float, which JSON libraries round differently."""
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-9)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_alike(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_alike, one, other))
    return bool(one == other)


def _texts(mine: str, theirs: str) -> str:
    at = next((i for i, (a, b) in enumerate(zip(mine, theirs, strict=False)) if a != b), min(len(mine), len(theirs)))
    return f"the text differs from character {at} on: {mine[at : at + 25]!r} instead of {theirs[at : at + 25]!r}"


def difference(mine: Answer, theirs: Answer, usage: bool = True) -> str:
    """Say in what an answer differs from the right one; empty when in nothing."""
    if mine.failure:
        return mine.failure
    one, other = mine.told(), theirs.told()
    if set(one["choices"]) != set(other["choices"]):
        return f"choices {sorted(one['choices'])} instead of {sorted(other['choices'])}"
    for index, right in other["choices"].items():
        given = one["choices"][index]
        where = f"choice {index}: " if len(other["choices"]) > 1 else ""
        if given["text"] != right["text"]:
            return where + _texts(given["text"], right["text"])
        for key in sorted(set(given) | set(right)):
            if not _alike(given.get(key), right.get(key)):
                return where + _values(key, given.get(key), right.get(key))
    if usage and one["usage"] != other["usage"]:
        return f"usage {one['usage']} instead of {other['usage']}"
    return ""


def _values(key: str, mine: Any, theirs: Any) -> str:
    if key == "logprobs" and mine and theirs:
        for name, right in theirs.items():
            given = mine.get(name) or []
            if len(given) != len(right):
                return f"logprobs.{name} has {len(given)} entries instead of {len(right)}"
            for at, (one, other) in enumerate(zip(given, right, strict=True)):
                if not _alike(one, other):
                    return f"logprobs.{name}[{at}] is {line(one, 60)} instead of {line(other, 60)}"
    if key == "prompt_logprobs" and mine and theirs and len(mine) != len(theirs):
        return f"prompt_logprobs has {len(mine)} entries instead of {len(theirs)}"
    return f"{key} is {line(mine, 60)} instead of {line(theirs, 60)}"
