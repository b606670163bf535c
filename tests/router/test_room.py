"""Waiting for room: who waits, behind whom, and who need not."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from pdrouter.fleet.engine import Role
from pdrouter.handoff import pair
from pdrouter.handoff.retries import EACH
from router.fakes import Answer, Bed, Behaviour, FakeEngine, Out, Seen, answer_to, run, until
from router.generation import CHAT
from router.test_failover import COMPLETIONS, fail, fleet, generate, gone, hang, once, quiet, seen_by


@asynccontextmanager
async def one_full(**told: Any) -> AsyncIterator[tuple[Bed, FakeEngine]]:
    """Two decode engines, one of them full for the time being; give the other one."""
    async with fleet(1, 2, **told) as bed:
        for known in bed.router.fleet.engines[Role.DECODE]:
            known.kv_tokens = 150
        full, other = bed.decodes
        full.behave = hang
        occupied = asyncio.ensure_future(bed.complete("occupies", max_tokens=100))
        await until(lambda: full.seen, "one engine is full")
        yield bed, other
        occupied.cancel()


def test_prefill_does_not_begin_while_no_decode_engine_has_room_and_goes_on_by_deadline() -> None:
    async def main() -> None:
        async with fleet(1, 1, queue_timeout_secs=100) as bed:
            bed.router.fleet.engines[Role.DECODE][0].kv_tokens = 150
            ends: dict[str, asyncio.Event] = {}

            async def decode(seen: Seen, out: Out) -> None:
                ends[seen.body["prompt"]] = asyncio.Event()
                await ends[seen.body["prompt"]].wait()
                await out.json(answer_to(seen))

            bed.decode.behave = decode

            def ask(prompt: str, seconds: int) -> "asyncio.Future[Answer]":
                body = {"model": "tiny", "prompt": prompt, "max_tokens": 100}
                return asyncio.ensure_future(bed.post(COMPLETIONS, body, x_request_timeout=str(seconds)))

            first = ask("first", 50)
            await until(lambda: "first" in ends, "decode is full")
            others = {}
            for number, (name, seconds) in enumerate([("patient", 40), ("hasty", 20), ("middling", 30)]):
                others[name] = ask(name, seconds)
                await until(lambda wanted=number + 1: bed.router.desk.waiting.count(None) == wanted, f"{name} waits")
            assert 'pd_router_requests_waiting{for="room"} 3.0' in await bed.metrics()
            assert len(bed.prefill.seen) == 1, "nothing is pinned for those who wait"
            ends["first"].set()
            assert (await first).status == 200
            for name in ("hasty", "middling", "patient"):
                await until(lambda wanted=name: wanted in ends, f"{name} is next")
                assert [seen.body["prompt"] for seen in bed.decode.seen][-1] == name
                ends[name].set()
                assert (await others[name]).status == 200
            await quiet(bed)

    run(main)


def test_a_small_request_does_not_overtake_a_large_one_that_waits_for_room() -> None:
    async def main() -> None:
        async with fleet(1, 1) as bed:
            bed.router.fleet.engines[Role.DECODE][0].kv_tokens = 150
            turn = asyncio.Semaphore(0)

            async def decode(seen: Seen, out: Out) -> None:
                await turn.acquire()
                await out.json(answer_to(seen))

            bed.decode.behave = decode
            first = asyncio.ensure_future(bed.complete("first", max_tokens=60))
            await until(lambda: bed.decode.seen, "the first is served")
            large = asyncio.ensure_future(bed.complete("large", max_tokens=120))
            await until(lambda: bed.router.desk.waiting.count(None) == 1, "the large one waits")
            small = asyncio.ensure_future(bed.complete("small", max_tokens=10))
            await until(lambda: bed.router.desk.waiting.count(None) == 2, "the small one waits behind it")
            for one in (first, large, small):
                turn.release()
                assert (await one).status == 200
            assert [seen.body["prompt"] for seen in bed.decode.seen] == ["first", "large", "small"]

    run(main)


def test_who_waited_too_long_for_room_is_told_when_to_come_again() -> None:
    async def main() -> None:
        async with fleet(1, 1, queue_timeout_secs=0.3) as bed:
            bed.router.fleet.engines[Role.DECODE][0].kv_tokens = 150
            bed.decode.behave = hang
            asking = asyncio.ensure_future(bed.complete(max_tokens=100))
            await until(lambda: bed.decode.seen, "decode is full")
            told = await bed.complete(max_tokens=100)
            assert told.status == 429
            assert int(told.headers["retry-after"]) >= 1
            assert len(bed.prefill.seen) == 1
            asking.cancel()

    run(main)


def test_prompts_of_a_batch_make_room_for_each_other() -> None:
    async def main() -> None:
        async with fleet(1, 1, queue_timeout_secs=5) as bed:
            bed.router.fleet.engines[Role.DECODE][0].kv_tokens = 250
            told = await bed.complete([f"prompt {n}" for n in range(8)], max_tokens=100)
            assert told.status == 200
            assert len(told.json["choices"]) == 8

    run(main)


def test_room_that_becomes_free_elsewhere_is_noticed() -> None:
    """Another process of the router had filled the engine; nothing in this one tells that it has ended."""

    async def main() -> None:
        async with fleet(1, 1, queue_timeout_secs=20) as bed:
            engine = bed.router.fleet.engines[Role.DECODE][0]
            engine.kv_tokens, engine.elsewhere = 150, (1, 0, 140, 0)
            asking = asyncio.ensure_future(bed.complete(max_tokens=100))
            await until(lambda: len(bed.router.desk.waiting), "it waits")
            engine.elsewhere = (0, 0, 0, 0)
            assert (await asking).status == 200

    run(main)


def test_a_request_that_no_engine_could_hold_is_the_engines_to_judge_and_holds_up_nobody() -> None:
    async def main() -> None:
        async with fleet(1, 1) as bed:
            bed.router.fleet.engines[Role.DECODE][0].kv_tokens = 150
            ends = asyncio.Event()

            async def decode(seen: Seen, out: Out) -> None:
                if seen.body["max_tokens"] > 150:
                    await out.json({"error": {"message": "too long", "type": "BadRequestError", "code": 400}}, 400)
                    return
                if seen.body["prompt"] == "first":
                    await ends.wait()
                await out.json(answer_to(seen))

            bed.decode.behave = decode
            first = asyncio.ensure_future(bed.complete("first", max_tokens=20))
            await until(lambda: bed.decode.seen, "decode has something to do")
            giant = await bed.complete("giant", max_tokens=1000)
            assert (giant.status, giant.error["message"]) == (400, "too long")
            assert (await bed.complete("small", max_tokens=20)).status == 200
            ends.set()
            assert (await first).status == 200
            await quiet(bed)

    run(main)


def test_a_request_that_waits_for_another_engine_than_the_one_that_failed_it_holds_up_nobody_there() -> None:
    async def main() -> None:
        async with one_full(queue_timeout_secs=20) as (bed, failing):
            failing.behave = once(fail, generate())
            unlucky = asyncio.ensure_future(bed.complete("unlucky", max_tokens=100))
            await until(lambda: bed.router.desk.waiting.count(None) == 1, "it waits for the full one")
            for number in range(4):
                assert (await bed.complete(f"later {number}", max_tokens=100)).status == 200
            assert bed.router.desk.waiting.count(None) == 1
            assert (await unlucky).status == 200, "after a while the engine that failed it will do"

    run(main)


def test_those_behind_a_request_that_waits_for_another_engine_are_tried_when_there_is_room() -> None:
    async def main() -> None:
        async with one_full(queue_timeout_secs=20) as (bed, failing):
            failing.behave = once(fail, generate())
            unlucky = asyncio.ensure_future(bed.complete("unlucky", max_tokens=100))
            await until(lambda: bed.router.desk.waiting.count(None) == 1, "it waits for the full one")
            gate = asyncio.Event()

            async def wait(seen: Seen, out: Out) -> None:
                await gate.wait()
                await out.json(answer_to(seen))

            failing.behave = wait
            asked = [asyncio.ensure_future(bed.complete(f"later {number}", max_tokens=100)) for number in range(4)]
            await until(lambda: bed.router.desk.waiting.count(None) == 4, "one of them is served, three wait")
            gate.set()
            assert [told.status for told in await asyncio.gather(*asked)] == [200] * 4
            assert not unlucky.done()
            unlucky.cancel()

    run(main)


def test_engines_of_the_kind_that_has_room_serve_while_those_of_the_other_kind_are_full() -> None:
    """In the middle of a rolling update, say."""
    behave = once(hang, generate())

    async def main() -> None:
        async with fleet(2, 2, queue_timeout_secs=1.0, policy="consistent_hash") as bed:
            known = bed.router.fleet
            for role in Role:
                for number, one in enumerate(known.engines[role]):
                    known.grouped(one, f"release {number}")
                    one.kv_tokens = 150 if role is Role.DECODE else 0
            for engine in bed.decodes:
                engine.behave = behave
            occupied = asyncio.ensure_future(bed.complete("occupies", max_tokens=100))
            await until(lambda: seen_by(bed.decodes), "one is full")
            for number in range(12):
                assert (await bed.complete(f"later {number}", max_tokens=100)).status == 200
            occupied.cancel()

    run(main)


def test_a_request_goes_to_an_engine_that_could_hold_it_however_idle_a_smaller_one_is() -> None:
    async def main() -> None:
        async with fleet(1, 2) as bed:
            sizes = 150, 1500
            for one, size in zip(bed.router.fleet.engines[Role.DECODE], sizes, strict=True):
                one.kv_tokens = size

            def judge(size: int) -> Behaviour:
                async def decode(seen: Seen, out: Out) -> None:
                    if seen.body["max_tokens"] > size:
                        await out.json({"error": {"message": "too long", "code": 400}}, 400)
                    else:
                        await generate()(seen, out)

                return decode

            for engine, size in zip(bed.decodes, sizes, strict=True):
                engine.behave = judge(size)
            for number in range(6):
                assert (await bed.complete(f"large {number}", max_tokens=200)).status == 200
            assert len(bed.decodes[1].seen) == 6

    run(main)


def test_small_requests_have_the_engine_that_a_large_one_waits_not_for() -> None:
    async def main() -> None:
        async with fleet(1, 2, queue_timeout_secs=20, policy="consistent_hash") as bed:
            for one in bed.router.fleet.engines[Role.DECODE]:
                one.kv_tokens = 150
            occupied = asyncio.ensure_future(bed.complete("occupies", max_tokens=60))
            busy = [hang]

            async def occupy_and_fail(seen: Seen, out: Out) -> None:
                await (busy.pop() if busy else once_large_fails)(seen, out)

            large_fails = once(fail, generate())

            async def once_large_fails(seen: Seen, out: Out) -> None:
                await (large_fails if seen.body["prompt"] == "large" else generate())(seen, out)

            for engine in bed.decodes:
                engine.behave = occupy_and_fail
            await until(lambda: seen_by(bed.decodes), "one engine has something to do for long")
            large = asyncio.ensure_future(bed.complete("large", max_tokens=120))
            await until(lambda: bed.router.desk.waiting.count(None) == 1, "the large one waits for that engine")
            answers = await asyncio.gather(*(bed.complete(f"small {n}", max_tokens=10) for n in range(12)))
            assert [told.status for told in answers] == [200] * 12
            assert bed.router.desk.waiting.count(None) == 1, "it waits as before"
            assert (await large).status == 200
            occupied.cancel()

    run(main)


def test_who_waits_for_room_has_an_engine_again_that_died_of_something_and_came_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pair, "_GRUDGE", 100.0)

    async def main() -> None:
        async with one_full(queue_timeout_secs=20) as (bed, dying):
            dying.behave = hang
            asked = asyncio.ensure_future(bed.complete("unlucky", max_tokens=100))
            await until(lambda: dying.seen, "the other has a request")
            await gone(bed, dying)
            await until(lambda: bed.router.desk.waiting.count(None) == 1, "which waits for room when that one is gone")
            dying.behave = generate()
            await dying.start_again()
            back = next(one for one in bed.router.fleet if one.url == dying.url)
            bed.router.fleet.mark(back, True, "test")
            assert (await asked).status == 200

    run(main)


def test_a_request_that_no_engine_could_hold_waits_behind_nobody() -> None:
    async def main() -> None:
        async with fleet(1, 1, queue_timeout_secs=20) as bed:
            bed.router.fleet.engines[Role.DECODE][0].kv_tokens = 150

            async def decode(seen: Seen, out: Out) -> None:
                if seen.body["max_tokens"] > 150:
                    await out.json({"error": {"message": "too long", "code": 400}}, 400)
                else:
                    await hang(seen, out)

            bed.decode.behave = decode
            asked = [asyncio.ensure_future(bed.complete(name, max_tokens=100)) for name in ("first", "waits")]
            await until(lambda: bed.router.desk.waiting.count(None) == 1, "one waits for room")
            assert (await bed.complete("giant", max_tokens=1000)).status == 400
            for one in asked:
                one.cancel()

    run(main)


@pytest.mark.parametrize("told", ["picture", "counted"])
def test_what_is_many_bytes_but_few_tokens_leaves_room_for_others(told: str) -> None:
    """A picture is not counted by its bytes, and what prefill has counted is believed on decode."""
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 300_000}}
    content: Any = [picture, {"type": "text", "text": "What is it?"}] if told == "picture" else "A" * 300_000
    large = {"model": "tiny", "messages": [{"role": "user", "content": content}], "max_tokens": 8}

    async def main() -> None:
        async with fleet(1, 1, queue_timeout_secs=0.5) as bed:
            bed.router.fleet.engines[Role.DECODE][0].kv_tokens = 80_000
            left = [hang]

            async def decode(seen: Seen, out: Out) -> None:
                await (left.pop() if left else generate())(seen, out)

            bed.decode.behave = decode
            asking = asyncio.ensure_future(bed.post(CHAT, large))
            await until(lambda: bed.decode.seen, "it is served")
            assert (await bed.complete("text", max_tokens=6000)).status == 200
            asking.cancel()

    run(main)


@pytest.mark.parametrize("why", ["closed", "of another kind"])
def test_a_request_waits_for_no_engine_to_which_there_is_no_way(why: str) -> None:
    async def main() -> None:
        async with fleet(1, 2, queue_timeout_secs=5) as bed:
            known = bed.router.fleet
            small, large = known.engines[Role.DECODE]
            small.kv_tokens, large.kv_tokens = 150, 1500
            prefill = known.engines[Role.PREFILL][0]
            if why == "closed":
                for _ in range(10):
                    bed.router.desk.edges.failed(prefill, large, "test")
            else:
                for one in known:
                    known.grouped(one, "other" if one is large else "one")
            assert (await asyncio.wait_for(bed.complete("large", max_tokens=500), 2)).status == 200
            assert (await asyncio.wait_for(bed.complete("small", max_tokens=50), 2)).status == 200
            await quiet(bed)

    run(main)


def test_small_requests_have_the_engine_that_is_too_small_for_the_one_before_them() -> None:
    async def main() -> None:
        async with fleet(1, 2, queue_timeout_secs=20) as bed:
            small, large = bed.router.fleet.engines[Role.DECODE]
            small.kv_tokens, large.kv_tokens = 100, 250
            bed.decodes[1].behave = hang
            occupied = asyncio.ensure_future(bed.complete("occupies", max_tokens=200))
            await until(lambda: bed.decodes[1].seen, "the large engine is full")
            waiting = asyncio.ensure_future(bed.complete("waits", max_tokens=150))
            await until(lambda: bed.router.desk.waiting.count(None) == 1, "one waits for the large engine")
            assert (await bed.complete("small", max_tokens=50)).status == 200
            assert not waiting.done()
            occupied.cancel()
            waiting.cancel()

    run(main)


def test_the_last_try_is_not_spent_at_the_engine_that_keeps_failing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pair, "_GRUDGE", 0.05)

    async def main() -> None:
        async with fleet(1, 2, queue_timeout_secs=20) as bed:
            for one in bed.router.fleet.engines[Role.DECODE]:
                one.kv_tokens = 150
            full, failing = bed.decodes
            end = asyncio.Event()

            async def wait(seen: Seen, out: Out) -> None:
                await end.wait()
                await out.json(answer_to(seen))

            full.behave, failing.behave = wait, fail
            occupied = asyncio.ensure_future(bed.complete("occupies", max_tokens=100))
            await until(lambda: full.seen, "one engine is full")
            asked = asyncio.ensure_future(bed.complete("unlucky", max_tokens=100))
            await until(lambda: len(failing.seen) == EACH, "all tries but one are spent")
            await until(lambda: bed.router.desk.waiting.count(None) == 1, "it waits for the other engine")
            await asyncio.sleep(2)
            assert len(failing.seen) == EACH
            end.set()
            assert [(await one).status for one in (occupied, asked)] == [200, 200]
            await quiet(bed)

    run(main)


@pytest.mark.parametrize("limit", [{"queue_timeout_secs": 0.4}, {"queue_size": 0}])
def test_the_engine_that_failed_a_request_is_better_than_none(limit: dict[str, Any]) -> None:
    async def main() -> None:
        async with one_full(**limit) as (bed, failing):
            failing.behave = once(fail, generate())
            assert (await bed.complete("unlucky", max_tokens=100)).status == 200

    run(main)
