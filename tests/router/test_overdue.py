"""A request that decode has queued for about a lease gets no text of KV blocks that are gone."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

from router.fakes import Answer, Bed, Out, Seen, answer_to, run, until
from router.generation import heard
from router.test_failover import COMPLETIONS, ended, fleet, generate, quiet, seen_by, undisturbed

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


def test_leases_that_end_after_decode_has_taken_in_its_queue_are_of_other_requests() -> None:
    async def main() -> None:
        async with full() as one:
            one.right = True
            for decode in one.bed.decodes:
                decode.generated, decode.counts = 7, {WAITING: 1.0}
            told = asked(one.bed, False)
            await one.overdue()
            for decode in one.bed.decodes:
                decode.counts = {WAITING: 0.0}
            seen = one.bed.prefill.looked_at
            await until(lambda: one.bed.prefill.looked_at > seen + 2, "it is looked at again")
            assert ended(one.bed) == {}, "its numbers stand still, so it may hang"
            for decode in one.bed.decodes:
                decode.generated = 8
            await until(lambda: ended(one.bed) == {"collected": 1}, "the queue is known to be taken in")
            one.leases_end()
            one.turn.set()
            assert right(await told, False)
            assert len(one.bed.prefill.seen) == 1
            await quiet(one.bed)

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


@pytest.mark.parametrize("complete", [False, True])
def test_a_client_that_leaves_while_its_overdue_answer_is_kept_back_leaves_nothing_behind(complete: bool) -> None:
    async def main() -> None:
        async with full() as one:
            prefill = one.bed.prefill
            told = asked(one.bed, not complete)
            await one.overdue()
            prefill.silent = True
            one.turn.set()
            await until(one.answered.is_set, "decode has answered")
            await asyncio.sleep(0.1)
            assert not told.done(), "it is kept back"
            told.cancel()
            await asyncio.gather(told, return_exceptions=True)
            await quiet(one.bed)

    run(main)
