"""What a stream's token ids are good for: going on from them, as with a real engine."""

import itertools
from collections.abc import Iterator
from typing import Any

import pytest

from support.processes import Process, engine
from support.requests import CHAT, COMPLETIONS, completion, prompt
from wire.shape import events

UNFINISHED = [132, 107]  # the bytes C3 and A9, together é


@pytest.fixture(scope="module")
def plain() -> Iterator[Process]:
    with engine("both", "--speed", "20") as started:
        yield started


def streamed(plain: Process, path: str, body: dict[str, Any]) -> tuple[list[int], list[int], str]:
    """Give a stream's prompt ids, its token ids and its text."""
    prompt_ids: list[int] = []
    ids: list[int] = []
    text = ""
    for message in events(plain.post(path, body | {"stream": True, "return_token_ids": True}).text)[:-1]:
        (choice,) = message["choices"]
        prompt_ids = prompt_ids or message.get("prompt_token_ids") or choice.get("prompt_token_ids") or []
        ids += choice.get("token_ids") or []
        text += choice["text"] if "text" in choice else choice["delta"]["content"]
    return prompt_ids, ids, text


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_a_completion_goes_on_exactly_from_the_ids_of_a_stream(plain: Process, path: str) -> None:
    body = completion(prompt(1, 70), max_tokens=60, ignore_eos=True)
    if path == CHAT:
        body |= {"messages": [{"role": "user", "content": body.pop("prompt")}]}
    start, ids, text = streamed(plain, path, body)
    cuts = {1, 30, 59} | {128 - len(start) + distance for distance in (-1, 0, 1)}
    assert all(0 < cut < 60 for cut in cuts)
    for cut in cuts:
        rest = completion(start + ids[:cut], max_tokens=60 - cut, ignore_eos=True)
        _, more, ending = streamed(plain, COMPLETIONS, rest)
        assert more == ids[cut:]
        assert text.endswith(ending)
        assert len(text) - len(ending) == len(streamed(plain, path, body | {"max_tokens": cut})[2])


def test_a_prompt_of_ids_that_ends_within_a_character_is_repeated_in_the_first_text(plain: Process) -> None:
    body = completion(prompt(2, 20), max_tokens=40, allowed_token_ids=UNFINISHED)
    start, ids, text = streamed(plain, COMPLETIONS, body)
    cut = next(place for place in range(1, 40) if ids[place - 1] == 132 and 107 in ids[place:])
    rest = body | {"prompt": start + ids[:cut], "max_tokens": 40 - cut}
    _, more, ending = streamed(plain, COMPLETIONS, rest)
    assert more == ids[cut:]
    assert ending.startswith(prompt(2, 20))
    assert not text.startswith(prompt(2, 20))


def test_half_a_character_at_the_end_is_not_given(plain: Process) -> None:
    for seed in range(10):
        body = completion(prompt(10 + seed, 5), max_tokens=5, allowed_token_ids=UNFINISHED)
        _, ids, text = streamed(plain, COMPLETIONS, body)
        assert not text.endswith("\ufffd")
        assert text.count("é") == sum(pair == (132, 107) for pair in itertools.pairwise(ids))


def test_echo_leaves_the_prompts_text_out_where_token_ids_are_returned(plain: Process) -> None:
    body = completion("one two", echo=True)
    echoed = plain.post(COMPLETIONS, body).json()["choices"][0]["text"]
    bare = plain.post(COMPLETIONS, body | {"echo": False}).json()["choices"][0]["text"]
    assert echoed == "one two" + bare
    assert plain.post(COMPLETIONS, body | {"return_token_ids": True}).json()["choices"][0]["text"] == bare
    assert streamed(plain, COMPLETIONS, body)[2] == bare
