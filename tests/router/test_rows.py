"""Load rows that workers share: sums are the truth, whoever writes, joins, leaves and dies meanwhile."""

import asyncio
import math
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdrouter.fleet import rows as rows_module
from pdrouter.fleet.engine import Engine, Role
from pdrouter.fleet.rows import ENGINES, Rows, Table


class Loop:
    """Takes what is to run at the end of a turn, and runs it when told."""

    def __init__(self) -> None:
        self.soon: list[Callable[[], None]] = []

    def call_soon(self, call: Callable[[], None]) -> None:
        self.soon.append(call)

    def turn(self) -> None:
        soon, self.soon = self.soon, []
        for call in soon:
            call()


class Worker:
    """One worker: what it knows, and what it gave its engines to do."""

    def __init__(self, table: Table, number: int, scrapes: bool = False) -> None:
        self.table = table
        self.number = number
        self.loop: Any = Loop()
        self.rows = Rows(self.loop, table, number, scrapes)
        self.engines: dict[tuple[Role, str], Engine] = {}

    def join(self, role: Role, name: str, url: str = "") -> Engine:
        engine = self.engines[role, name] = Engine(url or name, role, name)
        self.rows.joined(engine)
        return engine

    def leave(self, role: Role, name: str) -> None:
        self.rows.left(self.engines.pop((role, name)))

    def load(self, engine: Engine, in_flight: int, queued: int, held: int) -> None:
        engine.own_in_flight, engine.own_queued, engine.own_held = in_flight, queued, held
        self.rows.changed(engine)

    def refresh(self) -> None:
        self.rows._read = -math.inf
        self.rows.refresh()


def own(engine: Engine) -> tuple[int, int, int]:
    return engine.own_in_flight, engine.own_queued, engine.own_held


def assert_sums_are_the_truth(workers: list[Worker]) -> None:
    for worker in workers:
        worker.loop.turn()
    for worker in workers:
        worker.refresh()
        for key, engine in worker.engines.items():
            others = [own(one.engines[key]) for one in workers if one is not worker and key in one.engines]
            assert engine.elsewhere == (*map(sum, zip((0, 0, 0), *others, strict=True)), 0)
            assert engine.in_flight == engine.own_in_flight + engine.elsewhere[0]
            assert engine.queued_tokens == engine.own_queued + engine.elsewhere[1]
            assert engine.held_tokens == engine.own_held + engine.elsewhere[2]


KEYS = [(role, f"http://10.0.0.{number}:8000") for role in Role for number in range(6)]
loads = st.tuples(st.integers(1, 5000), st.integers(0, 2**40), st.integers(0, 2**40)) | st.just((0, 0, 0))
steps = st.lists(
    st.tuples(
        st.sampled_from(["join", "join", "load", "load", "load", "leave", "die", "turn", "look"]),
        st.integers(0, 2),
        st.sampled_from(KEYS),
        loads,
    ),
    max_size=60,
)


@settings(max_examples=150, deadline=None)
@given(steps=steps, room=st.sampled_from([3, ENGINES]))
def test_sums_are_the_truth_whatever_workers_did_before(steps, room):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows_module, "ENGINES", room)
        table = Table(3)
        workers = [Worker(table, number) for number in range(3)]
        for what, number, key, load in steps:
            worker = workers[number]
            if what == "join" and key not in worker.engines and len(worker.engines) < room:
                worker.join(*key)
            elif what == "load" and key in worker.engines:
                worker.load(worker.engines[key], *load)
            elif what == "leave" and key in worker.engines:
                worker.leave(*key)
            elif what == "die":
                table.clear(number)
                workers[number] = Worker(table, number)
            elif what == "turn":
                worker.loop.turn()
            elif what == "look":
                worker.refresh()
        assert_sums_are_the_truth(workers)


@settings(max_examples=30, deadline=None)
@given(orders=st.tuples(*[st.permutations(KEYS)] * 3), data=st.data())
def test_workers_that_know_engines_in_different_orders_mean_the_same_ones(orders, data):
    table = Table(3)
    workers = [Worker(table, number) for number in range(3)]
    for worker, order in zip(workers, orders, strict=True):
        for key in order:
            worker.join(*key)
    for worker in workers:
        for engine in worker.engines.values():
            worker.load(engine, *data.draw(loads))
    assert_sums_are_the_truth(workers)


def test_one_name_in_both_roles_is_two_engines():
    table = Table(2)
    one, other = Worker(table, 0), Worker(table, 1)
    for worker in (one, other):
        for role in Role:
            worker.join(role, "pod-0")
    one.load(one.engines[Role.PREFILL, "pod-0"], 3, 20, 30)
    assert_sums_are_the_truth([one, other])
    assert other.engines[Role.PREFILL, "pod-0"].in_flight == 3
    assert other.engines[Role.DECODE, "pod-0"].in_flight == 0


def test_what_a_dead_worker_had_under_way_is_forgotten_and_its_successor_counts_anew():
    table = Table(2)
    dead, other = Worker(table, 0), Worker(table, 1)
    engines = [worker.join(Role.DECODE, "e") for worker in (dead, other)]
    dead.load(engines[0], 7, 70, 700)
    dead.loop.turn()
    other.refresh()
    assert engines[1].in_flight == 7
    table.clear(0)
    other.refresh()
    assert (engines[1].in_flight, engines[1].queued_tokens, engines[1].held_tokens) == (0, 0, 0)
    successor = Worker(table, 0)
    successor.load(successor.join(Role.DECODE, "e"), 1, 2, 3)
    assert_sums_are_the_truth([successor, other])
    assert engines[1].in_flight == 1


def test_a_worker_killed_while_it_was_adding_a_row_is_no_hindrance_after_it_was_cleared():
    table = Table(2)
    dead, other = Worker(table, 0), Worker(table, 1)
    engines = [worker.join(Role.DECODE, "e") for worker in (dead, other)]
    dead.load(engines[0], 7, 0, 0)
    dead.loop.turn()
    other.refresh()
    table.begin(0)  # what it was doing when it died
    other.refresh()
    assert engines[1].in_flight == 7
    table.clear(0)
    other.refresh()
    assert engines[1].in_flight == 0
    successor = Worker(table, 0)
    successor.load(successor.join(Role.DECODE, "e"), 2, 0, 0)
    assert_sums_are_the_truth([successor, other])


def test_an_engine_that_comes_back_under_its_name_at_another_address_starts_with_nothing():
    table = Table(2)
    one, other = Worker(table, 0), Worker(table, 1)
    old = one.join(Role.DECODE, "pod-0", "http://10.0.0.1:80")
    seen = other.join(Role.DECODE, "pod-0", "http://10.0.0.1:80")
    one.load(old, 5, 0, 0)
    one.loop.turn()
    one.leave(Role.DECODE, "pod-0")
    one.join(Role.DECODE, "pod-0", "http://10.0.0.2:80")
    one.load(old, 4, 0, 0)  # a request to the old one ends
    assert_sums_are_the_truth([one, other])
    assert seen.in_flight == 0


def test_more_engines_than_rows_are_served_and_each_gets_a_row_as_soon_as_one_is_free():
    table = Table(2)
    one, other = Worker(table, 0), Worker(table, 1)
    count = ENGINES + 20
    engines = [one.join(Role.DECODE, f"e{number}") for number in range(count)]
    seen = [other.join(Role.DECODE, f"e{number}") for number in range(count)]
    for engine in engines:
        one.load(engine, 1, 10, 100)
    one.loop.turn()
    other.refresh()
    assert [engine.in_flight for engine in seen] == [1] * ENGINES + [0] * 20
    for number in range(20):
        one.leave(Role.DECODE, f"e{number}")
    other.refresh()
    assert [engine.in_flight for engine in seen] == [0] * 20 + [1] * ENGINES


def test_rows_that_are_free_again_are_not_read():
    table = Table(2)
    one = Worker(table, 0)
    for number in range(100):
        one.join(Role.DECODE, f"e{number}")
    full = len(table.rows(0) or ())
    for number in range(4, 100):
        one.leave(Role.DECODE, f"e{number}")
    assert len(table.rows(0) or ()) == full / 25
    one.leave(Role.DECODE, "e0")
    one.join(Role.DECODE, "new")
    assert len(table.rows(0) or ()) == full / 25


# what one worker reads of engines' metrics


def scraped(engine: Engine, waiting: float, running: float, usage: float, tokens: int, at: float) -> None:
    engine.waiting, engine.running, engine.kv_usage, engine.kv_tokens = waiting, running, usage, tokens
    engine.scraped_at = at


def test_what_one_worker_reads_of_an_engine_all_know():
    table = Table(2)
    reads, other = Worker(table, 0, scrapes=True), Worker(table, 1)
    engine, seen = (worker.join(Role.DECODE, "e") for worker in (reads, other))
    other.refresh()
    assert seen.scraped_at == -math.inf
    scraped(engine, 3.0, 4.0, 0.25, 5000, 12.5)
    reads.rows.changed(engine)
    reads.loop.turn()
    other.refresh()
    assert (seen.waiting, seen.running, seen.kv_usage, seen.kv_tokens, seen.scraped_at) == (3.0, 4.0, 0.25, 5000, 12.5)


def test_figures_that_were_read_half_written_are_put_right_when_they_are_read_again():
    table = Table(2)
    reads, other = Worker(table, 0, scrapes=True), Worker(table, 1)
    engine, seen = (worker.join(Role.DECODE, "e") for worker in (reads, other))
    scraped(engine, 9.0, 9.0, 0.5, 100, 12.5)
    reads.rows.changed(engine)
    reads.loop.turn()
    waiting = table.start(0) + rows_module._FIRST + rows_module._WAITING
    table.numbers[waiting] = 1  # the value before, next to the new time
    other.refresh()
    assert seen.waiting == 1.0
    table.numbers[waiting] = 9
    other.refresh()
    assert seen.waiting == 9.0


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf, -1.0, 1e300])
def test_an_engine_that_tells_nonsense_of_itself_disturbs_no_other_engines_row(odd):
    table = Table(2)
    reads, other = Worker(table, 0, scrapes=True), Worker(table, 1)
    names = [f"e{number}" for number in range(4)]
    engines = [reads.join(Role.DECODE, name) for name in names]
    seen = [other.join(Role.DECODE, name) for name in names]
    for engine in engines:
        scraped(engine, odd if engine is engines[1] else 2.0, 2.0, odd if engine is engines[2] else 0.5, 10**30, 12.5)
        reads.load(engine, 1, 2, 3)
    reads.loop.turn()
    other.refresh()
    assert [engine.in_flight for engine in seen] == [1] * 4
    assert [engine.waiting for engine in seen] == [2.0, 0.0, 2.0, 2.0]


@pytest.mark.parametrize("odd", [-1, -(10**30), 10**30])
def test_a_load_that_cannot_be_disturbs_no_other_engines_row(odd):
    table = Table(2)
    own_worker, other = Worker(table, 0), Worker(table, 1)
    names = ["e0", "e1", "e2"]
    engines = [own_worker.join(Role.DECODE, name) for name in names]
    seen = [other.join(Role.DECODE, name) for name in names]
    for engine in engines:
        own_worker.load(engine, 1, odd if engine is engines[0] else 2, odd if engine is engines[1] else 3)
    own_worker.loop.turn()
    other.refresh()
    assert [engine.in_flight for engine in seen] == [1] * 3
    assert [engine.queued_tokens for engine in seen[1:]] == [2, 2]
    assert [engine.held_tokens for engine in (seen[0], seen[2])] == [3, 3]
    assert seen[0].queued_tokens == seen[1].held_tokens == (0 if odd < 0 else 1 << 62)


# two processes


NAMES = 12


def _churn(table: Table, seconds: float) -> None:
    """Let engines come and go in worker 0, each with a load that only it can have."""
    draw = random.Random(1)
    worker = Worker(table, 0, scrapes=True)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        number = draw.randrange(NAMES)
        if (Role.DECODE, f"e{number}") in worker.engines:
            worker.leave(Role.DECODE, f"e{number}")
        else:
            engine = Engine(f"e{number}", Role.DECODE)
            load = number + 1
            engine.own_in_flight, engine.own_queued, engine.own_held = load, load * 10, load * 100
            scraped(engine, load * 1000, load, 0, load, load)
            worker.engines[Role.DECODE, f"e{number}"] = engine
            worker.rows.joined(engine)
    os._exit(0)


def test_a_reader_never_takes_one_engines_numbers_for_anothers_while_rows_come_and_go_in_another_process():
    table = Table(2)
    reader = Worker(table, 1)
    engines = [reader.join(Role.DECODE, f"e{number}") for number in range(NAMES)]
    child = multiprocessing.get_context("fork").Process(target=_churn, args=(table, 1.0))
    child.start()
    met, looks = 0, 0
    while child.is_alive() or looks == 0:
        reader.refresh()
        looks += 1
        for number, engine in enumerate(engines, 1):
            if engine.in_flight:
                met += 1
                assert (engine.in_flight, *engine.elsewhere[1:3]) == (number, number * 10, number * 100)
                assert (engine.waiting, engine.running, engine.kv_tokens) == (number * 1000, number, number)
    child.join(10)
    assert child.exitcode == 0
    assert met > 1000
    assert looks > 100
    table.clear(0)
    reader.refresh()
    assert [engine.in_flight for engine in engines] == [0] * NAMES


def test_a_worker_that_is_killed_at_any_moment_leaves_a_table_that_can_be_cleared_and_used_again():
    table = Table(2)
    reader = Worker(table, 1)
    engines = [reader.join(Role.DECODE, f"e{number}") for number in range(NAMES)]
    for turn in range(12):
        child = multiprocessing.get_context("fork").Process(target=_churn, args=(table, 30.0))
        child.start()
        deadline = time.monotonic() + 10
        while not any(engine.in_flight for engine in engines):
            reader.refresh()
            assert time.monotonic() < deadline
        time.sleep(turn * 0.0007)  # not to wait for anything: so that it is killed at different moments
        assert child.pid is not None
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        table.clear(0)
        reader.refresh()
        assert [engine.in_flight for engine in engines] == [0] * NAMES


def test_what_one_worker_suspects_all_suspect_and_go_on_to_when_it_has_died():
    table = Table(3)
    workers = [Worker(table, number) for number in range(2)]
    engines = [worker.join(Role.DECODE, "http://e:80") for worker in workers]
    engines[0].suspected = 7
    workers[0].rows.changed(engines[0])
    for worker in workers:
        worker.loop.turn()
        worker.refresh()
        worker.loop.turn()
    table.clear(0)
    later = Worker(table, 2)
    seen = later.join(Role.DECODE, "http://e:80")
    assert seen.salt == ""
    later.refresh()
    assert (engines[1].salt, seen.salt) == (engines[0].salt, engines[0].salt)


def test_rows_are_published_once_a_turn_and_read_at_most_once_a_millisecond():
    async def main() -> None:
        table = Table(2)
        loop = asyncio.get_running_loop()
        rows, other = Rows(loop, table, 0, False), Rows(loop, table, 1, False)
        engine, seen = Engine("http://e:80", Role.DECODE), Engine("http://e:80", Role.DECODE)
        rows.joined(engine)
        other.joined(seen)
        engine.own_in_flight = 1
        rows.changed(engine)
        engine.own_in_flight = 2
        rows.changed(engine)
        await asyncio.sleep(0)
        other.refresh()
        assert seen.in_flight == 2
        engine.own_in_flight = 3
        rows.changed(engine)
        await asyncio.sleep(0)
        deadline = time.monotonic() + 5
        while seen.in_flight != 3:
            other.refresh()
            assert time.monotonic() < deadline

    asyncio.run(main())
