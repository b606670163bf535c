"""Real engines die, stall and restart, and clients leave: that costs a request time, never its text."""

import json
import random
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from engines.asking import chat, fresh, ids, text
from engines.real import BLOCK, LONGEST, STARTS, Engines, Installation, RealEngine
from engines.relay import Cuts, Relay
from support.answers import told
from support.processes import Process, router, until
from support.requests import COMPLETIONS, completion

pytestmark = pytest.mark.timeout(2 * STARTS + 300)
LONG = 1000  # words: a prompt of some 1,500 tokens, a dozen steps
LEASE = 6  # seconds, of the hasty prefill engine
PATIENCE = ("--request-timeout-secs", "280", "--queue-timeout-secs", "270")
Measured = Callable[[str], None]


@pytest.fixture(scope="module")
def hasty_engine(installation: Installation) -> Iterator[RealEngine]:
    """A second prefill engine, with a short lease and few blocks, which it soon uses again."""
    made = installation.engine("prefill", "--num-gpu-blocks-override", "24", "--max-model-len", "2048", lease=LEASE)
    try:
        yield made.start().up()
    finally:
        made.stop()


@pytest.fixture
def hasty(hasty_engine: RealEngine) -> RealEngine:
    hasty_engine.revive()
    return hasty_engine


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(16) as made:
        yield made


def post(process: Process, path: str, body: dict[str, Any]) -> httpx.Response:
    return process.post(path, body, timeout=300)


def right(engines: Engines, answer: httpx.Response, path: str, body: dict[str, Any]) -> bool:
    """Whether an answer is what the plain engine gives."""
    return bool(answer.status_code == 200 and told(answer) == told(post(engines.plain, path, body)))


def serving(routed: Process, engines: Engines, user: str) -> RealEngine:
    """Ask once to learn which decode engine serves a user; its later requests go there too."""
    before = told_by(routed, "pd_router_pairs_total", "decode")
    assert post(routed, COMPLETIONS, completion(fresh(5), user=user)).status_code == 200
    after = told_by(routed, "pd_router_pairs_total", "decode")
    (url,) = [url for url in after if after[url] != before.get(url)]
    return next(one for one in engines.decodes if one.url == url)


def told_by(routed: Process, name: str, label: str) -> dict[str, float]:
    """Give the samples of one of the router's metrics by one of their labels."""
    page = httpx.get(routed.url.replace(":10001", ":29000") + "/metrics", timeout=10).text
    samples = [sample for family in text_string_to_metric_families(page) for sample in family.samples]
    return {sample.labels[label]: sample.value for sample in samples if sample.name == name}


def overwrite(prefill: RealEngine, words: int = 900) -> None:
    """Let other prompts take every block that nobody holds."""
    for _ in range(3):
        post(prefill, COMPLETIONS, completion(fresh(words), max_tokens=1))


@contextmanager
def busy(engine: RealEngine, seats: int) -> Iterator[None]:
    """Keep all seats of an engine's running batch taken, by streams that outlast the block."""
    over = threading.Event()

    def sit() -> None:
        body = completion(fresh(5), max_tokens=LONGEST - 100, ignore_eos=True, stream=True)
        with httpx.stream("POST", engine.url + COMPLETIONS, json=body, timeout=200) as answer:
            for _ in answer.iter_lines():
                if over.is_set():
                    break

    with ThreadPoolExecutor(seats) as pool:
        sitting = [pool.submit(sit) for _ in range(seats)]
        try:
            until(lambda: engine.running == seats, 60, "all seats are taken")
            yield
        finally:
            over.set()
    for one in sitting:
        one.result()


# --- a stream goes on where a decode engine broke off -----------------------------------------------------------------

USAGE = {"stream_options": {"include_usage": True}}
EVERY = {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}
UNFINISHED = [107, 132]  # the bytes C3 and A9 of é: texts of these have characters that one token begins and others end
STREAMS: dict[str, Callable[..., tuple[str, dict[str, Any]]]] = {
    "completions": text,
    "completions with usage": lambda **f: text(**f, **USAGE),
    "completions with usage in every chunk": lambda **f: text(**f, **EVERY),
    "completions with token ids": lambda **f: text(return_token_ids=True, **f),
    "completions with logprobs": lambda **f: text(logprobs=1, **f),
    "completions with min_tokens": lambda **f: text(min_tokens=20, **f),
    "completions with a stop string in mind": lambda **f: text(stop=["never said"], **f),
    "completions that end in half a character": lambda **f: text(allowed_token_ids=UNFINISHED, **f),
    "chat": chat,
    "chat with usage": lambda **f: chat(**f, **USAGE),
    "chat with token ids": lambda **f: chat(return_token_ids=True, **f),
    "chat that ends in half a character": lambda **f: chat(allowed_token_ids=UNFINISHED, **f),
}


@pytest.fixture
def cuts() -> Cuts:
    return Cuts()


@pytest.fixture
def fragile(engines: Engines, cuts: Cuts) -> Iterator[Process]:
    """A router whose decode engines break off where `cuts` says."""
    one, other = (Relay(decode.url, cuts) for decode in engines.decodes)
    with closing(one), closing(other), router([engines.prefill], [one, other], *PATIENCE) as routed:
        yield routed


@pytest.mark.parametrize("events", [1, 2, 20, 35])
@pytest.mark.parametrize("kind", STREAMS)
def test_a_stream_whose_decode_breaks_off_goes_on_as_if_nothing_had_happened(
    engines: Engines, fragile: Process, cuts: Cuts, kind: str, events: int
) -> None:
    path, body = STREAMS[kind](max_tokens=60, ignore_eos=True, stream=True)
    cuts.after(events)
    answer = post(fragile, path, body)
    assert cuts.made == 1
    assert right(engines, answer, path, body), answer.text[-500:]


@pytest.mark.parametrize("distance", [-1, 0, 1])
def test_a_stream_that_breaks_off_near_the_end_of_a_block_goes_on(
    engines: Engines, fragile: Process, cuts: Cuts, distance: int
) -> None:
    tokens = ids(BLOCK - 18)
    body = completion(tokens, max_tokens=40, ignore_eos=True, stream=True, return_token_ids=True)
    cuts.after(BLOCK - len(tokens) + distance)
    answer = post(fragile, COMPLETIONS, body)
    assert cuts.made == 1
    assert right(engines, answer, COMPLETIONS, body), answer.text[-500:]


@pytest.mark.parametrize("before", [0, 1, 2])
def test_a_stop_string_that_spans_the_break_still_ends_the_stream(
    engines: Engines, fragile: Process, cuts: Cuts, before: int
) -> None:
    path, body = text(max_tokens=40, ignore_eos=True)
    tokens = post(engines.plain, path, body | {"logprobs": 0}).json()["choices"][0]["logprobs"]["tokens"]
    whole = "".join(tokens)
    place, stop = next(
        (place, tokens[place] + tokens[place + 1])
        for place in range(10, 30)
        if len(tokens[place]) > 1 and len(tokens[place + 1]) > 1
        and whole.find(tokens[place] + tokens[place + 1]) == len("".join(tokens[:place]))
    )  # fmt: skip
    body |= {"stop": [stop], "stream": True}
    cuts.after(place + 1 - before)
    answer = post(fragile, path, body)
    assert cuts.made == 1
    assert told(answer)[0][0]["end"] == [("stop", stop)]
    assert right(engines, answer, path, body), answer.text[-500:]


@pytest.mark.parametrize("stream", [True, False])
def test_a_decode_engine_that_breaks_off_with_the_kv_collected_costs_a_prefill(
    engines: Engines, fragile: Process, cuts: Cuts, stream: bool
) -> None:
    path, body = text(max_tokens=20, stream=stream)
    cuts.after(0)
    answer = post(fragile, path, body)
    assert cuts.made == 1
    assert right(engines, answer, path, body), answer.text[-500:]


# --- clients that leave, and what they would leave behind -------------------------------------------------------------


class Visitor:
    """A client that sends a request and then closes its connection."""

    def __init__(self, process: Process, path: str, body: dict[str, Any]) -> None:
        host, port = process.url.removeprefix("http://").split(":")
        content = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n"
        self.socket = socket.create_connection((host, int(port)), 10)
        self.socket.sendall(f"{head}content-length: {len(content)}\r\n\r\n".encode() + content)

    def begun(self) -> None:
        """Wait until the first of the answer is there."""
        self.socket.settimeout(60)
        first = self.socket.recv(4096)
        assert first.startswith(b"HTTP/1.1 200 "), first

    def close(self) -> None:
        self.socket.close()


def free_after(engines: Engines, prefill: RealEngine, what: str, measured: Measured) -> None:
    """Wait until no block is held, for a third of the lease at most, and tell how long it took."""
    began = time.monotonic()
    until(lambda: prefill.pinned == 0 and engines.quiet(), 10, f"{what}: blocks are free")
    measured(f"{what}: all blocks free after {time.monotonic() - began:.2f} s (the lease is 30 s)")


def test_clients_that_leave_during_the_prefill_leave_no_blocks_pinned(engines: Engines, measured: Measured) -> None:
    with router([engines.prefill], engines.decodes) as routed:
        for _ in range(5):
            visitor = Visitor(routed, *text(LONG))
            until(lambda: engines.prefill.running, 20, "prefill runs")
            visitor.close()
        free_after(engines, engines.prefill, "5 clients left in the middle of a prefill", measured)


def test_clients_that_leave_about_when_prefill_ends_leave_no_blocks_pinned(
    engines: Engines, measured: Measured
) -> None:
    draw = random.Random(5)
    with router([engines.prefill], engines.decodes) as routed:
        for one in range(2):  # both decode engines know the prefill engine
            post(routed, COMPLETIONS, completion(fresh(20), user=f"u{one}"))
        for _ in range(30):
            visitor = Visitor(routed, *text(80, max_tokens=200, ignore_eos=True, stream=True))
            time.sleep(draw.random() * 0.1)
            visitor.close()
        free_after(engines, engines.prefill, "30 clients left within 100 ms of asking", measured)


def test_clients_that_leave_in_the_middle_of_a_stream_leave_nothing_running(
    engines: Engines, measured: Measured
) -> None:
    with router([engines.prefill], engines.decodes, *PATIENCE) as routed:
        endless: dict[str, Any] = {"max_tokens": LONGEST - 100, "ignore_eos": True, "stream": True}
        visitors = [Visitor(routed, *text(20, **endless)) for _ in range(4)]
        try:
            for visitor in visitors:
                visitor.begun()
            assert sum(one.running for one in engines.decodes) == len(visitors), "a stream ended too soon to be left"
        finally:
            for visitor in visitors:
                visitor.close()
        free_after(engines, engines.prefill, "4 clients left in the middle of a stream", measured)


@pytest.mark.parametrize(
    "fields",
    [{"stream_options": {"include_usage": True}}, {"n": 2}, {"min_tokens": 90}],
    ids=["refused while the body is read", "refused for greedy choices", "refused for too many min_tokens"],
)
def test_a_request_that_decode_refuses_leaves_no_ticket_pinned(
    engines: Engines, measured: Measured, fields: dict[str, Any]
) -> None:
    path, body = text(**fields)
    with router([engines.prefill], engines.decodes) as routed:
        post(routed, COMPLETIONS, completion(fresh(20)))
        answer = post(routed, path, body)
        assert (answer.status_code, answer.json()["error"]) == (
            400, post(engines.plain, path, body).json()["error"],
        )  # fmt: skip
        free_after(engines, engines.prefill, f"decode refused {next(iter(fields))}", measured)


# --- engines that die -------------------------------------------------------------------------------------------------


@contextmanager
def asked_of_prefill(
    pool: ThreadPoolExecutor, routed: Process, prefills: list[RealEngine], path: str, body: Any
) -> Iterator[tuple[Future[httpx.Response], RealEngine]]:
    """Send a request; the block runs while it lies with a prefill engine, which computes it when the block is left."""

    def holding() -> list[RealEngine]:
        in_flight = told_by(routed, "pd_router_in_flight", "engine")
        return [one for one in prefills if in_flight.get(one.url)]

    for one in prefills:
        one.send(signal.SIGSTOP)
    try:
        asked = pool.submit(post, routed, path, body)
        until(lambda: holding() or asked.done(), 10, "the request is with prefill")
        assert not asked.done(), asked.result().text
        yield asked, holding()[0]
    finally:
        for one in prefills:
            if one.alive():
                one.send(signal.SIGCONT)


def test_a_decode_engine_killed_between_the_legs_costs_nothing_but_time(
    engines: Engines, pool: ThreadPoolExecutor
) -> None:
    path, body = text(250, max_tokens=20, user="between")
    with router([engines.prefill], engines.decodes, *PATIENCE) as routed:
        victim = serving(routed, engines, "between")
        with asked_of_prefill(pool, routed, [engines.prefill], path, body) as (asked, _):
            victim.kill()
        assert right(engines, asked.result(), path, body), asked.result().text[-500:]


def test_the_only_decode_engine_killed_between_the_legs_and_restarted_serves_the_request(
    engines: Engines, pool: ThreadPoolExecutor, measured: Measured
) -> None:
    path, body = text(250, max_tokens=20)
    with router([engines.prefill], engines.decodes[:1], *PATIENCE) as routed:
        with asked_of_prefill(pool, routed, [engines.prefill], path, body) as (asked, _):
            engines.decodes[0].kill()
        began = time.monotonic()
        engines.decodes[0].revive()
        up = time.monotonic() - began
        answer = asked.result()
        assert right(engines, answer, path, body), answer.text[-500:]
        later = time.monotonic() - began - up
        measured(f"the only decode killed between the legs: up again after {up:.0f} s, answered {later:.1f} s later")


def test_a_decode_engine_killed_in_the_middle_of_streams_costs_nothing_but_time(
    engines: Engines, pool: ThreadPoolExecutor, measured: Measured
) -> None:
    fields: dict[str, Any] = {"max_tokens": 4000, "ignore_eos": True, "stream": True, "user": "streams"} | USAGE
    requests = [maker(40, **fields) for maker in (text, chat, text, chat)]
    with router([engines.prefill], engines.decodes, *PATIENCE) as routed:
        victim = serving(routed, engines, "streams")
        asked = [pool.submit(post, routed, *request) for request in requests]
        under_way = until(lambda: (now := victim.running) >= 2 and now, 60, "streams are on their way")
        victim.kill()
        answers = [one.result() for one in asked]
    pairs = zip(answers, requests, strict=True)
    wrong = [answer.text[-300:] for answer, request in pairs if not right(engines, answer, *request)]
    assert not wrong, f"{len(wrong)} of {len(requests)}; the first ends with {wrong[0]}"
    measured(f"decode killed with {under_way:g} of {len(requests)} streams under way: all ended as if undisturbed")


def test_a_prefill_engine_killed_in_the_middle_of_a_prefill_is_replaced_by_another(
    engines: Engines, hasty: RealEngine, pool: ThreadPoolExecutor
) -> None:
    both = [engines.prefill, hasty]
    path, body = text(LONG, max_tokens=20)
    with router(both, engines.decodes, "--kv-lease-seconds", str(LEASE), *PATIENCE) as routed:
        with asked_of_prefill(pool, routed, both, path, body) as (asked, victim):
            victim.kill()
        assert right(engines, asked.result(), path, body), asked.result().text[-500:]


def test_without_any_prefill_engine_decode_serves_alone_and_after_a_restart_kv_moves_again(engines: Engines) -> None:
    def moved() -> float:
        return sum(one.metric("vllm:nixl_bytes_transferred_sum") for one in engines.decodes)

    with router([engines.prefill], engines.decodes, *PATIENCE) as routed:
        before = moved()
        assert post(routed, *text()).status_code == 200
        assert moved() > before
        engines.prefill.kill()
        path, body = text()
        assert right(engines, post(routed, path, body), path, body)
        engines.prefill.revive()
        before = moved()
        for _ in range(3):
            path, body = text()
            until(lambda: httpx.get(routed.url + "/ready").status_code == 200, 30, "the router sees it")
            assert right(engines, post(routed, path, body), path, body)
        assert moved() > before, "the engine of the new life is used"


# --- stalls longer than the lease: an error may come, wrong text never ------------------------------------------------


def test_a_decode_engine_stalled_beyond_the_lease_never_gives_wrong_text(
    engines: Engines, hasty: RealEngine, pool: ThreadPoolExecutor, measured: Measured
) -> None:
    decode = engines.decodes[0]
    path, body = text(250, max_tokens=20)
    with router([hasty], [decode], "--kv-lease-seconds", str(LEASE), *PATIENCE) as routed:
        assert post(routed, *text()).status_code == 200
        with asked_of_prefill(pool, routed, [hasty], path, body) as (asked, _):
            decode.send(signal.SIGSTOP)
        try:
            until(lambda: not hasty.running and hasty.pinned, 20, "prefill is done")
            until(lambda: not hasty.pinned, 3 * LEASE, "its lease is over")
            overwrite(hasty)
        finally:
            decode.send(signal.SIGCONT)
        answer = asked.result()
        assert answer.status_code >= 500 or right(engines, answer, path, body), answer.text
        spoilt = not right(engines, post(decode, path, body), path, body)
        measured(
            f"decode stalled beyond the lease: status {answer.status_code}, its cache spoilt for the prompt: {spoilt}"
        )


def test_a_router_stalled_beyond_the_lease_never_gives_wrong_text(
    engines: Engines, hasty: RealEngine, pool: ThreadPoolExecutor
) -> None:
    path, body = text(250, max_tokens=20)
    with router([hasty], engines.decodes[:1], "--kv-lease-seconds", str(LEASE), *PATIENCE) as routed:
        assert post(routed, *text()).status_code == 200
        with asked_of_prefill(pool, routed, [hasty], path, body) as (asked, _):
            routed.process.send_signal(signal.SIGSTOP)
        try:
            until(lambda: not hasty.running and hasty.pinned, 20, "prefill is done")
            until(lambda: not hasty.pinned, 3 * LEASE, "its lease is over")
            overwrite(hasty)
        finally:
            routed.process.send_signal(signal.SIGCONT)
        answer = asked.result()
        assert answer.status_code >= 500 or right(engines, answer, path, body), answer.text


# --- leases that end while requests wait ------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [True, False], ids=["kept by heartbeats", "of which heartbeats come too late"])
def test_requests_that_wait_in_decode_for_longer_than_a_lease_get_the_right_text(
    engines: Engines, hasty: RealEngine, pool: ThreadPoolExecutor, kept: bool
) -> None:
    decode = engines.decodes[0 if kept else 1]
    bodies = [completion(fresh(200)) for _ in range(4)]

    def ended() -> float:
        return hasty.metric("vllm:nixl_num_kv_expired_reqs_total")

    before = ended()
    with router([hasty], [decode], "--kv-lease-seconds", str(LEASE), *PATIENCE) as routed:
        post(hasty, COMPLETIONS, completion(fresh(200), max_tokens=1))  # an engine's first takes seconds
        with busy(decode, 8):
            asked = [pool.submit(post, routed, COMPLETIONS, body) for body in bodies]
            until(lambda: decode.metric("vllm:num_requests_waiting") == len(bodies), 60, "all wait in decode")
            issued = time.monotonic()
            while time.monotonic() < issued + (2 if kept else 4) * LEASE and (kept or ended() == before):
                overwrite(hasty, 400)
            overwrite(hasty, 400)
            assert not any(one.done() for one in asked), "a seat was free before the leases could end"
            assert (ended() == before) is kept
        answers = [one.result() for one in asked]
    for body, answer in zip(bodies, answers, strict=True):
        assert told(answer) == told(post(engines.plain, COMPLETIONS, body))
