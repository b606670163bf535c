"""A stream that is cut anywhere, any number of times, and goes on elsewhere is the stream that was not cut."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pdrouter.handoff.stream import CannotGoOnError, Stream
from pdrouter.openai.continuation import why_not
from router import generation
from router.generation import CHAT, Heard, answer, heard

COMPLETIONS = "/v1/completions"
ROOM = 512

texts = st.sampled_from(["x", "hello", "prompt é", "qx", "a longer prompt, so that it can be recognised"])
stops = st.sampled_from(
    [None, " qx", "z", ["zz", " qx"], ["ab c"], ["the the"], ["é", "\n\n"], ["a rather long stop string"]]
)
sizes = st.lists(st.integers(1, 4), min_size=1, max_size=5)


@st.composite
def bodies(draw: Any) -> tuple[str, dict[str, Any]]:
    """Draw what a client asks for, of all that can go on."""
    path = draw(st.sampled_from([COMPLETIONS, CHAT]))
    body: dict[str, Any] = {"model": "tiny", "stream": True, "temperature": 0}
    if path == CHAT:
        body["messages"] = [{"role": "user", "content": draw(texts)}]
        limit = draw(st.sampled_from(["max_tokens", "max_completion_tokens"]))
    else:
        body["prompt"] = draw(texts)
        limit = "max_tokens"
        if draw(st.booleans()):
            body["logprobs"] = 1
    body[limit] = draw(st.integers(1, 40))
    if draw(st.booleans()):
        body["stop"] = draw(stops)
    if draw(st.booleans()):
        body["min_tokens"] = draw(st.integers(0, body[limit]))
    for name in ("ignore_eos", "include_stop_str_in_output", "return_token_ids"):
        if draw(st.integers(0, 3)) == 0:
            body[name] = True
    if draw(st.integers(0, 3)) == 0:
        body["stop_token_ids"] = [draw(st.sampled_from([98, 99, 258]))]
    usage = draw(
        st.sampled_from([None, {"include_usage": True}, {"include_usage": True, "continuous_usage_stats": True}])
    )
    if usage:
        body["stream_options"] = usage
    return path, body


@dataclass
class Life:
    """One engine's part: how it gathers tokens, how many of its bytes come, in what pieces."""

    sizes: Sequence[int]
    salt_time: int
    cut: float
    pieces: Sequence[int]


lives = st.builds(
    Life, sizes, st.integers(1, 9), st.floats(0, 1), st.lists(st.integers(1, 400), min_size=1, max_size=6)
)


def fed(stream: Stream, data: bytes, pieces: Sequence[int]) -> bytes:
    """Let a stream take bytes in pieces; give what goes to the client."""
    out, at, turn = [], 0, 0
    while at < len(data):
        size = pieces[turn % len(pieces)]
        out.append(stream.feed(data[at : at + size]))
        at += size
        turn += 1
    return b"".join(out)


def served(path: str, body: dict[str, Any], cuts: Sequence[Life], last: Life, salt: int = 0) -> bytes:
    """Serve a stream by engines that die one after another, as the router does."""
    assert why_not(path, body) is None
    stream = Stream(path, body)
    asked_path, asked = path, body | {"return_token_ids": True}
    out = b""
    for number, life in enumerate([*cuts, last]):
        stream.attempt()
        events = b"".join(answer(asked_path, asked, f"{number}", life.sizes, salt, created=life.salt_time))
        dies = number < len(cuts)
        out += fed(stream, events[: int(len(events) * life.cut)] if dies else events, life.pieces)
        assert stream.error is None
        if stream.complete:
            break
        assert dies, "the last engine's stream is complete"
        if not out:
            continue
        told = stream.go_on(ROOM)
        if isinstance(told, bytes):
            out += told
            break
        if told is not None:
            asked_path, asked = COMPLETIONS, told
    return out


def undisturbed(path: str, body: dict[str, Any], salt: int = 0) -> Heard:
    return heard(b"".join(answer(path, body, "0", salt=salt)))


def same(got: bytes, path: str, body: dict[str, Any], salt: int = 0) -> None:
    """Fail unless a client heard what it would have heard from one engine."""
    told, right = heard(got), undisturbed(path, body, salt)
    for name in ("text", "ids", "prompt", "logprobs", "ends", "usage", "counted", "objects", "roles", "done"):
        assert getattr(told, name) == getattr(right, name), name
    assert len(told.heads) == 1, "one id and one time"
    assert told.fingerprints <= 1


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(bodies(), st.lists(lives, min_size=1, max_size=4), lives, st.integers(0, 1_000_000))
def test_a_stream_cut_at_any_byte_and_continued_is_the_undisturbed_one(
    asked: tuple[str, dict[str, Any]], cuts: list[Life], last: Life, salt: int
) -> None:
    path, body = asked
    same(served(path, body, cuts, last, salt), path, body, salt)


def stream_of(path: str = COMPLETIONS, **fields: Any) -> tuple[Stream, dict[str, Any]]:
    asked = {"prompt": "x"} if path == COMPLETIONS else {"messages": [{"role": "user", "content": "x"}]}
    body = {"model": "tiny", "stream": True, "temperature": 0} | asked | fields
    return Stream(path, body), body


def begun(path: str, body: dict[str, Any], events: int, sizes: Sequence[int] = (1,), salt: int = 0) -> bytes:
    """Give the first events of an engine's answer."""
    return b"".join(answer(path, body | {"return_token_ids": True}, "0", sizes, salt)[:events])


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize("stop", [None, ["a rather long stop string"]])
def test_a_long_stream_goes_on_again_and_again_with_only_its_last_events_kept(path: str, stop: Any) -> None:
    _, body = stream_of(path, max_tokens=420, ignore_eos=True, stop=stop)
    cuts = [Life((1,), 1, part, (1000, 17)) for part in (0.3, 0.6, 0.01, 0.9)]
    same(served(path, body, cuts, Life((1, 3), 1, 0, (333,))), path, body)


def test_a_conversation_without_a_limit_may_fill_the_context_and_no_more() -> None:
    _, body = stream_of(CHAT, ignore_eos=True, stream_options={"include_usage": True})
    assert undisturbed(CHAT, body).usage[0]["total_tokens"] == ROOM
    same(served(CHAT, body, [Life((1,), 1, 0.5, (4096,))], Life((1,), 1, 0, (4096,))), CHAT, body)


def test_a_conversation_without_a_limit_stops_where_nobody_knows_how_long_contexts_may_be() -> None:
    stream, body = stream_of(CHAT, ignore_eos=True)
    stream.feed(begun(CHAT, body, 4))
    with pytest.raises(CannotGoOnError, match="how many tokens"):
        stream.go_on(None)


@pytest.mark.parametrize("fields", [{}, {"max_tokens": None}])
def test_a_completion_without_a_limit_has_sixteen_tokens_over_both_engines(fields: dict[str, Any]) -> None:
    _, body = stream_of(ignore_eos=True, **fields)
    same(served(COMPLETIONS, body, [Life((1,), 1, 0.5, (4096,))], Life((1,), 1, 0, (4096,))), COMPLETIONS, body)


def test_a_continuation_asks_for_what_is_left_and_nothing_that_was_for_the_prompt() -> None:
    stream, body = stream_of(
        CHAT, max_completion_tokens=30, min_tokens=8, top_logprobs=0, tool_choice="none", truncate_prompt_tokens=9,
        add_generation_prompt=True, response_format={"type": "text"}, seed=3, stop=["qqq"], user="u",
    )  # fmt: skip
    stream.feed(begun(CHAT, body, 7))
    told = stream.go_on(ROOM)
    assert isinstance(told, dict)
    prompt = generation.prompt_ids(CHAT, body)
    generated = told["prompt"][len(prompt) :]
    assert told["prompt"][: len(prompt)] == prompt
    assert 0 < len(generated) <= 6
    assert told == {
        "model": "tiny", "stream": True, "temperature": 0, "response_format": {"type": "text"}, "seed": 3,
        "stop": ["qqq"], "user": "u", "prompt": told["prompt"], "max_tokens": 30 - len(generated),
        "min_tokens": 8 - len(generated), "return_token_ids": True,
    }  # fmt: skip


def test_what_another_engine_draws_differently_is_an_end_and_never_a_second_version() -> None:
    """Several tokens in one event: the continuation begins before them, and this engine has another opinion of them."""
    stream, body = stream_of(max_tokens=30, ignore_eos=True)
    sent = stream.feed(begun(COMPLETIONS, body, 4, (1, 1, 1, 4)))
    told = stream.go_on(ROOM)
    assert isinstance(told, dict)
    stream.attempt()
    sent += stream.feed(b"".join(answer(COMPLETIONS, told, "1", salt=5)))
    assert stream.differs is not None
    assert "other engine" in stream.differs
    assert undisturbed(COMPLETIONS, body).text.startswith(heard(sent).text)


@pytest.mark.parametrize("shown", [{"return_token_ids": True}, {"logprobs": 0}])
def test_ids_that_a_client_has_seen_are_never_told_twice_with_other_numbers(shown: dict[str, Any]) -> None:
    """The stop string holds back all text, so that nothing but the ids tells that the second engine differs."""
    stream, body = stream_of(max_tokens=30, ignore_eos=True, stop=["q" * 200], **shown)
    stream.feed(begun(COMPLETIONS, body, 6))
    told = stream.go_on(ROOM)
    assert isinstance(told, dict)
    stream.attempt()
    stream.feed(b"".join(answer(COMPLETIONS, told, "1", salt=5)))
    assert stream.differs == "the other engine generated other tokens"


def test_a_continuation_that_is_no_vllm_stream_is_an_end_and_not_the_routers_failure() -> None:
    stream, body = stream_of(max_tokens=30)
    stream.feed(begun(COMPLETIONS, body, 4))
    stream.go_on(ROOM)
    stream.attempt()
    assert stream.feed(b'data: {"choices":[{]}\n\n') == b""
    assert stream.differs is not None


def test_an_error_event_ends_a_stream_before_it_and_the_next_engine_begins_anew() -> None:
    stream, body = stream_of(max_tokens=9)
    error = b'data: {"error": {"code": 500}}\n\n'
    assert stream.feed(error[:20]) == b""
    assert stream.feed(error[20:] + b"data: [DO") == b""
    assert stream.error == b'{"error": {"code": 500}}'
    stream.attempt()
    assert stream.error is None
    assert not stream.begun
    same(stream.feed(begun(COMPLETIONS, body, 99)), COMPLETIONS, body)


def gone_on(path: str, body: dict[str, Any], events: Sequence[bytes], cut: int) -> tuple[bytes, int]:
    """Serve a stream of which the first engine tells so many events; give also how many tokens the second generates."""
    stream = Stream(path, body)
    sent = b"".join(stream.feed(event) for event in events[:cut])
    told = stream.go_on(ROOM)
    assert isinstance(told, dict)
    stream.attempt()
    return sent + stream.feed(b"".join(answer(COMPLETIONS, told, "1"))), told["max_tokens"]


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize("length", [2, 3, 9])
def test_a_stop_string_that_is_told_too_is_found_wherever_its_stream_was_cut(path: str, length: int) -> None:
    _, body = stream_of(path, max_tokens=24, ignore_eos=True)
    text = undisturbed(path, body).text
    for at in range(4, len(text) - length, 3):
        stopped = body | {"stop": text[at : at + length], "include_stop_str_in_output": True}
        events = answer(path, stopped | {"return_token_ids": True}, "0")
        said = [number for number, event in enumerate(events) if b'"finish_reason":null' in event]
        for cut in said[3:]:
            same(gone_on(path, stopped, events, cut + 1)[0], path, stopped)


@pytest.mark.parametrize("included", [False, True])
def test_a_stream_goes_on_however_long_its_stop_strings_are(included: bool) -> None:
    stop = {"stop": ["q" * 150], "include_stop_str_in_output": included}
    _, body = stream_of(max_tokens=400, ignore_eos=True, **stop)
    events = answer(COMPLETIONS, body | {"return_token_ids": True}, "0")
    for cut in (40, 60, 199, 200, 201, 380):
        sent, left = gone_on(COMPLETIONS, body, events, cut)
        same(sent, COMPLETIONS, body)
        assert cut < 380 or left < 200, "it need not begin anew"
    without_end = body | {"stop": ["q" * 2000]}
    events = answer(COMPLETIONS, without_end | {"return_token_ids": True}, "0")
    same(gone_on(COMPLETIONS, without_end, events, 390)[0], COMPLETIONS, without_end)


@pytest.mark.parametrize("sizes", [(2,), (1, *[3] * 99)])
def test_a_stream_of_events_of_several_tokens_goes_on_however_many_there_are(sizes: Sequence[int]) -> None:
    _, body = stream_of(max_tokens=480, ignore_eos=True)
    events = answer(COMPLETIONS, body | {"return_token_ids": True}, "0", sizes)
    for cut in (60, 120, len(events) - 3):
        same(gone_on(COMPLETIONS, body, events, cut)[0], COMPLETIONS, body)


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content", "tool_calls"])
def test_a_stream_that_the_engine_parses_cannot_go_on(name: str) -> None:
    stream, body = stream_of(CHAT, max_tokens=30, ignore_eos=True)
    stream.feed(begun(CHAT, body, 4).replace(b'"delta":{"content"', b'"delta":{"%b":["x"],"content"' % name.encode()))
    with pytest.raises(CannotGoOnError, match="parses"):
        stream.go_on(ROOM)


def reasoned(events: list[bytes], tokens: int) -> list[bytes]:
    """Give a conversation's events as a reasoning parser tells them: nothing of the first token, then reasoning."""
    mark = b'"delta":{"content":'
    said = [event.replace(mark, b'"delta":{"reasoning":') for event in events[2 : tokens + 1]]
    silent = re.sub(rb'"delta":{"content":[^}]*}', b'"delta":{}', events[1])
    return [events[0], silent, *said, *events[tokens + 1 :]]


def chunks(stream: bytes) -> list[Any]:
    return [json.loads(event[6:]) for event in stream.split(b"\n\n")[:-1] if event != b"data: [DONE]"]


@pytest.mark.parametrize("fields", [{}, {"return_token_ids": True}, {"stream_options": {"include_usage": True}}])
@pytest.mark.parametrize("told", [1, 2])
def test_a_conversation_that_has_said_nothing_is_asked_once_more_and_its_reasoning_stays_reasoning(
    told: int, fields: dict[str, Any]
) -> None:
    stream, body = stream_of(CHAT, max_tokens=30, ignore_eos=True, **fields)
    events = reasoned(answer(CHAT, body | {"return_token_ids": True}, "0"), 5)
    others = reasoned(answer(CHAT, body | {"return_token_ids": True}, "0", created=9), 5)
    sent = stream.feed(b"".join(events[:told]))
    for more in ([], others[:1], others[:2], others):  # engines that died early, and one that did not
        assert stream.go_on(None) is None
        stream.attempt()
        sent += stream.feed(b"".join(more))
    assert (stream.complete, stream.differs) == (True, None)
    got, right = chunks(sent), chunks(b"".join(reasoned(answer(CHAT, body, "0"), 5)))
    ids = [one for chunk in got for choice in chunk["choices"] for one in choice.pop("token_ids", None) or []]
    for chunk in right:
        for choice in chunk["choices"]:
            choice.pop("token_ids", None)
    silent = right[1]
    assert [chunk for chunk in got if chunk != silent] == [chunk for chunk in right if chunk != silent]
    assert ids == (undisturbed(CHAT, body).ids if "return_token_ids" in fields else [])


def test_a_conversation_that_was_asked_once_more_and_reasons_cannot_go_on() -> None:
    stream, body = stream_of(CHAT, max_tokens=30, ignore_eos=True)
    events = reasoned(answer(CHAT, body | {"return_token_ids": True}, "0"), 5)
    stream.feed(events[0])
    assert stream.go_on(ROOM) is None
    stream.attempt()
    stream.feed(b"".join(events[:4]))
    with pytest.raises(CannotGoOnError, match="parses"):
        stream.go_on(ROOM)


def test_a_conversation_that_is_asked_once_more_never_shows_other_ids_for_those_that_its_client_has() -> None:
    stream, body = stream_of(CHAT, max_tokens=30, ignore_eos=True, stop=["q" * 200], return_token_ids=True)
    stream.feed(begun(CHAT, body, 6))
    assert stream.go_on(ROOM) is None
    stream.attempt()
    stream.feed(begun(CHAT, body, 99, salt=5))
    assert stream.differs == "the other engine generated other tokens"


def test_a_stream_of_an_engine_that_tells_no_ids_cannot_go_on() -> None:
    stream, body = stream_of(max_tokens=30)
    stream.feed(b"".join(answer(COMPLETIONS, body, "0")[:4]))
    with pytest.raises(CannotGoOnError, match="ids"):
        stream.go_on(ROOM)


@pytest.mark.parametrize(
    ("path", "fields", "reason"),
    [
        (COMPLETIONS, {}, None),
        (CHAT, {"tools": [], "response_format": {"type": "text"}, "frequency_penalty": 0.0, "n": 1}, None),
        (COMPLETIONS, {"repetition_penalty": 1.2, "logit_bias": {"5": 1}, "top_k": 4, "n": None}, None),
        (COMPLETIONS, {"n": 2}, "n"),
        (COMPLETIONS, {"n": "2"}, "n"),
        (COMPLETIONS, {"echo": True}, "echo"),
        (COMPLETIONS, {"max_tokens": "8"}, "odd_types"),
        (COMPLETIONS, {"min_tokens": 2.0}, "odd_types"),
        (COMPLETIONS, {"include_stop_str_in_output": "no"}, "odd_types"),
        (COMPLETIONS, {"presence_penalty": 0.1}, "penalties"),
        (CHAT, {"frequency_penalty": -0.1}, "penalties"),
        (COMPLETIONS, {"prompt_embeds": "x"}, "media"),
        (CHAT, {"messages": [{"content": [{"type": "image_url"}]}]}, "media"),
        (CHAT, {"messages": [{"content": [{"type": "text", "text": "x"}]}]}, None),
        (CHAT, {"logprobs": True}, "chat_logprobs"),
        (CHAT, {"include_reasoning": False}, "include_reasoning"),
        (CHAT, {"include_reasoning": "no"}, "include_reasoning"),
        (CHAT, {"include_reasoning": True}, None),
        *[
            (CHAT, {name: "x"}, name)
            for name in ("response_format", "structured_outputs", "guided_json", "guided_regex", "guided_choice",
                         "guided_grammar", "structural_tag", "tools", "functions", "bad_words", "logits_processors",
                         "thinking_token_budget", "repetition_detection")
        ],
    ],
)  # fmt: skip
def test_what_lives_in_an_engine_only_is_not_continued(path: str, fields: dict[str, Any], reason: str | None) -> None:
    assert why_not(path, stream_of(path, **fields)[1]) == reason
