"""Compare an answer with a recorded one: same keys in the same order, same types, same values where none is random."""

import json
from typing import Any

RANDOM = {
    "id", "created", "system_fingerprint", "text", "content", "token", "logprob", "bytes", "rank", "decoded_token",
    "remote_engine_id", "remote_request_id", "remote_block_ids", "remote_port", "remote_host", "token_ids", "tokens",
    "token_logprobs", "text_offset", "date",
}  # fmt: skip
BY_TOKEN = {"top_logprobs", "prompt_logprobs"}  # lists of objects whose keys are tokens


def differences(real: Any, ours: Any, path: str = "") -> list[str]:
    """List where `ours` differs from `real` in more than random values."""
    key = path.rsplit(".", 1)[-1].split("[", maxsplit=1)[0]
    if isinstance(real, dict) and isinstance(ours, dict):
        if key in BY_TOKEN and real and ours:
            return differences(next(iter(real.values())), next(iter(ours.values())), f"{path}.*")
        if list(real) != list(ours):
            return [f"{path}: keys {list(real)} became {list(ours)}"]
        return [line for name in real for line in differences(real[name], ours[name], f"{path}.{name}")]
    if isinstance(real, list) and isinstance(ours, list):
        if key == "bytes" or (key == "token_ids" and real and ours):
            return []  # a chunk may hold several tokens; usage tells whether there are as many in all
        if len(real) != len(ours):
            return [f"{path}: {len(real)} entries became {len(ours)}"]
        return [
            line
            for index, pair in enumerate(zip(real, ours, strict=True))
            for line in differences(*pair, f"{path}[{index}]")
        ]
    if type(real) is not type(ours):
        return [f"{path}: {real!r} became {ours!r}"]
    if key not in RANDOM and "*" not in key and real != ours:
        return [f"{path}: {real!r} became {ours!r}"]
    return []


def events(body: str) -> list[Any]:
    """Split an SSE body into its messages; the framing itself is checked."""
    assert body.endswith("\n\n"), "an event stream ends with an empty line"
    parts = body.removesuffix("\n\n").split("\n\n")
    assert all(part.startswith("data: ") and "\n" not in part for part in parts)
    payloads = [part.removeprefix("data: ") for part in parts]
    return [payload if payload == "[DONE]" else json.loads(payload) for payload in payloads]


def by_choice(messages: list[Any]) -> dict[Any, list[Any]]:
    """Sort a stream's messages by the choice they are about; the engine may interleave and merge choices freely."""
    sorted_messages: dict[Any, list[Any]] = {}
    for message in messages:
        about = "end" if message == "[DONE]" else [choice["index"] for choice in message.get("choices", [])]
        sorted_messages.setdefault(json.dumps(about), []).append(message)
    return sorted_messages
