"""A model and how vLLM 0.32 streams what it generates, as recorded from real engines.

The next token is a function of all tokens before it, so a continuation that was asked wrongly goes on wrongly. Text
lags behind tokens where vLLM's does: characters whose last byte is not there yet, and what may begin a stop string. A
prompt that ends inside of a character is answered with its whole text first.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

CHAT = "/v1/chat/completions"
# The first 256 ids are bytes; then come words, a token without text, the end, and pieces of characters.
PIECES = [
    *(bytes([one]) for one in range(256)),
    b" the", b"\n", b" qx", b"z", b" of", b"ab", b"c", b' "so"', b"\\n", b"", b"", "é".encode(), b"\xf0\x9f",
    b"\x98\x80", b"\xe2\x82", b"\xac", b" a\xc3", b"\xa9b", b".", b"] data: {", b"\t",
]  # fmt: skip
END = 265
DRAWN = [*range(97, 105), *range(256, len(PIECES))]


def encoded(text: str) -> list[int]:
    return list(text.encode())


def decoded(ids: Iterable[int]) -> str:
    return b"".join(PIECES[one] for one in ids).decode(errors="replace")


def draw(ids: Sequence[int], salt: int) -> tuple[int, float]:
    """Give the next token and its log-probability."""
    digest = blake2b(json.dumps([salt, *ids]).encode(), digest_size=8).digest()
    number = int.from_bytes(digest, "big")
    return DRAWN[number % len(DRAWN)], -(number % 997) / 100


@dataclass
class Step:
    """What one token brought."""

    token: int
    text: str
    logprob: float
    piece: str
    finish: str | None = None
    reason: Any = None


class _Text:
    """vLLM's detokenizer."""

    def __init__(self, prompt: Sequence[int]) -> None:
        self._ids = list(prompt)
        text = decoded(prompt)
        self._told = "" if text.endswith("\ufffd") else text

    def add(self, token: int) -> str:
        self._ids.append(token)
        text = decoded(self._ids)
        if len(text) <= len(self._told) or text.endswith("\ufffd"):
            return ""
        new = text[len(self._told) :]
        self._told = text
        return new


def steps(prompt: Sequence[int], body: Mapping[str, Any], salt: int = 0) -> list[Step]:
    """Generate."""
    stops = [body["stop"]] if isinstance(body.get("stop"), str) else body.get("stop") or []
    include = bool(body.get("include_stop_str_in_output"))
    held = max(map(len, stops)) - 1 if stops and not include else 0
    limit, least = body["max_tokens"], body.get("min_tokens") or 0
    text, output, shown, checked = _Text(prompt), "", 0, 0
    ids = list(prompt)
    made: list[Step] = []
    while True:
        number = len(made) + 1
        token, logprob = draw(ids, salt)
        if number <= least and token == END:
            token = 97
        ids.append(token)
        finish, reason = None, None
        piece = text.add(token)
        before = len(output)
        if token == END and not body.get("ignore_eos"):
            finish = "stop"
        elif token in (body.get("stop_token_ids") or ()) and number > least:
            finish, reason, piece = "stop", token, ""
        output += piece
        if number <= least:
            checked = len(output)
        elif finish is None:
            new = len(output) - max(before, checked)
            for stop in stops:
                at = output.find(stop, max(0, len(output) + 1 - new - len(stop)))
                if at >= 0:
                    finish, reason = "stop", stop
                    output = output[: at + len(stop) if include else at]
                    break
        if finish is None and number >= limit:
            finish = "length"
        upto = len(output) - (0 if finish else held)
        told = output[shown:upto] if upto > shown else ""
        shown = max(shown, upto)
        made.append(Step(token, told, logprob, piece, finish, reason))
        if finish:
            return made


def prompt_ids(path: str, body: Mapping[str, Any]) -> list[int]:
    if path == CHAT:
        return encoded("".join(f"<{one['role']}>{one['content']}" for one in body["messages"]) + "<assistant>")
    prompt = body["prompt"]
    return encoded(prompt) if isinstance(prompt, str) else list(prompt)


def _logprobs(group: Sequence[Step], offset: int) -> dict[str, Any]:
    told: dict[str, list[Any]] = {"text_offset": [], "token_logprobs": [], "tokens": [], "top_logprobs": []}
    for step in group:
        told["text_offset"].append(offset)
        told["token_logprobs"].append(step.logprob)
        told["tokens"].append(step.piece)
        told["top_logprobs"].append({step.piece: step.logprob})
        offset += len(step.piece)
    return told


def answer(
    path: str, body: Mapping[str, Any], request_id: str, sizes: Sequence[int] = (1,), salt: int = 0, created: int = 7
) -> list[bytes]:
    """Give the events of a streamed answer.

    Args:
        path: of the request.
        body: its JSON.
        request_id: from its header.
        sizes: how many tokens each event has, over and over: more than one where the frontend was slow.
        salt: another model's number; equal models draw equal tokens.
        created: the engine's clock.
    """
    chat = path == CHAT
    options = body.get("stream_options") or {}
    usage, continuous = options.get("include_usage"), options.get("continuous_usage_stats")
    tells = bool(body.get("return_token_ids"))
    prompt = prompt_ids(path, body)
    limit = body.get("max_completion_tokens") or body.get("max_tokens") if chat else body.get("max_tokens")
    if limit is None:
        limit = 512 - len(prompt) if chat else 16
    made = steps(prompt, dict(body) | {"max_tokens": limit}, salt)
    head = {
        "id": f"{'chatcmpl' if chat else 'cmpl'}-{request_id}", "created": created, "model": "tiny",
        "object": "chat.completion.chunk" if chat else "text_completion",
    }  # fmt: skip

    def used(count: int) -> dict[str, Any]:
        numbers = {"prompt_tokens": len(prompt), "total_tokens": len(prompt) + count, "completion_tokens": count}
        return {"usage": numbers}

    def event(chunk: Mapping[str, Any]) -> bytes:
        return b"data: " + json.dumps(head | chunk, separators=(",", ":"), ensure_ascii=False).encode() + b"\n\n"

    events: list[bytes] = []
    if chat:
        choice: dict[str, Any] = {
            "index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None,
        }  # fmt: skip
        told = used(0) if usage and continuous else {}
        events.append(
            event({"choices": [choice]} | told | {"prompt_token_ids": prompt if tells else None, "prompt_text": None})
        )
    count, offset, turn = 0, 0, 0
    while count < len(made):
        group = made[count : count + max(1, sizes[turn % len(sizes)])]
        turn += 1
        last = group[-1]
        text = "".join(step.text for step in group)
        ids = [step.token for step in group]
        logprobs = None
        if body.get("logprobs") is not None and not chat:
            logprobs = _logprobs(group, offset)
            offset += sum(len(step.piece) for step in group)
        choice = {"index": 0} | ({"delta": {"content": text}} if chat else {"text": text})
        choice |= {"logprobs": logprobs, "finish_reason": last.finish}
        if not chat or last.finish:
            choice["stop_reason"] = last.reason
        if not chat:
            choice["prompt_token_ids"] = prompt if tells and not count else None
        choice["token_ids"] = ids if tells else None
        count += len(group)
        chunk: dict[str, Any] = {"choices": [choice]} | (used(count) if usage and continuous else {})
        if last.finish and not usage:
            chunk["system_fingerprint"] = "vllm-0.32.0-x"
        events.append(event(chunk))
    if usage:
        events.append(event({"choices": []} | used(count) | {"system_fingerprint": "vllm-0.32.0-x"}))
    events.append(b"data: [DONE]\n\n")
    return events


@dataclass
class Heard:
    """What a client makes of a stream, however it was cut into events."""

    text: str = ""
    ids: list[int] = field(default_factory=list)
    prompt: list[Any] = field(default_factory=list)
    logprobs: list[tuple[Any, ...]] = field(default_factory=list)
    ends: list[tuple[Any, Any]] = field(default_factory=list)
    usage: list[Any] = field(default_factory=list)
    counted: Any = None
    heads: set[tuple[str, int]] = field(default_factory=set)
    objects: set[tuple[str, str]] = field(default_factory=set)
    fingerprints: int = 0
    roles: int = 0
    done: int = 0
    error: Any = None


def heard(stream: bytes) -> Heard:
    """Read a stream as a strict client does."""
    told = Heard()
    assert stream == b"" or stream.endswith(b"\n\n"), stream[-80:]
    for event in stream.decode().split("\n\n")[:-1]:
        assert event.startswith("data: "), event
        assert not told.done, "nothing follows [DONE]"
        if event == "data: [DONE]":
            told.done += 1
            continue
        chunk = json.loads(event[6:])
        if "error" in chunk:
            told.error = chunk["error"]
            continue
        told.heads.add((chunk["id"], chunk["created"]))
        told.objects.add((chunk["object"], chunk["model"]))
        told.fingerprints += "system_fingerprint" in chunk
        told.prompt += [chunk["prompt_token_ids"]] if chunk.get("prompt_token_ids") else []
        if not chunk["choices"]:
            told.usage.append(chunk["usage"])
            continue
        told.counted = chunk.get("usage")
        (choice,) = chunk["choices"]
        assert choice["index"] == 0
        assert not told.ends, "no text after the end"
        delta = choice.get("delta")
        if delta is not None:
            told.roles += "role" in delta
        told.text += choice["text"] if delta is None else delta["content"]
        told.ids += choice.get("token_ids") or []
        if delta is None:
            told.prompt += [choice["prompt_token_ids"]] if choice["prompt_token_ids"] else []
        if choice["logprobs"]:
            told.logprobs += zip(
                *(
                    [tuple(one.items()) if isinstance(one, dict) else one for one in choice["logprobs"][name]]
                    for name in ("text_offset", "token_logprobs", "tokens", "top_logprobs")
                ),
                strict=True,
            )
        if choice["finish_reason"] is not None:
            told.ends.append((choice["finish_reason"], choice["stop_reason"]))
    return told
