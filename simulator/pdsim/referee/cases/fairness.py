"""Who gets which engine, and who waits for whom."""

import asyncio
from collections.abc import Sequence

from pdsim.referee.bench import Bench, Body
from pdsim.referee.case import FailedError, Group
from pdsim.referee.engines import Engine

fairness = Group("fairness")


async def _used(bench: Bench, engines: Sequence[Engine]) -> list[str]:
    return [name for name, count in (await bench.count(engines)).items() if count]


async def _one_pair(bench: Bench, bodies: Sequence[Body], headers: dict[str, str] | None = None) -> str:
    for body in bodies:
        await bench.right(body, headers)
    for role, engines in (("prefill", bench.fleet.prefills), ("decode", bench.fleet.decodes)):
        used = await _used(bench, engines)
        if len(used) != 1:
            raise FailedError(f"{len(bodies)} requests went to {len(used)} {role} engines")
    return f"{len(bodies)} requests, one prefill and one decode engine"


@fairness.case(keyed=True)
async def same_prompt(bench: Bench) -> str:
    """The same prompt goes to the same engines: their caches know it."""
    body = bench.completion()
    return await _one_pair(bench, [body] * 8)


@fairness.case(keyed=True)
async def same_session(bench: Bench) -> str:
    """Requests with one `x-session-id` go to the same engines, whatever their prompts."""
    return await _one_pair(bench, [bench.completion() for _ in range(8)], {"x-session-id": "session-1"})


@fairness.case(keyed=True)
async def same_user(bench: Bench) -> str:
    """Requests with one OpenAI `user` go to the same engines, for chat too."""
    await _one_pair(bench, [bench.conversation(user="alice") for _ in range(8)])
    return "8 chats of one user, one prefill and one decode engine"


@fairness.case()
async def words_are_no_key(bench: Bench) -> str:
    """What a prompt says is no routing key: prompts that quote a session or a user spread like others."""
    for quote in ('"user": "bob"', "user: bob", '"session_id": "7"'):
        before = await bench.count(bench.fleet.decodes)
        await bench.all_right([bench.completion(f"{quote} {bench.prompt(60)}") for _ in range(20)])
        after = await bench.count(bench.fleet.decodes)
        if sum(after[name] > before[name] for name in after) == 1:
            raise FailedError(f"20 distinct prompts that quote {quote} went to one decode engine")
    return "3 quotes, 20 distinct prompts each, spread over decode engines"


@fairness.case()
async def spread(bench: Bench) -> str:
    """Distinct prompts spread: no engine is idle, none has more than 2.5 times its share."""
    total = 64
    await bench.all_right([bench.completion(bench.prompt(40), max_tokens=2) for _ in range(total)])
    for role, engines in (("prefill", bench.fleet.prefills), ("decode", bench.fleet.decodes)):
        counts = await bench.count(engines)
        most, share = max(counts.values()), total / len(engines)
        if not min(counts.values()):
            raise FailedError(f"a {role} engine was idle over {total} requests: {sorted(counts.values())}")
        if most > 2.5 * share:
            raise FailedError(f"one {role} engine had {most} of {total} requests")
    return f"decode engines had {sorted((await bench.count(bench.fleet.decodes)).values())} of {total}"


@fairness.case()
async def long_and_short(bench: Bench) -> str:
    """A long prompt does not hold up everybody: short ones, on other engines at least, end before it."""
    for engine in bench.fleet.prefills:
        await engine.fault("slow", factor=20)
    long = asyncio.ensure_future(bench.send(bench.completion(bench.prompt(30_000), max_tokens=1), patience=15))
    await bench.eventually(lambda: bench.busy(bench.fleet.prefills), "a prefill engine has the long prompt")
    before = 0

    async def short() -> None:
        nonlocal before
        await bench.send(bench.completion(bench.prompt(20), max_tokens=1), patience=15)
        before += not long.done()

    await asyncio.gather(*(short() for _ in range(16)))
    answer = await long
    if answer.failure:
        raise FailedError(f"the long prompt failed: {answer.failure}")
    if before < 4:
        raise FailedError(f"{before} of 16 short requests ended before the long one")
    return f"{before} of 16 short requests ended before the long one"
