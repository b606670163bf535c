"""A closed loop: a number of prompts, so many at once."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import orjson

from pdctl.bench.client import Connection, Record

LAG_INTERVAL = 0.05


@dataclass(frozen=True, slots=True)
class Workload:
    """What is sent.

    Args:
        url: base URL of the router.
        model: served model name.
        prompts: texts or lists of token ids.
        output_tokens: tokens each request generates (`ignore_eos`).
        concurrency: requests at once.
    """

    url: str
    model: str
    prompts: Sequence[str | list[int]]
    output_tokens: int
    concurrency: int

    def body(self, prompt: str | list[int]) -> bytes:
        """Give the body of one request."""
        fields: dict[str, Any] = {
            "model": self.model,
            "prompt": prompt,
            "temperature": 0.0,
            "max_tokens": self.output_tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
            "ignore_eos": True,
        }
        return orjson.dumps(fields)


@dataclass(slots=True)
class Outcome:
    """What was measured; it fills while the run goes on, so that an interrupted one can be reported.

    Args:
        records: one a request that ended, in the order of their ends.
        begin: start of the run (perf_counter).
        duration: its length in seconds.
        lags: how late the client's own event loop was, seconds, every 50 ms.
    """

    records: list[Record] = field(default_factory=list)
    begin: float = 0.0
    duration: float = 0.0
    lags: list[float] = field(default_factory=list)


async def run(workload: Workload, outcome: Outcome, on_done: Callable[[Record], None]) -> None:
    """Send all prompts of a workload."""
    loop = asyncio.get_running_loop()
    left = iter([workload.body(prompt) for prompt in workload.prompts])

    async def client() -> None:
        connection = Connection(workload.url, "/v1/completions")
        try:
            for body in left:
                record = await connection.post(body)
                outcome.records.append(record)
                on_done(record)
        finally:
            connection.close()

    async def watch_lag() -> None:
        while True:
            due = loop.time() + LAG_INTERVAL
            await asyncio.sleep(LAG_INTERVAL)
            outcome.lags.append(loop.time() - due)

    lag = asyncio.ensure_future(watch_lag())
    outcome.begin = perf_counter()
    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(min(workload.concurrency, len(workload.prompts))):
                group.create_task(client())
    finally:
        outcome.duration = perf_counter() - outcome.begin
        lag.cancel()
