"""What is kept of a stream so that another engine could go on with it."""

import json
import sys
from typing import Any

import pytest

from pdrouter.handoff.stream import CannotGoOnError, Stream


def events(count: int, text: int = 3, first: int = 0) -> list[bytes]:
    """Events as vLLM tells them with token ids."""
    told = []
    for number in range(first, first + count):
        choice: dict[str, Any] = {"index": 0, "text": "x" * text, "token_ids": [number], "finish_reason": None}
        if number == 0:
            choice["prompt_token_ids"] = [7, 8, 9]
        body = {"id": "cmpl-1", "object": "text_completion", "created": 1, "model": "tiny", "choices": [choice]}
        told.append(b"data: " + json.dumps(body, separators=(",", ":")).encode() + b"\n\n")
    return told


def fed(pieces: list[bytes]) -> Stream:
    stream = Stream("/v1/completions", {"prompt": "abc", "stream": True, "max_tokens": 100_000})
    for piece in pieces:
        stream.feed(piece)
    return stream


@pytest.mark.parametrize(("count", "text"), [(10, 3), (3000, 3), (60, 3000), (5, 100_000)])
@pytest.mark.parametrize("at_once", [1, 7, 100, 3000])
def test_a_stream_goes_on_alike_however_many_events_come_at_once(count: int, text: int, at_once: int):
    each = events(count, text)
    one_by_one = fed(each).go_on(None)
    assert isinstance(one_by_one, dict)
    assert one_by_one["prompt"] == [7, 8, 9, *range(count)]
    assert fed([b"".join(each[at : at + at_once]) for at in range(0, count, at_once)]).go_on(None) == one_by_one


def test_an_event_in_which_the_engine_gives_up_is_dropped_with_all_after_it():
    told, last = events(2)
    abort = last.replace(b'"finish_reason":null', b'"finish_reason":"abort"')
    stream = fed([])
    assert stream.feed(told + abort + b"data: [DONE]\n\n") == told.replace(b"[0]", b"null").replace(b"[7,8,9]", b"null")
    assert stream.error is not None
    assert (stream.generated, stream.complete) == (1, False)


def test_a_text_that_tells_of_an_engine_that_gave_up_is_a_text():
    said = json.dumps({"text": '"finish_reason":"abort"', "token_ids": [5]}, separators=(",", ":")).encode()
    stream = fed(events(1))
    stream.feed(b'data: {"choices":[' + said + b"]}\n\n")
    assert (stream.error, stream.generated) == (None, 2)


def test_of_a_slow_clients_stream_little_is_kept():
    """Its events come hundreds at a time: as much as one read takes."""
    stream = Stream("/v1/completions", {"prompt": "abc", "stream": True})
    number = 0
    for _ in range(200):
        stream.feed(b"".join(events(1000, 50, number)))
        number += 1000
    kept = [one for one in stream._recent if isinstance(one, bytes)]
    assert sum(sys.getsizeof(one) for one in kept) < 100_000
    assert stream.generated == number


@pytest.mark.parametrize("lacks", [b'"prompt_token_ids":[7,8,9]', b'"token_ids":['])
def test_of_a_stream_that_nobody_can_go_on_with_little_is_kept(lacks: bytes):
    """Its engine tells no ids, or none of the text."""
    stream = fed([b"".join(events(100, 5000)).replace(lacks, b'"x":[' + b"]" * (b"]" in lacks)) for _ in range(20)])
    kept = [one if isinstance(one, bytes) else one.text for one in stream._recent]
    assert sum(sys.getsizeof(one) for one in kept) < 1_000_000
    with pytest.raises(CannotGoOnError):
        stream.go_on(None)
