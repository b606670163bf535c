"""The text of an answer, for policies that learn what an engine now holds."""

from typing import Any

import orjson


def _piece(answer: Any) -> str:
    choices = answer.get("choices") if isinstance(answer, dict) else None
    first = choices[0] if isinstance(choices, list) and choices else None
    if not isinstance(first, dict) or first.get("index"):
        return ""
    held = first.get("delta") or first.get("message")
    text = held.get("content") if isinstance(held, dict) else first.get("text")
    return text if isinstance(text, str) else ""


def generated_text(answer: bytes) -> bytes:
    """Give the first choice's text of an answer, whole or a stream of events; empty when it cannot be read.

    With `echo` the text begins with the prompt and so does not continue it; such answers do no harm, for their blocks
    are never asked for.
    """
    try:
        if not answer.startswith(b"data:"):
            return _piece(orjson.loads(answer)).encode()
        events = (line[5:] for line in answer.split(b"\n") if line.startswith(b"data: {"))
        return "".join([_piece(orjson.loads(event)) for event in events]).encode()
    except (orjson.JSONDecodeError, UnicodeEncodeError, TypeError):
        return b""
