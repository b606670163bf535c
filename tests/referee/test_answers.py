"""The referee sees in what two answers differ, streamed or not, and nothing where there is nothing."""

import json
from typing import Any

import pytest

from pdsim.referee.answers import Answer, difference


def whole(text: str = "abc", **fields: Any) -> Answer:
    choice = {"index": 0, "text": text, "finish_reason": "length"} | fields.pop("choice", {})
    usage = {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5, "prompt_tokens_details": None}
    return Answer(200, {}, json.dumps({"choices": [choice], "usage": usage} | fields).encode())


def streamed(*texts: str, end: str = "data: [DONE]\n\n", **choice: Any) -> Answer:
    last = len(texts) - 1
    chunks = [
        {"index": 0, "text": text, "finish_reason": "length" if number == last else None} | choice
        for number, text in enumerate(texts)
    ]
    events = [f"data: {json.dumps({'choices': [chunk]})}\n\n" for chunk in chunks]
    return Answer(200, {}, ("".join(events) + end).encode())


def test_equal_answers_do_not_differ() -> None:
    assert difference(whole(), whole()) == ""
    assert difference(streamed("ab", "c"), streamed("a", "bc")) == ""
    assert difference(streamed("ab", "c"), whole(), usage=False) == ""


@pytest.mark.parametrize(
    ("mine", "told"),
    [
        (whole("abd"), "from character 2 on"),
        (whole(choice={"finish_reason": "stop"}), "finish_reason"),
        (whole(usage={"prompt_tokens": 4, "completion_tokens": 3, "total_tokens": 7}), "usage"),
        (whole(choices=[]), r"choices \[\] instead of \[0\]"),
        (Answer(503, {}, b"no"), "status 503: no"),
        (Answer(200, {}, b"", "the connection broke"), "the connection broke after status 200"),
    ],
)
def test_a_wrong_answer_is_told_by_what_is_wrong_with_it(mine: Answer, told: str) -> None:
    import re

    assert re.search(told, difference(mine, whole()))


def test_a_stream_without_its_end_or_with_an_error_is_no_answer() -> None:
    right = streamed("a", "b")
    assert "without [DONE]" in difference(streamed("a", "b", end=""), right)
    broken = streamed("a", "b", end='data: {"error": {"message": "no"}}\n\ndata: [DONE]\n\n')
    assert "an error in the stream" in difference(broken, right)


def test_log_probabilities_are_compared_entry_by_entry_and_digits_that_json_loses_are_no_difference() -> None:
    def scored(*values: float) -> Answer:
        return whole(choice={"logprobs": {"token_logprobs": list(values)}})

    assert difference(scored(-1.471), scored(-1.4709999999999999)) == ""
    assert "has 3 entries instead of 2" in difference(scored(-1, -2, -2), scored(-1, -2))
    assert "token_logprobs[1] is -3" in difference(scored(-1, -3), scored(-1, -2))
