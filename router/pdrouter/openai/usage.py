"""Token counts, read from the end of an answer without parsing it."""

import re

import orjson

_FIELD = b'"usage":'
_USAGE = re.compile(rb'"usage": ?\{"prompt_tokens": ?(\d+), ?"total_tokens": ?\d+, ?"completion_tokens": ?(\d+)')


def told_usage(tail: bytes) -> tuple[int, int] | None:
    """Find (prompt tokens, completion tokens) in the last bytes of an answer, streamed or not.

    Text of the model cannot be mistaken for it: inside a JSON string each quote has a backslash before it.
    """
    at = tail.rfind(_FIELD)
    if at < 0:
        return None
    begin = at + len(_FIELD)
    try:
        told = orjson.loads(tail[begin : tail.find(b"}", begin) + 1])  # three numbers, and details that are null
        return int(told["prompt_tokens"]), int(told["completion_tokens"])
    except (orjson.JSONDecodeError, KeyError, TypeError):
        found = _USAGE.match(tail, at)
        return (int(found[1]), int(found[2])) if found else None
