"""What answers say, without what differs from one engine or request to the next."""

import json
from typing import Any

import httpx

NAMES_IT = ("id", "created", "system_fingerprint")


def told(answer: httpx.Response) -> Any:
    """Give what an answer says, without what names it, and with a stream's chunks put together."""
    if answer.status_code != 200:
        return answer.status_code, answer.json()
    if not answer.headers["content-type"].startswith("text/event-stream"):
        body = answer.json()
        return {key: value for key, value in body.items() if key not in NAMES_IT}
    lines = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    assert lines.count("[DONE]") == 1
    messages = [json.loads(line) for line in lines[:-1]]
    assert len({message["id"] for message in messages}) == 1
    choices: dict[int, dict[str, Any]] = {}
    usages = []
    for message in messages:
        if not message["choices"]:
            usages.append(message["usage"])
        for choice in message["choices"]:
            state = choices.setdefault(choice["index"], {"text": "", "logprobs": [], "ids": [], "end": []})
            state["text"] += choice["text"] if "text" in choice else choice["delta"].get("content", "")
            logprobs = choice["logprobs"]
            if logprobs:
                state["logprobs"] += logprobs.get("content") or list(
                    zip(logprobs["tokens"], logprobs["token_logprobs"], logprobs["text_offset"], strict=True)
                )
            state["ids"] += choice.get("token_ids") or []
            if choice["finish_reason"]:
                state["end"].append((choice["finish_reason"], choice.get("stop_reason")))
    return choices, usages
