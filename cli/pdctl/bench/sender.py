"""`python -m pdctl.bench.sender`: one client process.

It reads its orders as a line of JSON, prepares, says `ready`, reads when to begin, and sends. Each finished request is
written to the run's folder at once, by one write, so that several processes share the file and a killed run keeps all
that it measured. When its parent is gone it ends.
"""

import asyncio
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import orjson
import uvloop

from pdctl.bench.client import Record
from pdctl.bench.load import Load, Share, share_of
from pdctl.bench.workload import Workload

_TELL_SECONDS = 0.25


def _tell(**fields: Any) -> None:
    sys.stdout.buffer.write(orjson.dumps(fields) + b"\n")
    sys.stdout.buffer.flush()


def _prepared(orders: dict[str, Any]) -> Share:
    workload = Workload.read(orders["workload"])
    trace = orders["trace"] and Path(orders["trace"])
    number, processes = orders["process"], orders["processes"]
    requests = share_of(workload, workload.requests(trace), number, processes)
    at_once = workload.concurrency
    if at_once is not None:
        at_once = at_once // processes + (number < at_once % processes)
    return Share(orders["url"], orders["model"], workload, requests, at_once)


async def _run(orders: dict[str, Any], share: Share) -> None:
    loop = asyncio.get_running_loop()
    file = os.open(orders["records"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    counts = {"done": 0, "failed": 0}

    def on_done(record: Record) -> None:
        counts["done"] += 1
        counts["failed"] += bool(record.error)
        line = record.told(load.begin) | {"repeat": orders["repeat"]}
        os.write(file, orjson.dumps(line) + b"\n")

    load = Load(share, on_done)
    if orders["process"] == 0 and share.workload.warmup:
        await load.warm_up(share.workload.warmups())
    _tell(ready=True)
    load.begin = float(await loop.run_in_executor(None, sys.stdin.readline))

    async def parent_gone() -> None:
        await loop.run_in_executor(None, sys.stdin.read)
        os._exit(1)  # every record is written

    async def report() -> None:
        while True:
            await asyncio.sleep(_TELL_SECONDS)
            _tell(**counts)

    watching = [asyncio.ensure_future(parent_gone()), asyncio.ensure_future(report())]
    await load.run()
    watching[1].cancel()
    _tell(**counts, strain=asdict(load.strain))
    os._exit(0)  # the thread that waits for the parent cannot be ended otherwise


def main() -> None:
    """Do as told."""
    orders = orjson.loads(sys.stdin.readline())
    try:
        share = _prepared(orders)
    except Exception as error:  # told to the parent, which shows it
        _tell(error=str(error))
        return
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_run(orders, share))


if __name__ == "__main__":
    main()
