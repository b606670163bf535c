"""What becomes of a request when an engine fails it, and of its ticket."""

import asyncio
import json
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import count
from typing import Any

import pytest

from pdrouter import app
from pdrouter.discovery.found import Found
from pdrouter.fleet.engine import Role
from pdrouter.handoff import edges, release
from pdrouter.handoff.retries import ALWAYS, RESERVE, SHARE
from pdrouter.openai.continuation import IDS_FIELD
from router.fakes import (
    TICKET,
    Answer,
    Bed,
    Behaviour,
    FakeEngine,
    Out,
    Seen,
    answer_to,
    decode,
    event,
    routed,
    run,
    until,
    wire,
)
from router.generation import CHAT, Heard, answer, heard, prompt_ids

COMPLETIONS = "/v1/completions"
_tickets = count(1)


def ticket_of(seen: Seen) -> str:
    """Give the name of the ticket in a request."""
    return str(seen.body["kv_transfer_params"]["remote_request_id"])


def issue(life: str = "life-1") -> Behaviour:
    """Prefill as an engine does: a ticket of its own for each request."""

    async def prefill(seen: Seen, out: Out) -> None:
        ticket = TICKET | {"remote_request_id": f"t{next(_tickets)}", "remote_engine_id": life, "remote_num_tokens": 7}
        usage = {"prompt_tokens": 7, "total_tokens": 8, "completion_tokens": 1}
        await out.json(answer_to(seen, kv_transfer_params=ticket, usage=usage, model=seen.body.get("model", "tiny")))

    return prefill


def generate(*deaths: float, gather: tuple[int, ...] = (1,), salt: int = 0) -> Behaviour:
    """Decode as an engine does; its first answers break off, after a share of their bytes or a count of events."""
    left = list(deaths)

    async def decode(seen: Seen, out: Out) -> None:
        request_id = seen.headers.get("x-request-id", "canary")
        if not seen.body.get("stream"):
            await out.json(answer_to(seen))
            return
        death = left.pop(0) if left else None
        events = answer(seen.target, seen.body, request_id, gather, salt)
        whole = b"".join(events)
        await out.events()
        if death is None:
            await out.chunk(whole)
            await out.end()
        else:
            await out.chunk(b"".join(events[:death]) if isinstance(death, int) else whole[: int(len(whole) * death)])
            await asyncio.sleep(0.02)
            out.cut()

    return decode


async def fail(seen: Seen, out: Out) -> None:
    await out.json({"error": {"message": "broken", "type": "InternalServerError", "code": 500}}, 500)


async def reset(seen: Seen, out: Out) -> None:
    out.cut()
    await asyncio.sleep(60)


async def garble(seen: Seen, out: Out) -> None:
    out.writer.write(b"SMTP/9 hello\r\n\r\n")
    await asyncio.sleep(60)


async def tell_an_error_event(seen: Seen, out: Out) -> None:
    await out.events()
    await out.chunk(b'data: {"error": {"message": "EngineCore", "type": "InternalServerError", "code": 500}}\n\n')
    await out.chunk(b"data: [DONE]\n\n")
    await out.end()


async def break_within_the_first_event(seen: Seen, out: Out) -> None:
    await out.events()
    await out.chunk(b'data: {"id":"cmpl-1","choi')
    await asyncio.sleep(0.02)
    out.cut()


async def hang(seen: Seen, out: Out) -> None:
    await asyncio.sleep(60)


async def without_a_ticket(seen: Seen, out: Out) -> None:
    await out.json(answer_to(seen))


async def without_a_request_id(seen: Seen, out: Out) -> None:
    await out.json(answer_to(seen, kv_transfer_params=TICKET | {"remote_request_id": None}))


def once(first: Behaviour, then: Behaviour) -> Behaviour:
    """Do the one with the first request and the other with all others."""
    left = [first]

    async def behave(seen: Seen, out: Out) -> None:
        await (left.pop() if left else then)(seen, out)

    return behave


@asynccontextmanager
async def fleet(prefills: int = 2, decodes: int = 2, **told: Any) -> AsyncIterator[Bed]:
    """Engines that answer as vLLM does, asked in turn; whether they live is not looked at unless that is asked for."""
    defaults = {"policy": "round_robin", "health_interval_secs": 60}
    async with routed(prefills, decodes, **(defaults | told)) as bed:
        for one in bed.prefills:
            one.behave = issue()
        for one in bed.decodes:
            one.behave = generate()
        yield bed


def stand_still(seconds: float) -> None:
    """Let nothing run in this process, the router's too: what came for it stays unread."""
    time.sleep(seconds)


def seen_by(engines: list[FakeEngine]) -> list[Seen]:
    return [seen for one in engines for seen in one.seen]


def given_back(bed: Bed) -> list[str]:
    return [ticket_of(seen) for one in bed.decodes for seen in one.released]


def ended(bed: Bed) -> Counter[str]:
    """How tickets ended."""
    told: Counter[str] = Counter()
    for (_, cause), number in bed.router.desk.ledger.ended.items():
        told[cause.value] += number
    return told


def counted(page: str, name: str) -> float:
    """A metric, its rows added up; `name` may go on with the beginning of labels."""
    return sum(float(line.rpartition(" ")[2]) for line in page.splitlines() if line.startswith(name))


async def quiet(bed: Bed) -> None:
    """Fail unless everything is given back: tickets, load, places in queues."""
    desk = bed.router.desk
    await until(lambda: not len(desk.ledger), "no ticket is open", 4)
    for one in bed.router.fleet:
        load = (one.own_in_flight, one.own_held, one.own_queued, one.own_coming, one.own_pinned)
        assert load == (0, 0, 0, 0, 0), (one.url, load)
    assert (len(desk.waiting), desk.admission.running, desk.admission.waiting) == (0, 0, 0)


async def gone(bed: Bed, engine: FakeEngine) -> None:
    """Stop an engine, and let the router know."""
    await engine.stop()
    known = next(one for one in bed.router.fleet if one.url == engine.url)
    bed.router.fleet.mark(known, False, "test")


async def leave(bed: Bed, body: dict[str, Any], when: Any, **headers: str) -> None:
    """Send a request and close the connection as soon as something is so."""
    _, writer = await bed.connect()
    writer.write(wire("POST", COMPLETIONS, json.dumps({"model": "tiny", "prompt": "x"} | body).encode(), headers))
    await until(when, "the client may leave")
    writer.close()
    await writer.wait_closed()


def slow_to_connect(bed: Bed, seconds: float) -> list[Any]:
    """Let the next connection to decode take so long; it is in the list then."""
    pool = bed.router.pool
    connects, late = pool.connect, []

    async def connect(call: Any) -> None:
        if call.engine.role == "decode" and not late:
            late.append(call)
            await asyncio.sleep(seconds)
        await connects(call)

    pool.connect = connect  # type: ignore[method-assign]
    pool._idle.clear()
    return late


def undisturbed(path: str, body: dict[str, Any], request_id: str) -> Heard:
    return heard(b"".join(answer(path, body, request_id)))


# decode before its first byte


@pytest.mark.parametrize("stream", [False, True])
def test_a_decode_engine_that_refuses_is_replaced_with_the_same_ticket_and_no_second_prefill(stream: bool) -> None:
    async def main() -> None:
        async with fleet(1, 2) as bed:
            await bed.decodes[0].stop()
            for _ in range(3):
                told = await bed.complete(stream=stream)
                assert told.status == 200
                assert told.complete
            assert len(bed.prefill.seen) == len(bed.decodes[1].seen) == 3
            assert given_back(bed) == []
            assert ended(bed) == {"collected": 3}
            assert bed.router.desk.retries.spent == 0, "the engine has not seen the request"
            await quiet(bed)

    run(main)


@pytest.mark.parametrize(
    ("failure", "stream"),
    [
        *[(failure, stream) for failure in (fail, reset, garble) for stream in (False, True)],
        (tell_an_error_event, True),
        (break_within_the_first_event, True),
    ],
)
def test_a_decode_engine_that_fails_before_its_first_byte_costs_a_prefill_and_nothing_else(
    failure: Behaviour, stream: bool
) -> None:
    """The ticket may be used up or not, so it is given back; the same prefill engine has the prompt cached."""

    async def main() -> None:
        async with fleet(2, 2) as bed:
            bed.decodes[0].behave = bed.decodes[1].behave = once(failure, generate())
            body = {"model": "tiny", "prompt": "hi", "max_tokens": 12, "ignore_eos": True, "stream": stream}
            told = await bed.post(COMPLETIONS, body, x_request_id="r1")
            assert told.status == 200
            assert told.complete
            if stream:
                assert heard(told.body) == undisturbed(COMPLETIONS, body, "r1")
                assert told.body.count(b'"token_ids":null') == 12, "ids were asked for and not told"
                assert all(seen.body["return_token_ids"] for seen in seen_by(bed.decodes)), "both could be continued"
            assert sorted(len(one.seen) for one in bed.prefills) == [0, 2], "the engine that has the prompt cached"
            assert [len(one.seen) for one in bed.decodes] == [1, 1]
            legs = seen_by(bed.prefills) + seen_by(bed.decodes)
            assert {seen.headers["x-request-id"] for seen in legs} == {"r1"}
            first, second = sorted(map(ticket_of, seen_by(bed.decodes)), key=lambda name: int(name[1:]))
            assert first != second
            await quiet(bed)
            assert set(given_back(bed)) == {first}, "only what may be unused"
            assert ended(bed) == {"lost": 1, "collected": 1}
            assert bed.router.desk.retries.spent == 1

    run(main)


async def tell_an_error_event_in_pieces(seen: Seen, out: Out) -> None:
    await out.events()
    for piece in (b'data: {"err', b'or": {"message": "EngineCore", "code": 500}}\n', b"\ndata: [DONE]\n\n"):
        await out.chunk(piece)
        await asyncio.sleep(0.02)
    await out.end()


@pytest.mark.parametrize("failure", [tell_an_error_event, tell_an_error_event_in_pieces, break_within_the_first_event])
@pytest.mark.parametrize("fields", [{"frequency_penalty": 0.5}, {"response_format": {"type": "json_object"}}, {}])
def test_a_stream_that_could_not_go_on_elsewhere_begins_there_while_its_client_has_nothing(
    failure: Behaviour, fields: dict[str, Any]
) -> None:
    async def main() -> None:
        async with fleet(1, 2, continue_streams=bool(fields)) as bed:
            bed.decodes[0].behave = bed.decodes[1].behave = once(failure, generate())
            body = {"model": "tiny", "prompt": "hi", "max_tokens": 12, "ignore_eos": True, "stream": True} | fields
            told = await bed.post(COMPLETIONS, body, x_request_id="r1")
            assert (told.status, told.complete) == (200, True)
            assert heard(told.body) == undisturbed(COMPLETIONS, body, "r1")
            assert sorted(engine.failures for engine in bed.router.fleet.engines[Role.DECODE]) == [0, 1]
            await quiet(bed)
            assert ended(bed) == {"lost": 1, "collected": 1}

    run(main)


@pytest.mark.parametrize("fields", [{"frequency_penalty": 0.5}, {"n": 2}])
def test_a_first_event_that_tells_the_clients_own_fault_is_its_answer(fields: dict[str, Any]) -> None:
    async def main() -> None:
        async with fleet(1, 2) as bed:

            async def refuse(seen: Seen, out: Out) -> None:
                await out.events()
                await out.chunk(b'data: {"error": {"message": "no such grammar", "code": 400}}\n\ndata: [DONE]\n\n')
                await out.end()

            bed.decodes[0].behave = bed.decodes[1].behave = refuse
            told = await bed.complete(stream=True, **fields)
            assert (told.status, told.error["message"]) == (400, "no such grammar")
            assert len(seen_by(bed.decodes)) == 1
            await quiet(bed)

    run(main)


@pytest.mark.parametrize("size", [1, 600_000])
def test_what_is_no_event_is_passed_on_all_the_same(size: int) -> None:
    """Held is what may still become an event, and no more of it than that takes."""

    async def main() -> None:
        async with fleet(1, 1) as bed:
            text, seen_some = b"x" * size, asyncio.Event()

            async def ramble(seen: Seen, out: Out) -> None:
                await out.events()
                await out.chunk(text)
                if size > 1:
                    await seen_some.wait()
                await out.end()

            bed.decode.behave = ramble
            body = {"model": "tiny", "prompt": "hi", "stream": True, "frequency_penalty": 0.5}
            reader, writer = await bed.connect()
            writer.write(wire("POST", COMPLETIONS, json.dumps(body).encode()))
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200")
            seen_some.set()
            rest = await reader.readuntil(b"0\r\n\r\n")
            assert rest.count(b"x") == size
            writer.close()

    run(main)


# an engine that gives up what it has under way, and says so in good order


def gave_up(event: bytes) -> bytes:
    """Make an event one that tells that the engine was paused, put to sleep or shut down."""
    chunk = json.loads(event[6:])
    chunk["choices"][0] |= {"token_ids": [], "finish_reason": "abort", "stop_reason": None}
    return b"data: " + json.dumps(chunk, separators=(",", ":")).encode() + b"\n\n"


def give_up(after: int) -> Behaviour:
    """Do what vLLM does when it is paused after so many events of a stream."""

    async def behave(seen: Seen, out: Out) -> None:
        if not seen.body.get("stream"):
            choices = [{"index": 0, "text": "<x", "finish_reason": "abort", "stop_reason": None}]
            await out.json(json.dumps(answer_to(seen, choices=choices), separators=(",", ":")).encode())
            return
        events = answer(seen.target, seen.body, "r1")
        await out.events()
        await out.chunk(b"".join([*events[:after], gave_up(events[after]), b"data: [DONE]\n\n"]))
        await out.end()

    return behave


@pytest.mark.parametrize("after", [0, 1, 4])
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_a_stream_that_its_engine_gives_up_in_good_order_goes_on_elsewhere(path: str, after: int) -> None:
    async def main() -> None:
        async with fleet(1, 2) as bed:
            bed.decodes[0].behave = bed.decodes[1].behave = once(give_up(max(after, path == CHAT)), generate())
            asked = {"prompt": "x"} if path == COMPLETIONS else {"messages": [{"role": "user", "content": "x"}]}
            body = {"model": "tiny", "max_tokens": 9, "stream": True, "ignore_eos": True} | asked
            told = heard((await bed.post(path, body, x_request_id="r1")).body)
            right = undisturbed(path, body, "r1")
            assert (told.text, told.ends, told.done) == (right.text, right.ends, 1)
            assert [len(one.seen) for one in bed.decodes] == [1, 1]
            await quiet(bed)

    run(main)


@pytest.mark.parametrize("fields", [{}, {"n": 2}, {"stream": True, "frequency_penalty": 0.5}])
def test_an_answer_that_its_engine_gives_up_in_good_order_is_given_by_another(fields: dict[str, Any]) -> None:
    async def main() -> None:
        async with fleet(1, 2) as bed:
            bed.decodes[0].behave = bed.decodes[1].behave = once(give_up(0), generate())
            body = {"model": "tiny", "prompt": "x", "max_tokens": 9, "ignore_eos": True} | fields
            told = await bed.post(COMPLETIONS, body, x_request_id="r1")
            assert (told.status, told.complete) == (200, True)
            assert b'"abort"' not in told.body
            assert [len(one.seen) for one in bed.decodes] == [1, 1]
            assert sorted(engine.failures for engine in bed.router.fleet.engines[Role.DECODE]) == [0, 1]
            await quiet(bed)

    run(main)


def test_an_answer_that_every_engine_gives_up_is_an_error() -> None:
    async def main() -> None:
        async with fleet(1, 2) as bed:
            for one in bed.decodes:
                one.behave = give_up(0)
            told = await bed.complete()
            assert (told.status, told.error["leg"]) == (500, "decode")
            await quiet(bed)

    run(main)


# a stream by one engine


async def break_off_after_a_piece_of_the_first_event_of_two(seen: Seen, out: Out) -> None:
    await out.events()
    await out.chunk(event(seen, 0, "wrong")[:-2])
    await asyncio.sleep(0.02)
    out.cut()


@pytest.mark.parametrize(
    "failure",
    [tell_an_error_event, tell_an_error_event_in_pieces, break_off_after_a_piece_of_the_first_event_of_two, give_up(0)],
)
def test_a_stream_by_one_engine_begins_elsewhere_while_its_client_has_nothing(failure: Behaviour) -> None:
    async def main() -> None:
        async with fleet(1, 2) as bed:
            bed.decodes[0].behave = bed.decodes[1].behave = once(failure, decode)
            told = await bed.complete(stream=True, n=2)
            assert (told.status, told.complete) == (200, True)
            assert [one["choices"][0]["text"] for one in told.events] == ["<hi>0", "<hi>1", "!"]
            assert [len(one.seen) for one in bed.decodes] == [1, 1]
            assert sorted(engine.failures for engine in bed.router.fleet.engines[Role.DECODE]) == [0, 1]
            await quiet(bed)

    run(main)


def test_a_ticket_is_given_back_whole_in_a_request_that_vllm_refuses_after_it_was_parsed() -> None:
    async def main() -> None:
        async with fleet(1, 2) as bed:
            bed.decodes[0].behave = bed.decodes[1].behave = once(fail, generate())
            await bed.complete()
            await quiet(bed)
            seen = next(seen for one in bed.decodes for seen in one.released)
            assert list(seen.body["kv_transfer_params"]) == list(TICKET)
            rest = {name: value for name, value in seen.body.items() if name != "kv_transfer_params"}
            assert rest == {"model": "tiny", "prompt": [0], "max_tokens": 1, "min_tokens": 2}

    run(main)


@pytest.mark.parametrize("met", [False, True])
def test_two_engines_that_never_met_are_told_twice_to_forget_a_ticket(met: bool) -> None:
    """The first refusal only makes them shake hands."""

    async def main() -> None:
        async with fleet(1, 1) as bed:
            if met:
                await bed.complete()
            bed.decode.behave = once(fail, generate())
            assert (await bed.complete()).status == 200
            await quiet(bed)
            first = ticket_of(bed.decode.seen[-2])
            assert given_back(bed) == [first] * (1 if met else 2)

    run(main)


@pytest.mark.parametrize("fields", [{}, {"stream": True, "stream_options": {"include_usage": True}}])
def test_a_request_that_decode_refuses_gives_its_ticket_back_whether_or_not_decode_did(fields: dict[str, Any]) -> None:
    """What fails while vLLM parses the body leaves the blocks pinned: prefill was not sent those fields."""

    async def main() -> None:
        async with fleet(1, 1) as bed:

            async def refuse(seen: Seen, out: Out) -> None:
                await out.json({"error": {"message": "stream_options", "code": 400}}, 400)

            bed.decode.behave = refuse
            told = await bed.complete(**fields)
            assert (told.status, told.error["message"]) == (400, "stream_options")
            await quiet(bed)
            assert set(given_back(bed)) == {ticket_of(bed.decode.seen[0])}
            assert ended(bed) == {"refused": 1}
            assert len(bed.prefill.seen) == 1, "the client's own fault is not tried again"

    run(main)


# prefill


@pytest.mark.parametrize("failure", [fail, reset, garble, without_a_ticket, without_a_request_id, None])
def test_a_prefill_engine_that_fails_is_replaced(failure: Behaviour | None) -> None:
    async def main() -> None:
        async with fleet(2, 1) as bed:
            if failure is None:
                await bed.prefills[0].stop()
            else:
                bed.prefills[0].behave = failure
            for _ in range(4):
                assert (await bed.complete(stream=True)).complete
            assert len(bed.prefills[1].seen) == len(bed.decode.seen) == 4
            assert ended(bed) == {"collected": 4}
            await quiet(bed)

    run(main)


@pytest.mark.parametrize("failure", [without_a_ticket, without_a_request_id])
def test_a_prefill_engine_whose_tickets_are_useless_is_left_alone_like_one_that_fails(failure: Behaviour) -> None:
    async def main() -> None:
        async with fleet(2, 1, policy="least_tokens") as bed:
            bed.prefills[0].behave = failure
            for number in range(40):
                assert (await bed.complete(str(number))).status == 200
            assert 1 <= len(bed.prefills[0].seen) <= 5
            assert [one["breaker_open"] for one in await bed.workers()].count(True) <= 1

    run(main)


def test_a_prefill_engine_that_refuses_keeps_no_room_on_decode_for_a_request_that_waits() -> None:
    """Decode has room for one request only, and the request that waits is that one."""

    async def main() -> None:
        async with fleet(1, 1, decode_only=False, health_interval_secs=0.1) as bed:
            bed.router.fleet.engines[Role.DECODE][0].kv_tokens = 150
            await bed.prefill.stop()
            bed.router.pool._idle.clear()
            asking = asyncio.ensure_future(bed.complete(max_tokens=100))
            await until(lambda: bed.router.desk.waiting.count(Role.PREFILL), "it waits for prefill")
            assert bed.router.fleet.engines[Role.DECODE][0].held_tokens == 0
            await bed.prefill.start_again()
            assert (await asking).status == 200
            await quiet(bed)

    run(main)


# decode in the middle of a stream

STREAMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "usage": {"stream_options": {"include_usage": True}},
    "usage in every event": {"stream_options": {"include_usage": True, "continuous_usage_stats": True}},
    "stop strings": {"stop": ["never that", "qq"]},
    "ids": {"return_token_ids": True},
    "min_tokens": {"min_tokens": 20},
    "an end by itself": {"ignore_eos": False, "max_tokens": 200},
}


@pytest.mark.parametrize("deaths", [(0.4,), (0.3, 0.3), (0.6, 0.02, 0.5)], ids=["once", "twice", "thrice"])
@pytest.mark.parametrize("name", STREAMS)
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_a_stream_whose_engine_dies_goes_on_as_if_nothing_had_happened(
    path: str, name: str, deaths: tuple[float, ...]
) -> None:
    async def main() -> None:
        async with fleet(2, 2) as bed:
            engine, order = generate(*deaths), list[Seen]()

            async def decode(seen: Seen, out: Out) -> None:
                order.append(seen)
                await engine(seen, out)

            bed.decodes[0].behave = bed.decodes[1].behave = decode
            asked = {"prompt": "hi"} if path == COMPLETIONS else {"messages": [{"role": "user", "content": "hi"}]}
            body = {"model": "tiny", "max_tokens": 40, "stream": True, "temperature": 0, "ignore_eos": True}
            body |= asked | STREAMS[name]
            told = await bed.post(path, body, x_request_id="r1")
            assert told.complete
            got, right = heard(told.body), undisturbed(path, body, "r1")
            got.fingerprints = right.fingerprints = min(got.fingerprints, right.fingerprints)
            assert got == right
            first, *others = order
            assert first.target == path
            prompt = prompt_ids(path, body)
            for seen in others:
                assert seen.target == COMPLETIONS, "by ids, which is exact"
                assert seen.headers["x-request-id"] == "r1"
                generated = len(seen.body["prompt"]) - len(prompt)
                assert seen.body["prompt"][: len(prompt)] == prompt
                assert seen.body["max_tokens"] == body["max_tokens"] - generated
                assert seen.body.get("min_tokens") == (max(0, 20 - generated) if name == "min_tokens" else None)
                assert "messages" not in seen.body
            assert len(others) == len(deaths)
            asked_prefill = [seen.body["prompt"] for seen in seen_by(bed.prefills) if "prompt" in seen.body]
            assert all(seen.body["prompt"] in asked_prefill for seen in others), "a continuation is handed over too"
            assert len({ticket_of(seen) for seen in order}) == len(order)
            assert f"pd_router_continued_streams_total {len(deaths)}.0" in await bed.metrics()
            await quiet(bed)

    run(main)


@pytest.mark.parametrize("deaths", [(1,), (1, 1), (1, 0.5)], ids=["once", "twice", "later, too"])
def test_a_conversation_that_has_said_nothing_is_asked_once_more(deaths: tuple[float, ...]) -> None:
    """A completion by ids would tell the reasoning that may come first as text."""

    async def main() -> None:
        async with fleet(2, 2) as bed:
            engine, order = generate(*deaths), list[Seen]()

            async def decode(seen: Seen, out: Out) -> None:
                order.append(seen)
                await engine(seen, out)

            bed.decodes[0].behave = bed.decodes[1].behave = decode
            body = {"model": "tiny", "max_tokens": 40, "stream": True, "temperature": 0, "ignore_eos": True}
            body |= {"messages": [{"role": "user", "content": "hi"}]}
            told = await bed.post(CHAT, body, x_request_id="r1")
            assert told.complete
            assert heard(told.body) == undisturbed(CHAT, body, "r1")
            later = [COMPLETIONS] if deaths[-1] != 1 else []
            assert [seen.target for seen in order] == [CHAT] * (1 + len(deaths) - len(later)) + later
            assert {seen.target for seen in seen_by(bed.prefills)} == {CHAT, *later}
            assert len({ticket_of(seen) for seen in order}) == len(order)
            assert f"pd_router_continued_streams_total {len(deaths)}.0" in await bed.metrics()
            await quiet(bed)

    run(main)


def test_a_ticket_that_waited_for_the_router_to_run_again_counts_from_before() -> None:
    async def main() -> None:
        async with fleet(1, 1, kv_lease_seconds=0.8) as bed:
            give, slept = issue(), list[float]()

            async def prefill(seen: Seen, out: Out) -> None:
                await give(seen, out)
                if not slept:
                    slept.append(0.9)
                    stand_still(slept[0])

            bed.prefill.behave = prefill
            told = await bed.post(COMPLETIONS, {"model": "tiny", "prompt": "x", "max_tokens": 6})
            assert told.status == 200
            assert len(bed.prefill.seen) == 2, "the first ticket was too old"
            assert len(bed.decode.seen) == 1

    run(main)


@pytest.mark.parametrize("events", [1000, -1, -2], ids=["after [DONE]", "before [DONE]", "before usage"])
def test_a_stream_that_had_its_end_is_ended_by_the_router_itself(events: int) -> None:
    async def main() -> None:
        async with fleet(1, 2) as bed:
            bed.decodes[0].behave = bed.decodes[1].behave = generate(events)
            body = {"model": "tiny", "prompt": "x", "max_tokens": 6, "stream": True, "ignore_eos": True}
            body |= {"stream_options": {"include_usage": True}}
            told = await bed.post(COMPLETIONS, body, x_request_id="r1")
            assert told.complete
            got, right = heard(told.body), undisturbed(COMPLETIONS, body, "r1")
            assert (got.text, got.ends, got.usage, got.done) == (right.text, right.ends, right.usage, 1)
            assert len(seen_by(bed.decodes)) == len(bed.prefill.seen) == 1
            await quiet(bed)

    run(main)


@pytest.mark.parametrize("told", [None, False])
def test_a_stream_whose_client_says_that_it_wants_no_ids_goes_on_elsewhere_without_them(
    told: bool | None,
) -> None:
    async def main() -> None:
        async with fleet(1, 2) as bed:
            bed.decodes[0].behave, bed.decodes[1].behave = generate(0.5), generate(0.5)
            body = {"model": "tiny", "prompt": "x", "max_tokens": 40, "stream": True, "ignore_eos": True}
            got = await bed.post(COMPLETIONS, body | {IDS_FIELD: told}, x_request_id="r1")
            assert heard(got.body) == undisturbed(COMPLETIONS, body, "r1")
            assert {event["choices"][0]["token_ids"] for event in got.events if event["choices"]} == {None}
            await quiet(bed)

    run(main)


def test_an_error_event_behind_half_an_event_can_be_read() -> None:
    async def main() -> None:
        async with fleet(1, 1) as bed:

            async def begin_another(seen: Seen, out: Out) -> None:
                events = answer(seen.target, seen.body, "r1")
                await out.events()
                await out.chunk(b"".join(events[:3]) + events[3][:20])
                await asyncio.sleep(0.02)
                out.cut()

            bed.decode.behave = begin_another
            told = await bed.complete(stream=True, frequency_penalty=1)
            *_, half, error = told.body.removesuffix(b"\n\n").split(b"\n\n")
            assert half.startswith(b"data: {")
            assert json.loads(error.removeprefix(b"data: "))["error"]["code"] == 502

    run(main)


def test_an_error_event_in_the_middle_of_a_stream_is_an_engines_death() -> None:
    async def main() -> None:
        async with fleet(1, 2) as bed:

            async def die(seen: Seen, out: Out) -> None:
                events = answer(seen.target, seen.body, "r1")
                await out.events()
                await out.chunk(b"".join(events[:5]))
                await out.chunk(b'data: {"error": {"message": "EngineCore", "code": 500}}\n\ndata: [DONE]\n\n')
                await out.end()

            bed.decodes[0].behave = bed.decodes[1].behave = once(die, generate())
            body = {"model": "tiny", "prompt": "x", "max_tokens": 20, "stream": True, "ignore_eos": True}
            told = await bed.post(COMPLETIONS, body, x_request_id="r1")
            assert told.complete
            assert heard(told.body) == undisturbed(COMPLETIONS, body, "r1")

    run(main)


@pytest.mark.parametrize(
    "fields",
    [
        {"n": 2},
        {"echo": True},
        {"frequency_penalty": 0.5},
        {"response_format": {"type": "json_object"}},
        {"structured_outputs": {"choice": ["a"]}},
        {"bad_words": ["no"]},
        {"tools": [{"type": "function"}]},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_a_stream_that_cannot_go_on_ends_with_an_error_event_and_never_silently(fields: dict[str, Any]) -> None:
    async def main() -> None:
        async with fleet(1, 2) as bed:
            bed.decodes[0].behave = bed.decodes[1].behave = generate(5)
            told = await bed.complete(stream=True, max_tokens=30, ignore_eos=True, **fields)
            assert told.status == 200
            assert not told.complete, "the end of the body is missing"
            assert heard(told.body).done == 0
            assert told.events[-1]["error"]["code"] == 502
            assert told.events[-1]["error"]["leg"] == "decode"
            assert len(seen_by(bed.decodes)) == 1
            await quiet(bed)

    run(main)


@pytest.mark.parametrize("field", [b'"choices":[', b'"prompt_token_ids":['])
def test_a_stream_ends_with_an_error_event_when_an_event_that_its_engine_told_cannot_be_read(field: bytes) -> None:
    async def main() -> None:
        async with fleet(1, 2) as bed:

            async def tell_it_and_die(seen: Seen, out: Out) -> None:
                odd = b'"x",' if field == b'"choices":[' else b"["
                await out.events()
                await out.chunk(answer(seen.target, seen.body, "r1")[0].replace(field, field + odd))
                await asyncio.sleep(0.02)
                out.cut()

            bed.decodes[0].behave = bed.decodes[1].behave = tell_it_and_die
            told = await bed.complete(stream=True)
            assert not told.complete
            error = json.loads(told.body.split(b"\n\n")[-2][6:])["error"]
            assert error["code"] == 502
            assert "cannot be read" in error["message"]
            await quiet(bed)

    run(main)


def test_a_sampled_stream_that_another_engine_would_tell_otherwise_ends_with_an_error_event() -> None:
    """Several tokens in the last event: they would be drawn anew, and are not the ones that the client has."""

    async def main() -> None:
        async with fleet(1, 2) as bed:
            bed.decodes[0].behave = generate(6, gather=(1, 1, 1, 1, 1, 4))
            bed.decodes[1].behave = generate(salt=3)
            told = await bed.complete(stream=True, max_tokens=30, ignore_eos=True, temperature=1)
            assert not told.complete
            assert "other" in told.events[-1]["error"]["message"]
            assert 'pd_router_errors_total{leg="decode",reason="not_continued"} 1.0' in await bed.metrics()
            assert bed.router.fleet.engines[Role.DECODE][1].failures == 0, "the second engine did nothing wrong"
            await quiet(bed)

    run(main)


def test_prompts_of_a_batch_go_on_one_by_one() -> None:
    async def main() -> None:
        async with fleet(2, 2) as bed:
            bed.decodes[0].behave = generate(0.5)
            body = {"model": "tiny", "prompt": ["a", "b"], "max_tokens": 20, "stream": True, "ignore_eos": True}
            told = await bed.post(COMPLETIONS, body, x_request_id="r1")
            assert told.complete
            for number, prompt in enumerate(("a", "b")):
                text = "".join(
                    one["text"] for event in told.events for one in event["choices"] if one["index"] == number
                )
                assert text == undisturbed(COMPLETIONS, body | {"prompt": prompt}, "r1").text
            assert told.body.count(b"[DONE]") == 1
            await quiet(bed)

    run(main)


# budget and load


def test_a_total_outage_is_told_and_not_made_worse_by_trying() -> None:
    requests = 120

    async def main() -> None:
        async with fleet(2, 2) as bed:
            for one in bed.decodes:
                one.behave = fail
            loop = asyncio.get_running_loop()
            began = loop.time()
            gate = asyncio.Semaphore(20)

            async def ask(number: int) -> Answer:
                async with gate:
                    return await bed.complete(str(number))

            told = await asyncio.gather(*map(ask, range(requests)))
            assert {one.status for one in told} == {500}
            assert {one.error["message"] for one in told} == {"broken"}
            budget = RESERVE + SHARE * requests + ALWAYS * (loop.time() - began) + 1
            tries = len(seen_by(bed.decodes)) - requests
            assert 0 < tries <= budget
            assert tries < 3 * requests, "the budget is what ended it"
            assert len(seen_by(bed.prefills)) == requests + tries
            page = await bed.metrics()
            assert counted(page, 'pd_router_retries_total{outcome="spent"}') == tries
            assert counted(page, 'pd_router_retries_total{outcome="refused"}') > 0
            await quiet(bed)

    run(main)


@pytest.mark.parametrize("role", ["prefill", "decode"])
@pytest.mark.parametrize("policy", ["llmd_pd_guide", "least_tokens", "power_of_two", "pd_cost", "round_robin"])
def test_an_engine_that_fails_at_once_does_not_draw_the_requests_of_all_others(policy: str, role: str) -> None:
    requests = 100

    async def main() -> None:
        async with fleet(4, 4, policy=policy) as bed:
            engines = bed.prefills if role == "prefill" else bed.decodes
            engines[2].behave = fail
            gate = asyncio.Semaphore(8)

            async def ask(number: int) -> Answer:
                async with gate:
                    return await bed.complete(f"{number} what is it")

            told = await asyncio.gather(*map(ask, range(requests)))
            assert {one.status for one in told} == {200}
            assert len(engines[2].seen) < requests / 8, "half of its share at most, until it is left alone"
            await quiet(bed)

    run(main)


# no engine, no room


@pytest.mark.parametrize(("role", "path"), [("prefill", COMPLETIONS), ("decode", COMPLETIONS), ("decode", "/tokenize")])
def test_requests_wait_for_a_role_that_is_gone_and_are_served_when_it_is_back(role: str, path: str) -> None:
    async def main() -> None:
        async with fleet(1, 1, decode_only=False, health_interval_secs=0.1) as bed:
            engine = bed.prefill if role == "prefill" else bed.decode
            await gone(bed, engine)
            asking = [asyncio.ensure_future(bed.post(path, {"model": "tiny", "prompt": f"{n}"})) for n in range(3)]
            await until(lambda: len(bed.router.desk.waiting) == 3, "they wait")
            page = await bed.metrics()
            assert f'pd_router_requests_waiting{{for="{role}"}} 3.0' in page
            await engine.start_again()
            assert [(await one).status for one in asking] == [200, 200, 200]
            await quiet(bed)

    run(main)


@pytest.mark.parametrize("path", [COMPLETIONS, "/tokenize"])
def test_who_waited_too_long_for_an_engine_is_told_when_to_come_again(path: str) -> None:
    async def main() -> None:
        async with fleet(1, 1, queue_timeout_secs=0.3, decode_only=False) as bed:
            await gone(bed, bed.decode)
            told = await bed.post(path, {"model": "tiny", "prompt": "x"})
            assert told.status == 503
            assert int(told.headers["retry-after"]) >= 1
            assert told.error["leg"] == "decode"
            await quiet(bed)

    run(main)


def test_a_full_queue_turns_requests_away_at_once() -> None:
    async def main() -> None:
        async with fleet(1, 1, queue_size=2, decode_only=False) as bed:
            await gone(bed, bed.decode)
            asking = [asyncio.ensure_future(bed.complete(str(n))) for n in range(2)]
            await until(lambda: len(bed.router.desk.waiting) == 2, "two wait")
            told = await bed.complete()
            assert (told.status, int(told.headers["retry-after"]) >= 1) == (503, True)
            for one in asking:
                one.cancel()

    run(main)


def test_a_stream_that_has_begun_waits_for_room_in_a_full_queue_too() -> None:
    async def main() -> None:
        async with fleet(1, 2, queue_size=1, queue_timeout_secs=100) as bed:
            for engine in bed.router.fleet.engines[Role.DECODE]:
                engine.kv_tokens = 150
            death, end = asyncio.Event(), asyncio.Event()

            async def begin_and_die(seen: Seen, out: Out) -> None:
                await out.events()
                await out.chunk(b"".join(answer(seen.target, seen.body, "r1")[:5]))
                await death.wait()

            async def take_time(seen: Seen, out: Out) -> None:
                await end.wait()
                await out.json(answer_to(seen))

            first, second = bed.decodes
            first.behave, second.behave = begin_and_die, once(take_time, generate())
            body = {"model": "tiny", "prompt": "x", "max_tokens": 100, "stream": True, "ignore_eos": True}
            stream = asyncio.ensure_future(bed.post(COMPLETIONS, body, x_request_id="r1"))
            await until(lambda: first.seen, "the stream is at the first engine")
            other = asyncio.ensure_future(bed.complete("other", max_tokens=100))
            await until(lambda: second.seen, "the second engine is full")
            patient = asyncio.ensure_future(bed.complete("patient", max_tokens=100))
            await until(lambda: len(bed.router.desk.waiting) == 1, "the queue is full")
            assert (await bed.complete("one too many", max_tokens=100)).status == 429
            await gone(bed, first)
            await until(lambda: len(bed.router.desk.waiting) == 2, "the stream waits too")
            assert (await bed.complete("one too many", max_tokens=100)).status == 429
            bed.router.desk.waiting.wake()  # in vain: nobody loses a place by that
            end.set()
            assert (await other).status == (await patient).status == 200
            told = await stream
            assert told.complete
            assert heard(told.body) == undisturbed(COMPLETIONS, body, "r1")
            await quiet(bed)

    run(main)


def test_requests_with_tickets_wait_for_decode_in_a_full_queue_too() -> None:
    async def main() -> None:
        async with fleet(1, 1, queue_size=1, health_interval_secs=0.1) as bed:
            go_on = asyncio.Event()

            async def prefill(seen: Seen, out: Out) -> None:
                await go_on.wait()
                await issue()(seen, out)

            bed.prefill.behave = prefill
            asking = [asyncio.ensure_future(bed.complete(f"{number}")) for number in range(3)]
            await until(lambda: len(bed.prefill.seen) == 3, "all are at prefill")
            await gone(bed, bed.decode)
            go_on.set()
            await until(lambda: bed.router.desk.waiting.count(Role.DECODE) == 3, "all wait with their tickets")
            await bed.decode.start_again()
            assert [(await one).status for one in asking] == [200, 200, 200]
            assert len(bed.prefill.seen) == 3
            await quiet(bed)

    run(main)


def test_a_ticket_waits_for_a_decode_engine_that_comes_back() -> None:
    async def main() -> None:
        async with fleet(1, 1, health_interval_secs=0.1) as bed:
            await bed.decode.stop()
            asking = asyncio.ensure_future(bed.complete())
            await until(lambda: bed.router.desk.waiting.count(Role.DECODE), "it waits")
            assert bed.router.desk.ledger.tickets(bed.router.fleet.engines[Role.PREFILL][0]) == (1, 0)
            await bed.decode.start_again()
            assert (await asking).status == 200
            assert len(bed.prefill.seen) == 1
            assert ended(bed) == {"collected": 1}

    run(main)


@pytest.mark.parametrize("stream", [False, True])
def test_without_any_prefill_engine_decode_computes_prompts_itself(stream: bool) -> None:
    async def main() -> None:
        async with fleet(1, 2) as bed:
            await bed.prefill.stop()
            body = {"model": "tiny", "prompt": "x", "max_tokens": 9, "stream": stream, "ignore_eos": True}
            told = await bed.post(COMPLETIONS, body, x_request_id="r1")
            assert told.status == 200
            if stream:
                assert heard(told.body) == undisturbed(COMPLETIONS, body, "r1")
            assert "kv_transfer_params" not in seen_by(bed.decodes)[0].body
            assert 'prefill="none"' in await bed.metrics()
            await quiet(bed)

    run(main)


def test_a_stream_goes_on_by_decode_alone_when_prefill_is_gone() -> None:
    async def main() -> None:
        async with fleet(1, 2) as bed:
            first = generate(0.5)

            async def die_with_prefill(seen: Seen, out: Out) -> None:
                await bed.prefill.stop()
                await first(seen, out)

            bed.decodes[0].behave = bed.decodes[1].behave = once(die_with_prefill, generate())
            body = {"model": "tiny", "prompt": "x", "max_tokens": 20, "stream": True, "ignore_eos": True}
            told = await bed.post(COMPLETIONS, body, x_request_id="r1")
            assert told.complete
            assert heard(told.body) == undisturbed(COMPLETIONS, body, "r1")
            await quiet(bed)

    run(main)


def test_decode_that_refuses_after_it_served_alone_leaves_no_ticket_open() -> None:
    """Alone at first, as there is no prefill; then there is one, and the decode engine refuses its ticket."""

    async def main() -> None:
        async with fleet(1, 2, health_interval_secs=0.1) as bed:
            await bed.prefill.stop()
            await until(lambda: not bed.router.fleet.healthy(Role.PREFILL), "prefill is gone")
            connects = bed.router.pool.connect
            refused: list[Any] = []

            async def connect(call: Any) -> None:
                if call.engine.role == "decode" and len(refused) < 2 and call in bed.router.pool.open(call.engine):
                    refused.append(call)
                    if len(refused) == 1:
                        await bed.prefill.start_again()
                        await until(bed.router.fleet.ready, "prefill is back")
                    port, call.engine.port = call.engine.port, 1
                    try:
                        await connects(call)
                    finally:
                        call.engine.port = port
                    return
                await connects(call)

            bed.router.pool.connect = connect  # type: ignore[method-assign]
            bed.router.pool.take = lambda engine: None  # type: ignore[method-assign]
            assert (await bed.complete()).status == 200
            assert len(refused) == 2
            await quiet(bed)

    run(main)


# clients that leave


@pytest.mark.parametrize("model", ["tiny", "adapter"])
def test_a_client_that_leaves_during_prefill_gives_its_ticket_back_as_soon_as_there_is_one(model: str) -> None:
    """To break prefill off in the moment in which it ends would leave blocks pinned that nobody knows of."""

    async def main() -> None:
        async with fleet(1, 1) as bed:
            done = asyncio.Event()

            async def prefill(seen: Seen, out: Out) -> None:
                await done.wait()
                await issue()(seen, out)

            bed.prefill.behave = prefill
            await leave(bed, {"model": model}, lambda: bed.prefill.seen)
            await until(lambda: not bed.router.admission.running, "the router knows")
            assert not bed.prefill.seen[0].gone.is_set()
            done.set()
            await until(lambda: given_back(bed), "it is given back")
            assert bed.decode.seen == []
            await quiet(bed)
            assert ended(bed) == {"released": 1}

    run(main)


@pytest.mark.parametrize("left_in", ["prefill", "decode"])
def test_engines_with_a_key_get_a_ticket_back_under_the_clients_own(left_in: str) -> None:
    async def main() -> None:
        async with fleet(1, 1) as bed:
            bed.prefill.key = bed.decode.key = "theirs"
            done = asyncio.Event()

            async def prefill(seen: Seen, out: Out) -> None:
                await done.wait()
                await issue()(seen, out)

            bed.decode.behave = hang
            asked = bed.decode.seen
            if left_in == "prefill":
                bed.prefill.behave = prefill
                asked = bed.prefill.seen
            await leave(bed, {}, lambda: asked, authorization="Bearer theirs", traceparent="00-1-2-01")
            done.set()
            await until(lambda: ended(bed) == {"released": 1}, "it is given back")
            assert [seen.headers["authorization"] for seen in bed.decode.released] == ["Bearer theirs"] * 2
            assert "traceparent" not in bed.decode.released[0].headers
            assert bed.decode.turned_away == 0
            await quiet(bed)

    run(main)


def test_an_engine_that_wants_another_key_has_not_taken_a_ticket_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(release, "_LATER", 0.05)

    async def main() -> None:
        async with fleet(1, 2) as bed:
            bed.decodes[0].behave = bed.decodes[1].behave = hang
            await leave(bed, {}, lambda: seen_by(bed.decodes) and [setattr(one, "key", "k") for one in bed.decodes])
            await until(lambda: sum(one.turned_away for one in bed.decodes) > 4, "both are asked, and asked again")
            assert ended(bed) == {}
            assert len(bed.router.desk.ledger) == 1
            for one in bed.decodes:
                one.key = ""
            await quiet(bed)
            assert ended(bed) == {"released": 1}

    run(main)


def test_a_ticket_that_a_frozen_decode_engine_does_not_take_back_is_given_back_by_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(release, "_PATIENCE", 0.2)

    async def main() -> None:
        async with fleet(1, 2) as bed:
            for _ in range(2):
                await bed.complete()  # all have met
            first = bed.router.fleet.healthy(Role.DECODE)[0]
            frozen = next(one for one in bed.decodes if one.url == first.url)
            bed.decodes[0].behave = bed.decodes[1].behave = hang
            await leave(bed, {}, lambda: len(seen_by(bed.decodes)) > 2 and [setattr(frozen, "silent", True)])
            await until(lambda: given_back(bed), "it is given back")
            assert not frozen.released
            await quiet(bed)
            assert ended(bed) == {"collected": 2, "released": 1}

    run(main)


def test_a_client_that_leaves_between_the_legs_gives_its_ticket_back_at_once() -> None:
    async def main() -> None:
        async with fleet(1, 1) as bed:
            await bed.complete()
            held = slow_to_connect(bed, 60)
            await leave(bed, {}, lambda: held)
            await until(lambda: given_back(bed), "it is given back")
            assert len(bed.decode.seen) == 1
            await quiet(bed)
            assert ended(bed) == {"collected": 1, "released": 1}

    run(main)


def test_a_client_that_leaves_before_decodes_first_byte_gives_its_ticket_back() -> None:
    async def main() -> None:
        async with fleet(1, 2) as bed:
            bed.decodes[0].behave = bed.decodes[1].behave = hang
            await leave(bed, {}, lambda: seen_by(bed.decodes))
            await quiet(bed)
            seen = seen_by(bed.decodes)[0]
            assert seen.gone.is_set()
            assert set(given_back(bed)) == {ticket_of(seen)}

    run(main)


def test_a_client_that_leaves_while_it_waits_leaves_no_trace() -> None:
    async def main() -> None:
        async with fleet(1, 1, decode_only=False) as bed:
            await gone(bed, bed.decode)
            await leave(bed, {}, lambda: len(bed.router.desk.waiting))
            await until(lambda: not len(bed.router.desk.waiting), "it waits no more")
            await quiet(bed)

    run(main)


# tickets


def test_a_ticket_near_the_end_of_its_lease_is_replaced_by_the_engine_that_has_the_prompt_cached() -> None:
    async def main() -> None:
        async with fleet(2, 1, kv_lease_seconds=0.2) as bed:
            slow_to_connect(bed, 0.3)
            assert (await bed.complete()).status == 200
            assert sorted(len(one.seen) for one in bed.prefills) == [0, 2]
            assert len(bed.decode.seen) == 1
            await quiet(bed)
            assert ended(bed) == {"expired": 1, "collected": 1}

    run(main)


def test_data_parallel_cores_behind_one_address_are_one_life() -> None:
    """vLLM 0.32 adds `_dp` and the rank to the engine's id (`vllm/v1/engine/core.py`)."""

    async def main() -> None:
        async with fleet(1, 1) as bed:
            left = [issue(f"life_dp{rank}") for rank in (0, 1, 10, 0)]

            async def prefill(seen: Seen, out: Out) -> None:
                await left.pop(0)(seen, out)

            gate = asyncio.Event()

            async def decode(seen: Seen, out: Out) -> None:
                await gate.wait()
                await out.json(answer_to(seen))

            bed.prefill.behave, bed.decode.behave = prefill, decode
            asked = [asyncio.ensure_future(bed.complete(str(number))) for number in range(4)]
            await until(lambda: len(bed.decode.seen) == 4, "all tickets are handed over")
            gate.set()
            assert [(await one).status for one in asked] == [200] * 4
            assert ended(bed) == {"collected": 4}
            await quiet(bed)

    run(main)


def test_a_restarted_prefill_engine_makes_its_old_tickets_void_and_its_ways_new() -> None:
    """Its address is the same and nobody saw it gone: its new id tells."""

    async def main() -> None:
        async with fleet(1, 1) as bed:
            await bed.complete()
            pool = bed.router.pool
            connects, held, go = pool.connect, [], asyncio.Event()

            async def connect(call: Any) -> None:
                if call.engine.role == "decode" and not held:
                    held.append(call)
                    await go.wait()
                await connects(call)

            pool.connect = connect  # type: ignore[method-assign]
            pool._idle.clear()
            first = asyncio.ensure_future(bed.complete("first"))
            await until(lambda: held, "the first has a ticket")
            bed.prefill.behave = issue("life-2")
            assert (await bed.complete("second")).status == 200
            go.set()
            assert (await first).status == 200
            lives = [seen.body["kv_transfer_params"]["remote_engine_id"] for seen in bed.decode.seen]
            assert lives == ["life-1", "life-2", "life-2"], "the old ticket never reached decode"
            assert ended(bed) == {"collected": 3, "void": 1}
            bed.prefill.behave = issue("life-3")
            bed.decode.behave = once(fail, generate())
            await bed.complete()
            await quiet(bed)
            assert len(bed.decode.released) == 2, "it has to meet the new process first"

    run(main)


# ways between engines


def ways(told: Answer) -> dict[tuple[str, str], bool]:
    return {(one["prefill"], one["decode"]): one["closed"] for one in told.json["edges"]}


def fails_from(life: str) -> Behaviour:
    """Decode that cannot fetch from one prefill engine."""
    good = generate()

    async def decode(seen: Seen, out: Out) -> None:
        ticket = seen.body.get("kv_transfer_params")
        await (fail if ticket and ticket["remote_engine_id"] == life else good)(seen, out)

    return decode


def test_a_broken_way_is_closed_while_both_its_ends_serve_others_until_a_canary_comes_through(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(edges, "FIRST_PAUSE", 0.3)

    async def main() -> None:
        async with fleet(2, 2, policy="random", seed=1) as bed:
            for number, one in enumerate(bed.prefills):
                one.behave = one.probe = issue(f"life-{number}")
            bed.decodes[0].behave = bed.decodes[0].probe = fails_from("life-0")
            bed.decodes[1].probe = generate()
            broken = (bed.prefills[0].url, bed.decodes[0].url)
            for number in range(40):
                assert (await bed.complete(str(number))).status == 200
                if ways(await bed.admin("GET", "/debug/edges")).get(broken):
                    break
            told = ways(await bed.admin("GET", "/debug/edges"))
            assert [ends for ends, closed in told.items() if closed] == [broken]
            row = f'pd_router_edge_closed{{decode="{broken[1]}",prefill="{broken[0]}"}}'
            assert f"{row} 1.0" in await bed.metrics()
            before = len(bed.decodes[0].seen), len(bed.prefills[0].seen)
            for number in range(12):
                assert (await bed.complete(str(number))).status == 200
            later = [seen.body["kv_transfer_params"]["remote_engine_id"] for seen in bed.decodes[0].seen[before[0] :]]
            assert set(later) == {"life-1"}, "it serves the other, and only the other"
            assert len(bed.prefills[0].seen) > before[1], "and so does the other end"
            assert [one["healthy"] and not one["breaker_open"] for one in await bed.workers()] == [True] * 4
            await until(lambda: bed.decodes[0].canaries, "a canary was sent over it")
            assert ways(await bed.admin("GET", "/debug/edges"))[broken], "which did not come through"
            bed.decodes[0].behave = bed.decodes[0].probe = generate()
            desk = bed.router.desk
            await until(lambda: not desk.edges.any_closed, "a canary opens it")
            assert f"{row} 0.0" in await bed.metrics()
            before = len(bed.decodes[0].seen), len(bed.prefills[0].seen)
            for number in range(12):
                await bed.complete(str(number))
            later = [seen.body["kv_transfer_params"]["remote_engine_id"] for seen in bed.decodes[0].seen[before[0] :]]
            assert set(later) == {"life-0", "life-1"}
            await quiet(bed)

    run(main)


def test_the_only_way_is_taken_even_when_it_is_closed() -> None:
    async def main() -> None:
        async with fleet(1, 1) as bed:
            prefill, decode = bed.router.fleet
            for _ in range(2):
                bed.router.desk.edges.failed(prefill, decode, "test")
            assert bed.router.desk.edges.any_closed
            assert (await bed.complete()).status == 200
            assert len(bed.prefill.seen) == 1
            await quiet(bed)

    run(main)


def test_an_engine_that_fails_whatever_comes_does_not_close_its_ways() -> None:
    async def main() -> None:
        async with fleet(2, 2) as bed:
            bed.decodes[0].behave = fail
            for number in range(20):
                assert (await bed.complete(str(number))).status == 200
            assert not bed.router.desk.edges.any_closed
            assert [one["breaker_open"] for one in await bed.workers()].count(True) == 1

    run(main)


def test_whole_answers_that_take_long_do_not_close_a_way() -> None:
    """Nothing of them is heard before they are complete, so their time says nothing of the transfer."""

    async def main() -> None:
        async with fleet(1, 1) as bed:
            loop = bed.router.desk.loop
            real, ahead = loop.time, [0.0]

            class Clock:
                def __getattr__(self, name: str) -> Any:
                    return getattr(loop, name)

                def time(self) -> float:
                    return real() + ahead[0]

            bed.router.desk.loop = Clock()  # type: ignore[assignment]
            for _ in range(3):
                assert (await bed.complete(stream=True)).complete

            async def decode(seen: Seen, out: Out) -> None:
                ahead[0] += 20
                await out.json(answer_to(seen))

            bed.decode.behave = decode
            for _ in range(4):
                assert (await bed.complete()).status == 200
            assert not bed.router.desk.edges.any_closed
            assert [one.handoffs for one in bed.router.desk.edges] == [7]

    run(main)


def test_engines_of_different_kinds_are_never_paired() -> None:
    kinds = [("0.32.0", 128), ("0.33.0", 128), ("0.32.0", 64)]

    async def main() -> None:
        async with fleet(3, 3, health_interval_secs=0.1) as bed:
            for side, engines in (("p", bed.prefills), ("d", bed.decodes)):
                for number, one in enumerate(engines):
                    await one.stop()
                    one.version, one.block_size = kinds[number]
                    if side == "p":
                        one.behave = issue(f"life-{number}")
            await until(lambda: not any(engine.healthy for engine in bed.router.fleet), "all are seen as gone")
            for one in [*bed.prefills, *bed.decodes]:
                await one.start_again()
            await until(lambda: all(engine.healthy for engine in bed.router.fleet), "all are back")
            for number in range(24):
                assert (await bed.complete(str(number))).status == 200
            for number, one in enumerate(bed.decodes):
                lives = {seen.body["kv_transfer_params"]["remote_engine_id"] for seen in one.seen}
                assert lives == {f"life-{number}"}
            # A rolling update: of the first kind only prefill is left.
            await gone(bed, bed.decodes[0])
            before = len(bed.prefills[0].seen)
            for number in range(12):
                assert (await bed.complete(str(number))).status == 200
            for number, one in enumerate(bed.decodes):
                lives = {seen.body["kv_transfer_params"]["remote_engine_id"] for seen in one.seen}
                assert lives == {f"life-{number}"}
            assert len(bed.prefills[0].seen) == before, "whose blocks nobody could read"
            await quiet(bed)

    run(main)


@pytest.mark.parametrize("alone", [True, False])
def test_where_no_prefill_engine_is_of_decodes_kind_no_ticket_is_handed_over(alone: str) -> None:
    async def main() -> None:
        async with fleet(1, 1, decode_only=alone, queue_timeout_secs=0.3) as bed:
            prefill, decode = bed.router.fleet
            bed.router.fleet.grouped(prefill, "vLLM 0.32.0")
            bed.router.fleet.grouped(decode, "vLLM 0.33.0")
            told = await bed.complete()
            assert told.status == (200 if alone else 503)
            assert bed.prefill.seen == []
            assert all("kv_transfer_params" not in seen.body for seen in bed.decode.seen)
            await quiet(bed)

    run(main)


def test_adapters_and_unknown_facts_do_not_make_engines_of_different_kinds() -> None:
    async def main() -> None:
        async with fleet(2, 1, health_interval_secs=0.1) as bed:
            engines = [*bed.prefills, *bed.decodes]
            for one in engines:
                await one.stop()
                one.version, one.block_size = "0.32.0", 128
            bed.prefills[0].adapters = ["adapter"]
            bed.prefills[1].version = ""
            await until(lambda: not any(engine.healthy for engine in bed.router.fleet), "all are seen as gone")
            for one in engines:
                await one.start_again()
            await until(lambda: all(engine.healthy for engine in bed.router.fleet), "all are back")
            for number in range(8):
                assert (await bed.complete(str(number))).status == 200
            assert [len(one.seen) for one in bed.prefills] == [4, 4]

    run(main)


# engines that are silent


@pytest.mark.parametrize(
    ("role", "stream"), [("prefill", False), ("prefill", True), ("decode", True), ("decode", False)]
)
def test_an_engine_whose_core_hangs_is_given_up_although_its_health_is_fine(role: str, stream: bool) -> None:
    async def main() -> None:
        async with fleet(2, 2, stall_timeout_secs=0.5, health_interval_secs=0.1, kv_lease_seconds=3) as bed:

            async def begin_and_hang(seen: Seen, out: Out) -> None:
                if stream:
                    await out.events()
                    await out.chunk(b"".join(answer(seen.target, seen.body, "r1")[:4]))
                await asyncio.sleep(60)

            for one in bed.decodes:
                one.generated = 7

            if role == "prefill":
                bed.prefills[0].behave = bed.prefills[1].behave = once(hang, issue())
            else:
                bed.decodes[0].behave = bed.decodes[1].behave = once(begin_and_hang, generate())
            body = {"model": "tiny", "prompt": "x", "max_tokens": 9, "stream": stream, "ignore_eos": True}
            told = await bed.post(COMPLETIONS, body, x_request_id="r1")
            assert told.status == 200
            if stream:
                assert heard(told.body) == undisturbed(COMPLETIONS, body, "r1")
            assert [one["breaker_open"] for one in await bed.workers()].count(True) == 1
            await quiet(bed)

    run(main)


async def take_out(bed: Bed, url: str, how: str) -> None:
    """Let an engine leave the fleet, or become another one, as a source knows it by a name that outlives a restart."""
    fleet = bed.router.fleet
    engine = next(one for one in fleet if one.url == url)
    if how == "removed":
        assert (await bed.admin("POST", "/remove_worker", json.dumps({"url": url}).encode())).status == 200
    else:
        fleet.report("dns", [Found(url, "pod-7", engine.role)])
    assert engine not in list(fleet)


@pytest.mark.parametrize("how", ["removed", "named by a second source"])
@pytest.mark.parametrize("kind", ["prefill", "stream", "whole answer"])
def test_a_request_goes_elsewhere_when_its_engine_leaves_the_fleet_and_its_core_hangs_then(kind: str, how: str) -> None:
    async def main() -> None:
        async with fleet(2, 2, stall_timeout_secs=0.4, health_interval_secs=0.1) as bed:
            stream = kind == "stream"

            async def begin_and_hang(seen: Seen, out: Out) -> None:
                if stream:
                    await out.events()
                    await out.chunk(b"".join(answer(seen.target, seen.body, "r1")[:4]))
                await asyncio.sleep(60)

            engines = bed.prefills if kind == "prefill" else bed.decodes
            behave = once(begin_and_hang, issue() if kind == "prefill" else generate())
            for one in engines:
                one.behave, one.generated = behave, 7
            body = {"model": "tiny", "prompt": "x", "max_tokens": 9, "stream": stream, "ignore_eos": True}
            asking = asyncio.ensure_future(bed.post(COMPLETIONS, body, x_request_id="r1"))
            await until(lambda: seen_by(engines), "one has it")
            await take_out(bed, next(one.url for one in engines if one.seen), how)
            told = await asking
            assert told.status == 200
            if stream:
                assert heard(told.body) == undisturbed(COMPLETIONS, body, "r1")
            await until(lambda: not bed.router.pool.engines(), "nothing is under way")

    run(main)


@pytest.mark.parametrize("how", ["removed", "named by a second source"])
def test_a_request_goes_elsewhere_when_its_engine_leaves_the_fleet_and_stops_answering_its_health_then(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is an answer in one piece, of an engine that has no counters: only its health can tell."""
    monkeypatch.setattr(app, "_HEALTH_TIMEOUT", 0.3)

    async def main() -> None:
        async with fleet(1, 2, health_interval_secs=0.1) as bed:
            bed.decodes[0].behave = bed.decodes[1].behave = once(hang, generate())
            asking = asyncio.ensure_future(bed.complete())
            await until(lambda: seen_by(bed.decodes), "one has it")
            stopped = next(one for one in bed.decodes if one.seen)
            await take_out(bed, stopped.url, how)
            stopped.silent = True
            assert (await asking).status == 200

    run(main)


def test_an_engine_that_left_the_fleet_is_checked_until_its_last_request_ends_and_comes_up_no_more() -> None:
    async def main() -> None:
        async with fleet(1, 2, health_interval_secs=0.05) as bed:
            go_on = asyncio.Event()

            async def dawdle(seen: Seen, out: Out) -> None:
                await go_on.wait()
                await generate()(seen, out)

            bed.decodes[0].behave = bed.decodes[1].behave = dawdle
            asking = asyncio.ensure_future(bed.complete())
            await until(lambda: seen_by(bed.decodes), "one has it")
            url = next(one.url for one in bed.decodes if one.seen)
            engine = next(one for one in bed.router.fleet if one.url == url)
            assert url in await bed.metrics()
            await take_out(bed, url, "removed")
            bed.router.fleet.mark(engine, False, "test")
            before = engine.heard
            await until(lambda: engine.heard > before + 2, "it is checked on")
            assert not engine.healthy
            assert url not in [one["url"] for one in await bed.workers()]
            assert url not in await bed.metrics()
            go_on.set()
            assert (await asking).status == 200
            await until(lambda: engine not in bed.router._health._probes, "it is checked no more")
            await quiet(bed)

    run(main)


def test_a_decode_engine_that_never_begins_a_stream_is_given_up() -> None:
    """It may wake and fetch, so its ticket is left to it until the lease ends."""

    async def main() -> None:
        async with fleet(1, 2, stall_timeout_secs=0.5, health_interval_secs=0.1, kv_lease_seconds=3) as bed:
            bed.decodes[0].behave = bed.decodes[1].behave = once(hang, generate())
            assert (await bed.complete(stream=True)).complete
            assert [len(one.seen) for one in bed.decodes] == [1, 1]
            await quiet(bed)
            assert ended(bed) == {"expired": 1, "collected": 1}
            assert given_back(bed) == []

    run(main)


@pytest.mark.parametrize("slow_one", ["answers at last", "fails at last"])
def test_prefill_that_takes_long_is_asked_of_a_second_engine_and_the_first_answer_counts(slow_one: str) -> None:
    async def main() -> None:
        async with fleet(2, 1, hedge_prefill_secs=0.2) as bed:
            go_on = asyncio.Event()

            async def dawdle(seen: Seen, out: Out) -> None:
                await go_on.wait()
                await (issue() if slow_one == "answers at last" else fail)(seen, out)

            bed.prefills[0].behave = bed.prefills[1].behave = once(dawdle, issue())
            told = await bed.complete(stream=True)
            assert told.complete
            assert [len(one.seen) for one in bed.prefills] == [1, 1]
            assert len(bed.decode.seen) == 1
            go_on.set()
            answered = {"released": 1} if slow_one == "answers at last" else {}
            await until(lambda: ended(bed) == {"collected": 1} | answered, "the other ticket is given back")
            await until(lambda: not any(one.own_in_flight for one in bed.router.fleet), "the other leg has ended")
            await quiet(bed)
            assert counted(await bed.metrics(), "pd_router_hedged_prefills_total") == 1

    run(main)


def test_a_hedged_prefill_that_fails_leaves_the_other_to_it() -> None:
    async def main() -> None:
        async with fleet(2, 1, hedge_prefill_secs=0.2) as bed:
            asked = asyncio.Event()

            async def dawdle(seen: Seen, out: Out) -> None:
                await asked.wait()
                await issue()(seen, out)

            async def break_down(seen: Seen, out: Out) -> None:
                await fail(seen, out)
                asked.set()

            first = [dawdle, break_down]

            async def in_turn(seen: Seen, out: Out) -> None:
                await first.pop(0)(seen, out)

            bed.prefills[0].behave = bed.prefills[1].behave = in_turn
            assert (await bed.complete()).status == 200
            assert [len(one.seen) for one in bed.prefills] == [1, 1]
            await quiet(bed)
            assert ended(bed) == {"collected": 1}

    run(main)


@pytest.mark.parametrize("after", [0, 5])
def test_prefill_that_is_quick_enough_is_asked_of_one_engine(after: float) -> None:
    async def main() -> None:
        async with fleet(2, 1, hedge_prefill_secs=after) as bed:

            async def take_a_while(seen: Seen, out: Out) -> None:
                await asyncio.sleep(0.3)
                await issue()(seen, out)

            bed.prefills[0].behave = bed.prefills[1].behave = take_a_while
            assert (await bed.complete()).status == 200
            assert len(seen_by(bed.prefills)) == 1

    run(main)


def test_one_whole_answer_does_not_hide_that_an_engine_hangs() -> None:
    """Streams and whole answers, some of which come while it hangs: all are answered by the other engine."""

    async def main() -> None:
        async with fleet(1, 2, stall_timeout_secs=0.5, health_interval_secs=0.1, kv_lease_seconds=3) as bed:
            bed.decodes[0].behave = hang
            bed.decodes[0].generated = bed.decodes[1].generated = 7
            asked = []
            for number in range(12):
                asked.append(asyncio.ensure_future(bed.complete(str(number), stream=number % 4 != 0)))
                await asyncio.sleep(0.05)
            answers = await asyncio.gather(*asked)
            assert [one.status for one in answers if one.complete] == [200] * 12
            assert len(bed.decodes[0].seen) > 1
            await quiet(bed)

    run(main)


@pytest.mark.parametrize("stream", [False, True])
def test_an_engine_whose_counters_go_on_is_not_taken_for_a_hanging_one(stream: bool) -> None:
    """Streams wait for a whole answer, as they do where no more requests fit into a batch."""

    async def main() -> None:
        async with fleet(1, 2, stall_timeout_secs=0.5, health_interval_secs=0.1) as bed:

            async def slow(seen: Seen, out: Out) -> None:
                one = next(one for one in bed.decodes if seen in one.seen)
                for number in range(25):
                    one.generated = number
                    await asyncio.sleep(0.1)
                await generate()(seen, out)

            bed.decodes[0].behave = bed.decodes[1].behave = slow
            bodies = [False, False, stream, stream]
            answers = await asyncio.gather(*(bed.complete(str(n), stream=s) for n, s in enumerate(bodies)))
            assert [one.status for one in answers if one.complete] == [200] * 4
            assert [len(one.seen) for one in bed.decodes] == [2, 2]
            assert bed.router.desk.retries.spent == 0

    run(main)


def test_an_engine_that_has_preempted_a_stream_for_whole_answers_is_not_taken_for_a_hanging_one() -> None:
    async def main() -> None:
        async with fleet(1, 2, stall_timeout_secs=1, health_interval_secs=0.1) as bed:

            async def preempt(seen: Seen, out: Out) -> None:
                one = next(one for one in bed.decodes if seen in one.seen)
                events = answer(seen.target, seen.body, seen.headers["x-request-id"])
                await out.events()
                await out.chunk(b"".join(events[:4]))
                for number in range(25):
                    one.generated = number
                    await asyncio.sleep(0.1)
                await out.chunk(b"".join(events[4:]))
                await out.end()

            for one in bed.decodes:
                one.behave = preempt
            told = await bed.complete(stream=True, ignore_eos=True)
            assert told.complete
            assert len(seen_by(bed.decodes)) == 1
            await quiet(bed)

    run(main)


@pytest.mark.parametrize("core", ["full", "hangs", "hangs with room", "tells nothing"])
def test_a_prefill_engine_without_room_may_be_silent_while_tickets_are_unused_and_one_that_hangs_may_not(
    core: str,
) -> None:
    """A whole answer keeps its ticket open for as long as it is generated."""

    async def main() -> None:
        async with fleet(2, 1, stall_timeout_secs=1, policy="consistent_hash", kv_lease_seconds=2) as bed:
            fetched = asyncio.Event()

            async def decode(seen: Seen, out: Out) -> None:
                if seen.body["prompt"] == "first":
                    await fetched.wait()
                await out.json(answer_to(seen))

            bed.decode.behave = decode
            first = asyncio.ensure_future(bed.complete("first"))
            await until(lambda: bed.decode.seen, "a ticket is handed over")
            one = next(one for one in bed.prefills if one.seen)
            for other in bed.prefills:
                other.behave = hang if other is one else issue()
            if core != "tells nothing":
                one.generated = 7
                known = next(engine for engine in bed.router.fleet if engine.url == one.url)
                known.kv_tokens, known.block_size = 1280, 128
                running, used = 1 if core == "hangs" else 0, 0.3 if core == "hangs with room" else 0.9
                one.counts = {
                    "vllm:num_requests_waiting": 2, "vllm:num_requests_running": running,
                    "vllm:kv_cache_usage_perc": used,
                }  # fmt: skip
            asked = [asyncio.ensure_future(bed.complete("x" * n)) for n in range(1, 9)]
            await until(lambda: len(one.seen) > 1, "some wait for the silent engine")
            if core == "full":
                await asyncio.sleep(2.5)
                assert not any(worker["breaker_open"] for worker in await bed.workers())
                fetched.set()
            assert [(await one).status for one in asked] == [200] * 8
            assert [worker["breaker_open"] for worker in await bed.workers()].count(True) == 1
            fetched.set()
            assert (await first).status == 200
            await quiet(bed)

    run(main)


def test_an_engine_that_works_on_a_whole_answer_is_not_taken_for_a_hanging_one() -> None:
    async def main() -> None:
        async with fleet(1, 2, stall_timeout_secs=0.2, health_interval_secs=0.1) as bed:

            async def slow(seen: Seen, out: Out) -> None:
                await asyncio.sleep(2.5)
                await out.json(answer_to(seen))

            bed.decodes[0].behave = bed.decodes[1].behave = slow
            assert (await bed.complete()).status == 200
            assert len(seen_by(bed.decodes)) == 1
            assert bed.router.desk.retries.spent == 0

    run(main)


def test_a_client_that_does_not_read_does_not_make_its_engine_look_hanging() -> None:
    async def main() -> None:
        async with fleet(1, 1, stall_timeout_secs=0.2, health_interval_secs=0.1) as bed:

            async def flood(seen: Seen, out: Out) -> None:
                event = answer(seen.target, seen.body, "r1")[0]
                await out.events()
                for _ in range(400):
                    await out.chunk(event + b": " + b"x" * 65536 + b"\n\n")
                await out.chunk(b"data: [DONE]\n\n")
                await out.end()

            bed.decode.behave = flood
            reader, writer = await bed.connect()
            body = json.dumps({"model": "tiny", "prompt": "x", "max_tokens": 9, "stream": True}).encode()
            writer.write(wire("POST", COMPLETIONS, body))
            await reader.readuntil(b"\r\n\r\n")
            (call,) = bed.router.pool.open(bed.router.fleet.engines[Role.DECODE][0])
            await until(lambda: call.paused, "the engine has to wait for the client")
            await asyncio.sleep(2.5)  # more than two looks
            assert not bed.router.fleet.tripped(bed.router.fleet.engines[Role.DECODE][0])
            assert call in bed.router.pool.open(call.engine)
            writer.close()

    run(main)


def test_a_stopped_process_is_given_up_when_its_health_is_silent_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "_HEALTH_TIMEOUT", 0.3)

    async def main() -> None:
        async with fleet(1, 2, health_interval_secs=0.1) as bed:

            def stop(one: FakeEngine) -> Behaviour:
                async def behave(seen: Seen, out: Out) -> None:
                    one.silent = True
                    await asyncio.sleep(60)

                return behave

            for one in bed.decodes:
                one.behave = stop(one)
            asking = asyncio.ensure_future(bed.complete())
            await until(lambda: seen_by(bed.decodes), "one has it, and stops")
            for one in bed.decodes:
                one.behave = generate()
            assert (await asking).status == 200
            assert [one["healthy"] for one in await bed.workers()].count(False) == 1
            stopped = next(one for one in bed.decodes if one.silent)
            stopped.silent = False
            await until(lambda: all(engine.healthy for engine in bed.router.fleet), "it is taken back")

    run(main)


@pytest.mark.parametrize("comes_back", [False, True])
def test_a_quiet_engine_that_refuses_to_say_whether_it_lives_is_asked_again_at_leisure(comes_back: bool) -> None:
    """It was quiet, so it is asked before it gets a ticket; that it refuses is no reason to ask it all the time."""

    async def main() -> None:
        async with fleet(1, 1, health_interval_secs=60, queue_timeout_secs=1) as bed:
            engine = bed.router.fleet.engines[Role.DECODE][0]
            await until(lambda: engine.quiet, "it is quiet")
            await bed.decode.stop()
            pool, asked = bed.router.pool, list[Any]()
            connects = pool.connect

            async def connect(call: Any) -> None:
                if call.engine is engine:
                    asked.append(call)
                await connects(call)

            pool.connect = connect  # type: ignore[method-assign]
            asking = asyncio.ensure_future(bed.complete())
            await until(lambda: bed.router.desk.waiting.count(Role.DECODE), "the request waits")
            assert len(asked) <= 3
            assert not engine.healthy
            if comes_back:
                await bed.decode.start_again()
                bed.router.fleet.mark(engine, True, "test")
            told = await asking
            assert told.status == (200 if comes_back else 503)
            assert len(bed.prefill.seen) == 1

    run(main)


# time


@pytest.mark.parametrize("where", ["prefill", "decode", "queue"])
def test_a_request_ends_when_its_client_wants_to_wait_no_longer(where: str) -> None:
    async def main() -> None:
        async with fleet(1, 1, decode_only=False) as bed:
            if where == "queue":
                await gone(bed, bed.decode)
            else:
                (bed.prefill if where == "prefill" else bed.decode).behave = hang
            body = {"model": "tiny", "prompt": "x"}
            told = await bed.post(COMPLETIONS, body, x_request_timeout="0.3")
            assert told.status in (503, 504)
            if where != "queue":
                assert told.status == 504
                assert "0.3 s" in told.error["message"]
                engine = bed.prefill if where == "prefill" else bed.decode
                await until(engine.seen[0].gone.is_set, "the engine sees its client go", 4)
            await quiet(bed)

    run(main)


@pytest.mark.parametrize("told", ["soon", "-1", "0", "nan", "1e9"])
def test_a_time_that_says_nothing_leaves_the_routers_own_limit(told: str) -> None:
    async def main() -> None:
        async with fleet(1, 1, request_timeout_secs=0.3) as bed:
            assert (await bed.post(COMPLETIONS, {"prompt": "x"}, x_request_timeout=told)).status == 200
            bed.decode.behave = hang
            answered = await bed.post(COMPLETIONS, {"prompt": "x"}, x_request_timeout=told)
            assert (answered.status, "0.3 s" in answered.error["message"]) == (504, True)

    run(main)


# canaries


def likely(**logprobs: float) -> dict[str, Any]:
    return {"model": "tiny", "choices": [{"text": "a", "logprobs": {"top_logprobs": [logprobs]}}]}


def test_a_canary_sends_no_ticket_twice_when_a_kept_connection_breaks() -> None:
    async def main() -> None:
        async with fleet(1, 1, canary_interval_secs=0.05) as bed:
            tickets: list[str] = []
            canary = bed.router._canary

            async def probe(seen: Seen, out: Out) -> None:
                if "kv_transfer_params" in seen.body:
                    tickets.append(seen.body["kv_transfer_params"]["remote_request_id"])
                    if canary.outcomes["alike"]:  # the connection is one that is kept by now
                        out.cut()
                        return
                await out.json(likely(a=-0.1))

            bed.prefill.probe = issue()
            bed.decode.probe = probe
            await until(lambda: canary.outcomes["failed"] > 2, "canaries broke off")
            assert len(tickets) == len(set(tickets))

    run(main)


def test_a_canary_tells_when_kv_blocks_come_over_wrong() -> None:
    async def main() -> None:
        async with fleet(1, 1, canary_interval_secs=0.1) as bed:
            wrong = [True]

            async def probe(seen: Seen, out: Out) -> None:
                over = "kv_transfer_params" in seen.body
                await out.json(likely(a=-9.0, b=-0.1) if over and wrong[0] else likely(a=-0.1, b=-9.02))

            bed.prefill.probe = issue()
            bed.decode.probe = probe
            row = f'pd_router_canary_differs{{decode="{bed.decode.url}",prefill="{bed.prefill.url}"}}'
            canary = bed.router._canary
            await until(lambda: canary.outcomes["differs"], "it is seen")
            assert f"{row} 1.0" in await bed.metrics()
            over, alone = bed.decode.canaries[:2]
            assert over.body["prompt"] == alone.body["prompt"]
            assert "cache_salt" in alone.body, "blocks that are cached would be read again"
            wrong[0] = False
            await until(lambda: canary.outcomes["alike"], "they are right again")
            assert row not in await bed.metrics()
            assert bed.decode.seen == [], "clients have no part in it"

            async def silent(seen: Seen, out: Out) -> None:
                await out.json({"choices": [{"logprobs": {"top_logprobs": [None]}}]})

            bed.decode.probe = silent
            await until(lambda: canary.outcomes["failed"], "an answer without log-probabilities is none")
            bed.decode.probe = fail
            before = canary.outcomes["failed"]
            await until(lambda: canary.outcomes["failed"] > before, "and so is a failure")
            bed.decode.probe = probe
            await quiet(bed)

    run(main)
