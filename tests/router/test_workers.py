"""Several worker processes as one router: what its users may rely on, whichever worker dies and when."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path

import psutil
import pytest

from router.fakes import Out, Seen, run, until
from router.served import ADMIN, METRICS, PUBLIC, Placed, Served, eventually, served
from support.processes import new_address


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


async def replaced(router: Served, dead: int, engines: int, workers: int = 2) -> None:
    await until(lambda: dead not in router.workers() and len(router.workers()) == workers, "another worker is started")
    await router.ready(workers, engines)


def test_all_workers_serve_and_their_figures_are_added_up():
    async def main() -> None:
        async with served() as (router, engines):
            connections = [await router.connect() for _ in range(40)]
            taken = Counter([await router.worker_of(one) for one in connections])
            assert sorted(taken) == sorted(router.workers())
            for number, connection in enumerate(connections):
                answer = await connection.complete(str(number))
                assert answer.status == 200
                assert answer.json["served"][0] == engines[0].url
                connection.close()
            page = await router.metrics()
            assert page["pd_router_workers"] == 2
            assert page['pd_router_requests_total{path="/v1/completions",status="200"}'] == 40
            assert page["pd_router_request_duration_seconds_count"] == 40
            assert page['pd_router_tokens_total{kind="prompt"}'] == 40 * 5
            assert await router.total("pd_router_in_flight") == 0

    run(main)


def test_after_a_worker_is_killed_the_other_goes_on_a_new_one_comes_and_nothing_that_died_is_counted_as_load():
    async def main() -> None:
        async with served("--policy", "least_tokens", "--debug-routing", "0") as (router, _):
            first, other = router.workers()
            kept = await router.connect(other)
            held = [await router.connect(first) for _ in range(3)]
            for connection in held:
                await connection.begin("a prompt of some words")
            assert await router.total("pd_router_in_flight") > 0
            assert (await kept.complete()).status == 200  # lets the other worker see the load
            os.kill(first, signal.SIGKILL)
            assert (await kept.complete()).status == 200

            async def forgotten() -> bool:
                await kept.complete()
                page = await router.metrics()
                gone = ("pd_router_in_flight", "pd_router_queued_tokens", "pd_router_held_tokens")
                listed = [await router.listed() for _ in range(4)]
                return all(value == 0 for name, value in page.items() if name.partition("{")[0] in gone) and all(
                    engine["in_flight"] == engine["held_tokens"] == engine["queued_tokens"] == 0
                    for one in listed
                    for engine in one.values()
                )

            await replaced(router, first, 3)
            assert other in router.workers()
            await eventually(forgotten, "the load of the dead worker is forgotten")
            assert "ended code=-9; starting another" in router.output()
            new = next(pid for pid in router.workers() if pid != other)
            for pid in (new, other):
                connection = await router.connect(pid)
                assert (await connection.complete()).status == 200

    run(main)


def test_counters_that_were_shown_never_go_back_when_workers_are_killed():
    async def main() -> None:
        async with served() as (router, _):
            sent, shown = 0, 0.0
            counter = 'pd_router_requests_total{path="/v1/completions",status="200"}'
            buckets = "pd_router_request_duration_seconds_count"
            for turn in range(3):
                for _ in range(10):
                    assert (await router.complete()).status == 200
                    sent += 1
                page = await router.metrics()
                assert page[counter] == page[buckets] == sent
                dead = router.workers()[turn % 2]
                os.kill(dead, signal.SIGKILL)
                shown = page[counter]
                while dead in router.workers() or len(router.workers()) < 2:
                    try:
                        page = await router.metrics()
                    except (OSError, asyncio.IncompleteReadError):
                        continue  # the connection was the dead worker's
                    assert page[counter] >= shown
                    assert page[buckets] >= shown
                await router.ready(2, 3)
            page = await router.metrics()
            assert page[counter] == page[buckets] == sent
            assert page['pd_router_tokens_total{kind="completion"}'] == 2 * sent

    run(main)


def test_a_worker_that_dies_again_and_again_is_started_once_a_second_and_the_other_serves():
    async def main() -> None:
        async with served() as (router, _):
            other = router.workers()[0]
            seen: list[tuple[int, float]] = []
            began = time.monotonic()
            while len(seen) < 4:
                for pid in router.workers():
                    if pid != other and pid not in dict(seen):
                        seen.append((pid, time.monotonic()))
                        os.kill(pid, signal.SIGKILL)
                connection = await router.connect(other)
                assert (await connection.complete()).status == 200
                connection.close()
                assert time.monotonic() < began + 15
            pauses = [later - sooner for (_, sooner), (_, later) in pairwise(seen[1:])]
            assert all(pause > 0.8 for pause in pauses), pauses
            assert other in router.workers()

    run(main)


@pytest.mark.parametrize("numbers", [[signal.SIGTERM], [signal.SIGINT, signal.SIGTERM, signal.SIGINT]])
def test_a_signal_lets_the_streams_of_all_workers_end_and_a_second_one_cuts_nothing(numbers):
    async def main() -> None:
        async with served() as (router, engines):
            pids = router.workers()
            streams = [await router.connect(pid) for pid in pids]
            for stream in streams:
                await stream.begin()
            for number in numbers:
                router.process.send_signal(number)
                await until(lambda: router.output().count("draining=") == 2, "both workers drain")
            with pytest.raises(ConnectionRefusedError):
                await asyncio.open_connection(router.host, PUBLIC)
            assert sorted(router.workers()) == sorted(pids)
            for engine in engines:
                engine.hold.set()
            for stream in streams:
                assert b"[DONE]" in await stream.rest()
                stream.close()
            assert await router.ended() == 0
            assert not any(map(alive, pids))

    run(main)


def test_a_signal_during_the_start_ends_the_router_with_0_and_leaves_nobody():
    async def main() -> None:
        for moment in (0.0, 0.02, 0.05, 0.1):
            router = Served(
                ["--prefill", "http://127.0.0.1:9", "--decode", "http://127.0.0.1:10", "--workers", "3"], new_address()
            )
            try:
                await until(router.workers, "the first worker is started")
                await asyncio.sleep(moment)
                pids = router.workers()
                router.process.send_signal(signal.SIGTERM)
                assert await router.ended() == 0, router.output()
                assert not any(map(alive, pids))
            finally:
                await router.stop()

    run(main)


def test_workers_end_when_the_process_that_started_them_is_killed():
    async def main() -> None:
        async with served() as (router, engines):
            pids = router.workers()
            stream = await router.connect()
            await stream.begin()
            router.process.kill()
            for engine in engines:
                engine.hold.set()
            assert b"[DONE]" in await stream.rest()
            stream.close()
            await until(lambda: not any(map(alive, pids)), "no worker is left")

    run(main)


def finished(*flags: str) -> subprocess.CompletedProcess[str]:
    engines = ["--prefill", "http://127.0.0.1:9", "--decode", "http://127.0.0.1:10"]
    command = [sys.executable, "-m", "pdrouter", *engines, "--workers", "2", *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(
    ("flag", "port"), [("--port", PUBLIC), ("--prometheus-port", METRICS), ("--admin-port", ADMIN)]
)
def test_a_taken_port_is_one_clear_line_and_exit_status_1(flag, port, shared):
    host = new_address()
    places = ["--host", host, "--prometheus-host", host, "--admin-host", host]
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, shared)
        other.bind((host, port))
        other.listen()
        done = finished(*places, flag, str(port))
    assert done.returncode == 1
    assert done.stderr == (
        f"pd-router: cannot listen on {host}:{port}: the port is in use; stop the program that has it or choose "
        f"another with {flag}\n"
    )


def test_what_no_worker_can_start_with_is_one_line_and_exit_status_1(tmp_path):
    host = new_address()
    missing = str(tmp_path / "none.pem")
    done = finished(
        "--host", host, "--prometheus-host", host, "--tls-cert-file", missing, "--tls-key-file", missing
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith("pd-router: ")
    assert missing in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_second_router_cannot_join_the_workers_of_the_first():
    async def main() -> None:
        async with served() as (router, _):
            done = await asyncio.to_thread(finished, "--host", router.host, "--port", str(PUBLIC))
            assert done.returncode == 1
            assert "the port is in use" in done.stderr

    run(main)


def test_engines_added_and_removed_by_hand_are_so_in_all_workers_and_in_those_that_start_later():
    async def main() -> None:
        async with served() as (router, engines):
            added = Placed()
            await added.start()
            first = engines[1].url
            try:
                assert (await router.change("add", url=added.url, role="decode")).status == 200
                assert (await router.change("remove", url=first)).status == 200
                expected = {engines[0].url, engines[2].url, added.url}

                async def known() -> bool:
                    return all([set(await router.listed()) == expected for _ in range(8)])

                await eventually(known, "all workers have the changes")
                for _ in range(2):
                    dead = router.workers()[0]
                    os.kill(dead, signal.SIGKILL)
                    await replaced(router, dead, 3)
                    await eventually(known, "a new worker has the changes")
                # Both at once: none of them has ever seen the changes being made.
                for pid in router.workers():
                    os.kill(pid, signal.SIGKILL)
                await until(lambda: router.output().count("starting another") == 4, "both are replaced")
                await until(lambda: len(router.workers()) == 2, "both are replaced")
                await router.ready(2, 3)
                await eventually(known, "new workers have the changes")
                answers = [await router.complete(str(number)) for number in range(40)]
                assert {answer.json["served"][1] for answer in answers} == {engines[2].url, added.url}
                assert (await router.change("add", url=first, role="decode")).status == 200
                assert (await router.change("remove", url="http://127.0.0.1:1")).status == 400
                expected.add(first)
                await eventually(known, "an engine can come back")
            finally:
                await added.stop()

    run(main)


def test_an_engine_that_hangs_is_given_up_by_all_workers_that_have_requests_there():
    """Each of them sees that the others have some, and may not take that for work."""

    async def main() -> None:
        flags = ("--stall-timeout-secs", "1", "--policy", "round_robin")
        async with served(*flags) as (router, engines):
            hung = engines[1]

            async def hang(seen: Seen, out: Out) -> None:
                await asyncio.sleep(60)

            hung.behave = hang
            for one in engines[1:]:
                one.generated = 7
            engines[2].hold.set()
            pids = router.workers()
            connections = [await router.connect(pid) for pid in pids * 2]
            begun = [asyncio.ensure_future(one.begin(str(number))) for number, one in enumerate(connections)]
            await until(lambda: len(hung.seen) == 2, "each worker has a request there")
            for pid in pids:  # and sees that of the other when it next chooses
                begun.append(asyncio.ensure_future((await router.connect(pid)).begin("more")))
            async with asyncio.timeout(15):
                assert [served[1] for served in await asyncio.gather(*begun)] == [engines[2].url] * 6
            assert await router.total("pd_router_in_flight") == 0

    run(main)


def test_workers_told_opposite_things_at_once_end_up_with_the_same_engines():
    async def main() -> None:
        async with served() as (router, engines):
            for _ in range(10):
                await asyncio.gather(
                    *(
                        router.change(what, url=engine.url, role="decode")
                        for what in ("add", "remove") * 3
                        for engine in engines[1:]
                    )
                )

            async def same() -> bool:
                lists = [tuple(sorted(await router.listed())) for _ in range(8)]
                return len(set(lists)) == 1

            await eventually(same, "all workers have the same engines")

    run(main)


@pytest.mark.parametrize("policy", ["power_of_two", "least_tokens"])
def test_a_worker_avoids_the_engine_that_another_worker_loads(policy):
    async def main() -> None:
        async with served("--policy", policy) as (router, engines):
            for loading, asking in (router.workers(), router.workers()[::-1]):
                stream = await router.connect(loading)
                busy = (await stream.begin("some words to be held by the engine"))[1]
                connection = await router.connect(asking)
                answers = [await connection.complete(str(number)) for number in range(16)]
                assert {answer.json["served"][1] for answer in answers} == {
                    engine.url for engine in engines[1:] if engine.url != busy
                }
                stream.close()
                connection.close()

                async def idle() -> bool:
                    return await router.total("pd_router_in_flight") == 0

                await eventually(idle, "the stream's client is gone")

    run(main)


def test_nothing_is_left_behind_when_engines_clients_and_workers_come_and_go():
    churn = Path(__file__).parents[2] / "bench" / "router" / "churn.py"
    done = subprocess.run(
        [sys.executable, str(churn), "--seconds", "5", "--workers", "2"], capture_output=True, text=True, timeout=120,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "worker killed" in done.stdout
    assert "nothing leaked" in done.stdout
