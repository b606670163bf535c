"""A client that leaves: nobody computes for it any longer, and nobody keeps KV for it."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

from pdsim.referee.answers import Answer
from pdsim.referee.bench import Bench, Body
from pdsim.referee.case import FailedError, Group

abort = Group("abort", alone=True)
RELEASES = "a router that gives a ticket back when its request has ended without a decode engine"


@contextlib.asynccontextmanager
async def _asking(bench: Bench, body: Body) -> AsyncIterator["asyncio.Task[Answer]"]:
    """Have a client that waits for an answer; it leaves when the block ends."""
    task = asyncio.create_task(bench.send(body, patience=30))
    try:
        yield task
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError, FailedError):
            await task


@abort.case()
async def leave_in_prefill(bench: Bench) -> str:
    """When the client leaves during prefill, the prefill engine stops within 5 s."""
    for engine in bench.fleet.prefills:
        await engine.fault("hang")
    async with _asking(bench, bench.completion()):
        await bench.eventually(lambda: bench.busy(bench.fleet.prefills), "a prefill engine has the request")
    await bench.all_let_go()
    return "the prefill engine dropped it"


@abort.case()
async def leave_between_legs(bench: Bench) -> str:
    """When the client leaves after prefill and before decode has answered, the KV is free within 5 s, not in 30."""
    for engine in bench.fleet.decodes:
        engine.pause()
    async with _asking(bench, bench.completion()):
        await bench.eventually(bench.tickets, "prefill is done")
    await asyncio.sleep(0.3)  # the router has seen it leave before decode engines come round again
    for engine in bench.fleet.decodes:
        engine.go_on()
    await bench.all_let_go()
    return "nothing left pinned"


@abort.case(own_only=RELEASES)
async def leave_as_prefill_ends(bench: Bench) -> str:
    """When the client leaves in the moment between prefill's end and its answer, the KV is free within 5 s."""
    for engine in bench.fleet.prefills:
        await engine.fault("late_answer", seconds=1.5)
    async with _asking(bench, bench.completion()):
        await bench.eventually(bench.tickets, "prefill is done")
    await bench.all_let_go()
    return "nothing left pinned"


@abort.case(own_only=RELEASES)
async def release_after_failure(bench: Bench) -> str:
    """A request that decode engines refuse leaves no KV pinned once it has ended and they are well again."""
    for engine in bench.fleet.decodes:
        await engine.fault("status", code=503, count=10_000)
    async with _asking(bench, bench.completion()) as asking:
        await bench.eventually(bench.tickets, "prefill is done")
        await asyncio.wait({asking}, timeout=1)
    for engine in bench.fleet.decodes:
        await engine.fault("none")
    await bench.all_let_go()
    return "nothing left pinned"


@abort.case()
async def leave_mid_stream(bench: Bench) -> str:
    """When the client leaves in the middle of a stream, the decode engine stops within 5 s."""
    await bench.slow_decodes(200)
    async with bench.stream(bench.completion(stream=True, max_tokens=2000, ignore_eos=True)) as stream:
        await stream.more(2)
        if not await bench.busy(bench.fleet.decodes):
            raise FailedError("no decode engine was at work when tokens came")
    await bench.all_let_go()
    return "the decode engine dropped it"


@abort.case()
async def leave_whole_answer(bench: Bench) -> str:
    """When the client of an answer that is not streamed leaves, the decode engine stops within 5 s."""
    await bench.slow_decodes(200)
    async with _asking(bench, bench.completion(max_tokens=2000, ignore_eos=True)):
        await bench.eventually(lambda: bench.busy(bench.fleet.decodes), "a decode engine has the request")
    await bench.all_let_go()
    return "the decode engine dropped it"


@abort.case()
async def leave_many(bench: Bench) -> str:
    """After 40 clients have left at all stages no engine works for them, and the router serves on."""
    await bench.slow_decodes(100)

    async def leaving(number: int) -> None:
        async with _asking(bench, bench.completion(max_tokens=400, ignore_eos=True, stream=bool(number % 2))):
            await asyncio.sleep(0.01 * number)

    await asyncio.gather(*map(leaving, range(40)))

    async def nobody_works() -> bool:
        return not await bench.busy(bench.fleet.engines)

    await bench.eventually(nobody_works, "no engine works any longer")
    for engine in bench.fleet.decodes:
        await engine.fault("none")
    await bench.all_right([bench.completion() for _ in range(8)])
    return "no engine works for them, 8 of 8 afterwards right"
