"""A request that decode has queued for about a lease gets no text of KV blocks that are gone."""

import asyncio
import gc
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

from router.fakes import Answer, Bed, Out, Seen, answer_to, run, until
from router.generation import heard
from router.test_failover import COMPLETIONS, ended, fleet, generate, quiet, seen_by, stand_still, undisturbed

LEASE = 1.5  # seconds
ENDED = "vllm:nixl_num_kv_expired_reqs_total"
WAITING = "vllm:num_requests_waiting"


@dataclass
class Full:
    """One prefill engine that counts ended leases, and two decode engines.

    The one asked first is full: it answers when its `turn` is set, and as from the blocks of somebody else, but where
    `right` is set.
    """

    bed: Bed
    turn: asyncio.Event = field(default_factory=asyncio.Event)
    answered: asyncio.Event = field(default_factory=asyncio.Event)
    right: bool = False
    queued: list[Seen] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.bed.prefill.counts = {ENDED: 4.0}
        for one in self.bed.decodes:
            one.behave = self.decode

    async def decode(self, seen: Seen, out: Out) -> None:
        wrong = False
        if not self.queued:
            self.queued.append(seen)
            await self.turn.wait()
            wrong = not self.right
        if seen.body.get("stream"):
            await generate(salt=int(wrong))(seen, out)
        else:
            await out.json(answer_to(seen, **({"choices": [{"index": 0, "text": "wrong"}]} if wrong else {})))
        self.answered.set()

    async def overdue(self) -> None:
        """Wait until the router has seen the first count."""
        await until(lambda: self.bed.prefill.looked_at > 1, "the leases are looked at")

    def leases_end(self) -> None:
        self.bed.prefill.counts[ENDED] += 1


@asynccontextmanager
async def full() -> AsyncIterator[Full]:
    async with fleet(1, 2, kv_lease_seconds=LEASE) as bed:
        yield Full(bed)


def asked(bed: Bed, stream: bool) -> asyncio.Task[Answer]:
    return asyncio.create_task(bed.post(COMPLETIONS, body(stream), x_request_id="r1"))


def body(stream: bool) -> dict[str, Any]:
    return {"model": "tiny", "prompt": "x", "max_tokens": 9, "stream": stream, "ignore_eos": True}


def right(told: Answer, stream: bool) -> bool:
    """Whether it is the answer of an engine that nothing disturbed."""
    if stream:
        return heard(told.body) == undisturbed(COMPLETIONS, body(True), "r1")
    return told.status == 200 and told.json["choices"][0]["text"] == "<x>0"


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_whose_lease_ends_in_decodes_queue_is_taken_from_there_and_prefilled_again(stream: bool) -> None:
    async def main() -> None:
        async with full() as one:
            told = asked(one.bed, stream)
            await one.overdue()
            one.leases_end()
            assert right(await told, stream)
            assert one.queued[0].gone.is_set()
            assert (len(one.bed.prefill.seen), ended(one.bed)) == (2, {"expired": 1, "collected": 1})
            await quiet(one.bed)

    run(main)


@pytest.mark.parametrize("stream", [False, True])
def test_what_decode_answers_in_the_moment_in_which_a_lease_has_ended_is_not_passed_on(stream: bool) -> None:
    async def main() -> None:
        async with full() as one:
            told = asked(one.bed, stream)
            await one.overdue()
            one.leases_end()
            one.turn.set()
            assert right(await told, stream)
            assert len(one.bed.prefill.seen) == 2
            await quiet(one.bed)

    run(main)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("counts", [True, False])
def test_a_request_that_waits_for_longer_than_a_lease_that_is_kept_is_prefilled_once(
    stream: bool, counts: bool
) -> None:
    """Engines that do not count ended leases get the benefit of the doubt."""

    async def main() -> None:
        async with full() as one:
            one.right = True
            if not counts:
                one.bed.prefill.counts = {WAITING: 0.0}
            told = asked(one.bed, stream)
            await one.overdue()
            await asyncio.sleep(LEASE)
            assert not told.done()
            one.turn.set()
            assert right(await told, stream)
            assert (len(one.bed.prefill.seen), ended(one.bed)) == (1, {"collected": 1})
            await quiet(one.bed)

    run(main)


def busy(bed: Bed, waiting: float) -> None:
    """Let decode engines tell that they work, and how many requests wait there."""
    for decode in bed.decodes:
        decode.generated = (decode.generated or 0) + 1
        decode.counts = {WAITING: waiting}


def in_doubt(bed: Bed) -> int:
    return len([doubt for doubt in bed.router._overdue._doubts if doubt.open])


async def looks(bed: Bed, times: int) -> None:
    """Wait for some more looks at the leases."""
    wanted = bed.prefill.looked_at + times
    await until(lambda: bed.prefill.looked_at >= wanted, "it is looked at again")


def test_leases_that_end_after_decode_has_taken_in_its_queue_are_of_other_requests() -> None:
    async def main() -> None:
        async with full() as one:
            one.right = True
            busy(one.bed, 1)
            told = asked(one.bed, False)
            await one.overdue()
            busy(one.bed, 0)
            await until(lambda: in_doubt(one.bed) == 0, "its blocks are known to be there")
            one.leases_end()
            one.turn.set()
            assert right(await told, False)
            assert len(one.bed.prefill.seen) == 1
            await quiet(one.bed)

    run(main)


def test_an_empty_queue_of_an_engine_whose_counters_stand_still_proves_nothing() -> None:
    async def main() -> None:
        async with full() as one:
            for decode in one.bed.decodes:
                decode.generated, decode.counts = 7, {WAITING: 0.0}
            told = asked(one.bed, False)
            await one.overdue()
            await looks(one.bed, 3)
            one.leases_end()
            assert right(await told, False)
            assert len(one.bed.prefill.seen) == 2

    run(main)


def test_a_queue_that_is_taken_in_after_a_lease_has_ended_is_not_believed() -> None:
    async def main() -> None:
        async with full() as one:
            busy(one.bed, 1)
            told = asked(one.bed, False)
            await one.overdue()
            await looks(one.bed, 1)
            one.leases_end()
            busy(one.bed, 0)
            one.turn.set()
            assert right(await told, False)
            assert len(one.bed.prefill.seen) == 2
            await quiet(one.bed)

    run(main)


@pytest.mark.parametrize("stream", [False, True])
def test_a_first_count_that_comes_after_the_lease_may_have_ended_is_none(stream: bool) -> None:
    async def main() -> None:
        async with full() as one:
            told = asked(one.bed, stream)
            await until(lambda: one.queued, "it is queued")
            one.bed.prefill.silent = True
            await asyncio.sleep(LEASE)
            one.leases_end()
            one.bed.prefill.silent = False
            await until(one.queued[0].gone.is_set, "it is taken away")
            assert right(await told, stream)

    run(main)


def test_a_router_that_stood_still_over_a_leases_end_passes_nothing_of_it_on() -> None:
    async def main() -> None:
        async with full() as one:
            told = asked(one.bed, True)
            await until(lambda: one.queued, "it is queued")
            stand_still(LEASE)
            one.leases_end()
            one.turn.set()
            assert right(await told, True)
            assert len(one.bed.prefill.seen) == 2

    run(main)


@pytest.mark.parametrize("stream", [False, True])
def test_tickets_that_became_void_in_decodes_queue_are_looked_after_too(stream: bool) -> None:
    async def main() -> None:
        async with fleet(1, 2, kv_lease_seconds=LEASE, health_interval_secs=0.05) as bed:
            one = Full(bed)
            told = asked(bed, stream)
            await until(lambda: one.queued, "it is queued")
            bed.prefill.healthy = False
            await until(lambda: ended(bed) == {"void": 1}, "its ticket is void")
            bed.prefill.healthy = True
            await one.overdue()
            one.leases_end()
            one.turn.set()
            assert right(await told, stream)
            await quiet(bed)

    run(main)


def test_a_count_that_is_told_no_longer_proves_nothing() -> None:
    async def main() -> None:
        async with full() as one:
            told = asked(one.bed, True)
            await one.overdue()
            one.bed.prefill.counts = {}
            one.turn.set()
            assert right(await told, True)
            assert len(one.bed.prefill.seen) == 2

    run(main)


@asynccontextmanager
async def leases_of_others_end(bed: Bed, every: float) -> AsyncIterator[None]:
    """Let the prefill engine count one more ended lease again and again."""
    bed.prefill.counts = {ENDED: 0.0}

    async def end() -> None:
        while True:
            await asyncio.sleep(every)
            bed.prefill.counts[ENDED] += 1

    ending = asyncio.create_task(end())
    yield
    ending.cancel()


@pytest.mark.parametrize("own", [None, "mine"])
def test_what_a_decode_engine_has_cached_by_then_is_used_no_more(own: str | None) -> None:
    """It may have fetched and cached foreign blocks: the only one there is decodes again, and finds none of them."""

    async def main() -> None:
        async with fleet(1, 1, kv_lease_seconds=LEASE) as bed:
            one = Full(bed)
            told = body(False) | ({"cache_salt": own} if own else {})
            answer = asyncio.create_task(bed.post(COMPLETIONS, told))
            await one.overdue()
            one.leases_end()
            one.turn.set()
            assert right(await answer, False)
            assert right(await bed.post(COMPLETIONS, told), False)
            first, *later = [seen.body.get("cache_salt") for seen in bed.decode.seen]
            assert (first, len(later), len(set(later))) == (own, 2, 1)
            assert later[0].startswith("pd-router-")
            assert later[0].endswith(own or "")
            assert {seen.body.get("cache_salt") for seen in bed.prefill.seen} == {own}
            alone = await bed.post(COMPLETIONS, told | {"n": 2, "temperature": 1})
            assert (alone.status, bed.decode.seen[-1].body["cache_salt"]) == (200, later[0])
            refused = await bed.post(COMPLETIONS, told | {"cache_salt": ""})
            assert (refused.status, bed.decode.seen[-1].body["cache_salt"]) == (200, "")

    run(main)


def test_without_service_by_decode_alone_leases_of_others_that_end_for_ever_end_a_request() -> None:
    async def main() -> None:
        async with fleet(1, 2, kv_lease_seconds=0.3, decode_only=False) as bed:

            async def generate_for_long(seen: Seen, out: Out) -> None:
                await asyncio.sleep(2)
                await out.json(answer_to(seen))

            for one in bed.decodes:
                one.behave = generate_for_long
            async with leases_of_others_end(bed, 0.05):
                told = await asked(bed, False)
            assert (told.status, "Its leases ended" in told.body.decode()) == (504, True)
            await quiet(bed)

    run(main)


def test_leases_of_others_that_end_again_and_again_cost_a_request_time_and_no_more() -> None:
    """Its answers are longer than a lease, and its engine is never without others that wait."""

    async def main() -> None:
        async with fleet(1, 2, kv_lease_seconds=LEASE) as bed:

            async def generate_for_long(seen: Seen, out: Out) -> None:
                for _ in range(20):
                    await asyncio.sleep(1.4 * LEASE / 20)
                    busy(bed, 3)
                await out.json(answer_to(seen))

            for one in bed.decodes:
                one.behave = generate_for_long
            async with leases_of_others_end(bed, LEASE / 2):
                told = await asked(bed, False)
            assert right(told, False)
            assert [bool(seen.body.get("kv_transfer_params")) for seen in seen_by(bed.decodes)].count(True) == 2
            assert bed.router.desk.retries.spent == 0
            await quiet(bed)

    run(main)


def test_an_overdue_answer_of_which_prefill_tells_nothing_any_more_is_not_passed_on() -> None:
    async def main() -> None:
        async with full() as one:
            told = asked(one.bed, True)
            await one.overdue()
            await one.bed.prefill.stop()
            one.turn.set()
            await until(lambda: len(seen_by(one.bed.decodes)) == 2, "another is asked")
            assert right(await told, True)

    run(main)


def test_an_overdue_answer_that_the_router_fails_on_ends_the_request() -> None:
    async def main() -> None:
        async with full() as one:
            one.right = True

            async def odd(seen: Seen, out: Out) -> None:
                one.queued.append(seen)
                await one.turn.wait()
                await out.events()
                choice = b'{"index":0,"text":"x","finish_reason":null}'
                await out.chunk(b'data: {"id":"a","choices":[' + choice + b"]}\n\ndata: [1]\n\n")
                await out.chunk(b"data: [DONE]\n\n")
                await out.end()

            for decode in one.bed.decodes:
                decode.behave = odd
            told = asyncio.create_task(one.bed.complete(["x", "y"], stream=True))
            await one.overdue()
            one.turn.set()
            await told
            await quiet(one.bed)

    run(main)


@pytest.mark.parametrize("leaves", [False, True])
def test_an_overdue_request_leaves_no_cycles_behind(leaves: bool) -> None:
    async def main() -> None:
        async with full() as one:
            one.right = True
            gc.collect()
            gc.disable()
            told = asked(one.bed, False)
            await one.overdue()
            if leaves:
                told.cancel()
                await asyncio.gather(told, return_exceptions=True)
            else:
                one.turn.set()
                await told
            await until(lambda: in_doubt(one.bed) == 0, "nothing is in doubt")
            await asyncio.sleep(0.1)
            gc.set_debug(gc.DEBUG_SAVEALL)
            gc.collect()
            gc.set_debug(0)
            left = Counter(type(one).__qualname__ for one in gc.garbage if type(one).__module__.startswith("pdrouter"))
            gc.garbage.clear()
            gc.enable()
            assert set(left) <= {"EngineConnection"}  # one that was broken off, with its parser

    run(main)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_while_its_overdue_answer_is_kept_back_leaves_nothing_behind(stream: bool) -> None:
    async def main() -> None:
        async with full() as one:
            told = asked(one.bed, stream)
            await one.overdue()
            one.bed.prefill.silent = True
            one.turn.set()
            await until(one.answered.is_set, "decode has answered")
            await asyncio.sleep(0.1)
            assert not told.done(), "it is kept back"
            told.cancel()
            await asyncio.gather(told, return_exceptions=True)
            await quiet(one.bed)

    run(main)
