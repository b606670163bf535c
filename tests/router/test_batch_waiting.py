"""What prompts of a list share with each other and with all other requests: room, and tries."""

import asyncio
from collections import Counter
from typing import Any

import pytest

from pdrouter.fleet.engine import Role
from pdrouter.handoff.retries import ALWAYS, RESERVE, SHARE, RetryBudget
from pdrouter.server import routes
from router.fakes import Answer, Bed, Behaviour, Out, Seen, answer_to, decode, run, until
from router.test_failover import fail, fleet, quiet, seen_by


def slow(seconds: float) -> Behaviour:
    async def behave(seen: Seen, out: Out) -> None:
        await asyncio.sleep(seconds)
        await decode(seen, out)

    return behave


def room(bed: Bed, tokens: int) -> None:
    """Say how much decode holds; a prompt with `max_tokens=100` takes a little more than 100."""
    bed.router.fleet.engines[Role.DECODE][0].kv_tokens = tokens


def prompts(name: str, number: int) -> list[str]:
    return [f"{name}{n}" for n in range(number)]


@pytest.mark.parametrize(("lists", "each"), [(6, 64), (384, 1)])
def test_an_engines_death_costs_what_it_had_time_only_also_on_a_cold_router(lists: int, each: int) -> None:
    async def main() -> None:
        async with fleet(1, 2) as bed:
            go = asyncio.Event()

            async def hold(seen: Seen, out: Out) -> None:
                await go.wait()
                await out.json(answer_to(seen))

            for one in bed.decodes:
                one.behave = hold
            asked = [asyncio.ensure_future(bed.complete(prompts(f"{n}-", each))) for n in range(lists)]
            await until(lambda: len(seen_by(bed.decodes)) == lists * each, "all are at decode")
            assert bed.router.desk.retries.under_way == lists * each
            await bed.decodes[0].stop()
            go.set()
            told = Counter(one.status for one in await asyncio.gather(*asked))
            assert told == {200: lists}
            assert bed.router.desk.retries.spent == lists * each / 2
            await quiet(bed)
            assert bed.router.desk.retries.under_way == 0

    run(main)


def test_many_requests_at_once_do_not_make_a_total_outage_worse_again_and_again() -> None:
    many, rounds = 300, 3

    async def main() -> None:
        async with fleet(1, 1) as bed:
            bed.decode.behave = fail
            loop = asyncio.get_running_loop()
            began = loop.time()
            for n in range(rounds):
                told = await asyncio.gather(*(bed.complete(f"{n} {one}") for one in range(many)))
                assert {one.status for one in told} <= {500, 503}
            budget = many + SHARE * many * rounds + ALWAYS * (loop.time() - began) + 1
            assert 0 < bed.router.desk.retries.spent <= budget

    run(main)


def test_a_try_that_no_failure_asks_for_is_not_owed_and_takes_none_from_failures() -> None:
    async def main() -> None:
        budget = RetryBudget(asyncio.get_running_loop())
        for _ in range(500):
            budget.began()
        unasked = sum(budget.spend(owing=False) for _ in range(500))
        assert unasked == pytest.approx(RESERVE, abs=1)
        assert sum(budget.spend() for _ in range(600)) == pytest.approx(500, abs=1)
        budget.ended(500)
        assert not budget.spend(), "what is owed is not forgotten with the requests it was for"

    run(main)


def test_prompts_of_a_list_do_not_run_out_of_time_behind_each_other() -> None:
    async def main() -> None:
        async with fleet(1, 1, queue_timeout_secs=1) as bed:
            room(bed, 250)
            bed.decode.behave = slow(0.3)
            asking = asyncio.ensure_future(bed.complete(prompts("p", 16), max_tokens=100))
            most = 0
            while not asking.done():
                most = max(most, bed.router.desk.waiting.count(None))
                await asyncio.sleep(0.01)
            told = await asking
            assert told.status == 200
            assert [one["text"] for one in told.json["choices"]] == [f"<p{n}>0" for n in range(16)]
            assert most == 1, "one waits for all"
            await quiet(bed)

    run(main)


def test_a_prompt_waits_longer_than_a_request_may_while_another_of_its_list_has_the_room() -> None:
    async def main() -> None:
        async with fleet(1, 1, queue_timeout_secs=0.3) as bed:
            room(bed, 150)
            bed.decode.behave = slow(1)
            told = await bed.complete(prompts("p", 3), max_tokens=100)
            assert told.status == 200
            await quiet(bed)

    run(main)


def test_a_list_that_waits_for_others_only_is_told_so_in_time() -> None:
    async def main() -> None:
        async with fleet(1, 1, queue_timeout_secs=0.3) as bed:
            room(bed, 150)
            bed.decode.behave = slow(3)
            single = asyncio.ensure_future(bed.complete("single", max_tokens=100))
            await until(lambda: bed.decode.seen, "decode is full")
            told = await bed.complete(prompts("p", 3), max_tokens=100)
            assert told.status == 429
            assert not single.done()
            assert (await single).status == 200
            await quiet(bed)

    run(main)


def test_a_list_grows_again_when_others_have_left_room() -> None:
    async def main() -> None:
        async with fleet(1, 1, queue_timeout_secs=10) as bed:
            room(bed, 450)
            go, first = asyncio.Event(), asyncio.Event()

            async def hold(seen: Seen, out: Out) -> None:
                await (first if seen.body["prompt"].startswith("single") else go).wait()
                await out.json(answer_to(seen))

            bed.decode.behave = hold
            singles = [asyncio.ensure_future(bed.complete(f"single{n}", max_tokens=100)) for n in range(3)]
            await until(lambda: len(bed.decode.seen) == 3, "only one more has room")
            asking = asyncio.ensure_future(bed.complete(prompts("p", 8), max_tokens=100))
            await until(lambda: len(bed.decode.seen) == 4, "the first prompt is served")
            first.set()
            await until(lambda: len(bed.decode.seen) == 7, "three more have taken the room, and none of them has ended")
            go.set()
            assert (await asking).status == 200
            assert {one.status for one in await asyncio.gather(*singles)} == {200}
            await quiet(bed)

    run(main)


def test_lists_and_single_requests_take_turns_for_room() -> None:
    async def main() -> None:
        async with fleet(1, 1, queue_timeout_secs=2) as bed:
            room(bed, 250)
            bed.decode.behave = slow(0.1)
            lists = [asyncio.ensure_future(bed.complete(prompts(name, 30), max_tokens=100)) for name in "ab"]
            await until(lambda: len(bed.decode.seen) > 3, "both lists are under way")

            async def ask(number: int) -> Answer:
                return await bed.complete(f"single{number}", max_tokens=100)

            told = await asyncio.gather(*map(ask, range(5)))
            assert {one.status for one in told} == {200}
            assert not any(one.done() for one in lists), "single requests did not wait for whole lists"
            assert {one.status for one in await asyncio.gather(*lists)} == {200}
            served = Counter(seen.body["prompt"][0] for seen in bed.decode.seen[:30])
            assert min(served["a"], served["b"]) >= 8, "neither list waited for the other"
            await quiet(bed)

    run(main)


def test_a_prompt_that_finds_the_queue_full_waits_for_another_of_its_list_to_end() -> None:
    async def main() -> None:
        async with fleet(1, 1, queue_size=1, queue_timeout_secs=10) as bed:
            room(bed, 250)
            broken, go = asyncio.Event(), asyncio.Event()
            failed: list[str] = []

            async def hold(seen: Seen, out: Out) -> None:
                prompt = seen.body["prompt"]
                if prompt == "p0" and not failed:
                    failed.append(prompt)
                    await broken.wait()
                    await fail(seen, out)
                    return
                if prompt == "p1":
                    await go.wait()
                await out.json(answer_to(seen))

            bed.decode.behave = hold
            asking = asyncio.ensure_future(bed.complete(prompts("p", 2), max_tokens=100))
            await until(lambda: len(bed.decode.seen) == 2, "both are served")
            large = asyncio.ensure_future(bed.complete("large", max_tokens=200))
            await until(lambda: bed.router.desk.waiting.count(None) == 1, "the queue is full")
            broken.set()
            await until(lambda: bed.router.desk.retries.spent or asking.done(), "one is to be tried again")
            await asyncio.sleep(0.2)
            assert len(bed.decode.seen) == 2, "it does not overtake the large one"
            assert not asking.done()
            go.set()
            assert (await large).status == 200
            assert (await asking).status == 200
            await quiet(bed)

    run(main)


def test_a_bug_met_while_a_later_prompt_of_a_list_is_begun_ends_the_list(monkeypatch: pytest.MonkeyPatch) -> None:
    made = routes.part_body

    def broken(body: Any, prompt: Any) -> dict[str, Any]:
        if prompt == "p66":
            raise RuntimeError("a bug")
        return made(body, prompt)

    monkeypatch.setattr(routes, "part_body", broken)

    async def main() -> None:
        async with fleet(1, 1) as bed:
            told = await bed.complete([f"p{number}" for number in range(70)])
            assert (told.status, told.error["type"]) == (500, "InternalServerError")
            await quiet(bed)

    run(main)
