import asyncio
import json
import pathlib
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from pdrouter.fleet.engine import Role
from pdrouter.handoff.retries import EACH
from pdrouter.openai.asked import truth
from pdrouter.openai.features import Prompt
from pdrouter.policies import RoutingKey
from router import fakes
from router.fakes import TICKET, Out, Seen, answer_to, event, routed, run, until
from support.requests import WANT_TICKET

CAPTURES = pathlib.Path(__file__).parent.parent / "wire" / "captures" / "pd.jsonl"


def recorded() -> dict[str, tuple[str, Any, Any, Any]]:
    """Give path, client body, prefill leg and prefill answer of each handoff that real engines accepted."""
    cases = {case["name"]: case for case in map(json.loads, CAPTURES.read_text().splitlines())}
    found = {}
    for name, first in cases.items():
        second = cases.get(name.replace("_step1", "_step2"))
        params = (first["response"]["body"] or {}).get("kv_transfer_params") if second is not first else None
        accepted = name.startswith("m_") and name.endswith("_step1") and params
        if accepted and second and "naive" not in name and "list2" not in name:
            client = {key: value for key, value in second["request"]["body"].items() if key != "kv_transfer_params"}
            if client.get("n", 1) != 1:  # accepted, but not safe (`pdrouter.openai.asked.why_alone`)
                continue
            found[name[2:-6]] = (first["request"]["path"], client, first["request"]["body"], first["response"]["body"])
    return found


RECORDED = recorded()


def test_the_captures_hold_enough_handoffs():
    assert len(RECORDED) >= 17


@pytest.mark.parametrize("name", RECORDED)
def test_both_legs_are_what_a_real_handoff_needed(name):
    path, client, wanted_prefill, prefill_answer = RECORDED[name]

    async def main():
        async with routed() as bed:

            async def prefill(seen: Seen, out: Out) -> None:
                await out.json(prefill_answer)

            bed.prefill.behave = prefill
            raw = json.dumps(client).encode()
            answer = await bed.post(path, raw)
            assert answer.status == 200
            assert bed.prefill.seen[0].body == wanted_prefill
            decode_leg = bed.decode.seen[0].raw
            ids = {"return_token_ids": True} if client.get("stream") else {}
            ticket = {"kv_transfer_params": prefill_answer["kv_transfer_params"]}
            assert json.loads(decode_leg) == client | ticket | ids
            assert decode_leg.startswith(raw[:-1]), "decode gets the client's own bytes"

    run(main)


def test_the_ticket_goes_to_decode_with_keys_the_router_does_not_know():
    async def main():
        async with routed() as bed:
            await bed.complete()
            assert bed.decode.seen[0].body["kv_transfer_params"] == TICKET
            assert list(bed.decode.seen[0].body["kv_transfer_params"]) == list(TICKET)

    run(main)


def test_a_client_cannot_give_a_ticket_of_its_own():
    forged = {"do_remote_prefill": True, "remote_host": "10.0.0.1", "remote_port": 1}

    async def main():
        async with routed() as bed:
            await bed.complete(kv_transfer_params=forged)
            assert bed.prefill.seen[0].body["kv_transfer_params"] == WANT_TICKET
            assert bed.decode.seen[0].body["kv_transfer_params"] == TICKET
            await bed.complete(kv_transfer_params=forged, echo=True, logprobs=1)
            assert "kv_transfer_params" not in bed.decode.seen[1].body
            await bed.post("/v1/completions", b'{"prompt":"x","kv_transfer_p\\u0061rams":{"a":1}}')
            assert bed.decode.seen[2].body["kv_transfer_params"] == TICKET
            assert bed.decode.seen[2].raw.count(b"kv_transfer") == 1

    run(main)


def test_integers_beyond_64_bits_reach_decode_as_they_are():
    async def main():
        async with routed() as bed:
            await bed.post("/v1/completions", b'{"prompt":"x","seed":123456789012345678901234567890}')
            assert b'"seed":123456789012345678901234567890' in bed.decode.seen[0].raw

    run(main)


def test_limits_that_a_client_set_to_null_stay_null():
    async def main():
        async with routed() as bed:
            await bed.complete(max_tokens=None, max_completion_tokens=None, n=None)
            leg = bed.prefill.seen[0].body
            assert (leg["max_tokens"], leg["max_completion_tokens"], leg["n"]) == (1, None, None)

    run(main)


@pytest.mark.parametrize("limit", [-1, -5_000_000, -(10**30), 10**30])
def test_a_number_of_tokens_that_cannot_be_makes_no_engine_seem_idle_or_full(limit):
    async def main():
        async with routed(policy="least_tokens") as bed:
            go = asyncio.Event()

            async def slow(seen: Seen, out: Out) -> None:
                await go.wait()
                await fakes.prefill(seen, out)

            bed.prefill.behave = slow
            known = bed.router.fleet.engines[Role.DECODE][0]
            for field in ("max_tokens", "max_completion_tokens"):
                go.clear()
                before = len(bed.prefill.seen)
                asked = asyncio.ensure_future(bed.complete(**{field: limit}))
                await until(lambda before=before: len(bed.prefill.seen) > before, "prefill is asked")
                assert 0 <= known.held_tokens < 1000
                go.set()
                assert (await asked).status == 200, "engines judge it"
                assert known.held_tokens == 0

    run(main)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"kv_transfer_params": None}, "no kv_transfer_params"),
        *[
            ({"kv_transfer_params": {k: v for k, v in TICKET.items() if k != name}}, name)
            for name in ("remote_engine_id", "remote_request_id", "remote_host", "remote_port", "remote_block_ids")
        ],
        ({"kv_transfer_params": TICKET | {"remote_request_id": None}}, "remote_request_id"),
        ({"kv_transfer_params": TICKET | {"remote_block_ids": []}}, "remote_block_ids"),
        ({"kv_transfer_params": TICKET | {"do_remote_prefill": False}}, "do not offer a transfer"),
        ({"model": "other"}, "model 'other'"),
    ],
)
def test_an_incomplete_or_foreign_ticket_never_reaches_decode(change, told):
    async def main():
        async with routed() as bed:

            async def prefill(seen: Seen, out: Out) -> None:
                await out.json(answer_to(seen, kv_transfer_params=TICKET) | change)

            bed.prefill.behave = prefill
            answer = await bed.complete()
            assert answer.status == 502
            assert answer.error["leg"] == "prefill"
            assert told in answer.error["message"]
            assert bed.prefill.url in answer.error["message"]
            assert bed.decode.seen == []
            assert 'pd_router_errors_total{leg="prefill",reason="ticket"} 1.0' in await bed.metrics()

    run(main)


def test_a_prefill_answer_that_is_no_json_never_reaches_decode():
    async def main():
        async with routed() as bed:

            async def prefill(seen: Seen, out: Out) -> None:
                await out.json(b"[1,")

            bed.prefill.behave = prefill
            assert (await bed.complete()).status == 502
            assert bed.decode.seen == []

    run(main)


def test_names_of_one_model_are_taken_for_each_other():
    async def main():
        async with routed() as bed:
            bed.router.fleet.engines["decode"][0].models = {"tiny": "/m", "alias": "/m", "adapter": "/lora"}
            assert (await bed.complete(model="alias")).status == 200
            assert (await bed.complete(model="adapter")).status == 502

    run(main)


def test_a_ticket_near_the_end_of_its_lease_is_replaced_by_a_new_one():
    """The decode engine's connection comes up only after the first ticket has grown old."""

    async def main():
        async with routed(kv_lease_seconds=0.2, health_interval_secs=60) as bed:
            pool = bed.router.pool
            connect, late = pool.connect, []

            async def slow(call: Any) -> None:
                if call.engine.role == "decode" and not late:
                    late.append(call)
                    await asyncio.sleep(0.3)
                await connect(call)

            pool.connect = slow  # type: ignore[method-assign]
            pool._idle.clear()
            answer = await bed.complete()
            assert late, "the first ticket was held up"
            assert answer.status == 200
            assert len(bed.prefill.seen) == 2
            assert len(bed.decode.seen) == 1

    run(main)


def test_prefills_own_error_goes_to_the_client_as_it_is():
    error = b'{"error": {"message": "too long", "type": "BadRequestError", "param": "prompt", "code": 400}}'

    async def main():
        async with routed() as bed:

            async def prefill(seen: Seen, out: Out) -> None:
                await out.json(error, 400)

            bed.prefill.behave = prefill
            answer = await bed.complete()
            assert (answer.status, answer.body) == (400, error)
            assert bed.decode.seen == []

    run(main)


def test_decodes_own_error_goes_to_the_client_as_it_is_also_for_a_stream():
    error = b'{"error": {"message": "n must be 1", "type": "BadRequestError", "param": null, "code": 400}}'

    async def main():
        async with routed() as bed:

            async def decode(seen: Seen, out: Out) -> None:
                await out.json(error, 400)

            bed.decode.behave = decode
            for stream in (False, True):
                answer = await bed.complete(stream=stream)
                assert (answer.status, answer.body) == (400, error)

    run(main)


def test_an_engines_plain_text_error_becomes_json():
    async def main():
        async with routed() as bed:

            async def prefill(seen: Seen, out: Out) -> None:
                out.writer.write(b"HTTP/1.1 503 X\r\ncontent-type: text/plain\r\ncontent-length: 4\r\n\r\nbusy")

            bed.prefill.behave = prefill
            answer = await bed.complete()
            assert answer.status == 503
            assert answer.error["leg"] == "prefill"
            assert answer.error["message"].endswith("answered 503: busy")

    run(main)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"echo": True, "logprobs": 1}, "echo_logprobs"),
        ({"echo": True, "logprobs": 0}, "echo_logprobs"),
        ({"prompt_logprobs": 0}, "prompt_logprobs"),
        ({"max_tokens": 0}, "max_tokens_0"),
        ({"use_beam_search": True}, "beam_search"),
        ({"prompt": ["a", [1]]}, "mixed_prompts"),
        ({"n": 2}, "several_choices"),
        ({"n": "2"}, "several_choices"),
        ({"prompt": ["a", "b"], "n": 2}, "several_choices"),
    ],
)
def test_what_may_not_be_handed_over_goes_to_one_engine_unchanged(fields, reason, capfd):
    async def main():
        async with routed() as bed:
            body = {"model": "tiny", "prompt": "x", **fields}
            assert (await bed.post("/v1/completions", body)).status == 200
            assert bed.prefill.seen == []
            assert bed.decode.seen[0].body == body
            pair = f'pd_router_pairs_total{{decode="{bed.decode.url}",prefill="none"}} 1.0'
            assert pair in await bed.metrics()

    run(main)
    assert f"reason=single_engine:{reason}" in capfd.readouterr().err


@pytest.mark.parametrize("prompt", ["one", ["a", "b"]])
@pytest.mark.parametrize(("spelled", "meant"), [(1, True), ("true", True), ("Yes", True), (0, False), ("off", False)])
def test_a_stream_is_asked_for_in_any_spelling_that_vllm_takes(spelled, meant, prompt):
    async def main():
        async with routed() as bed:
            answer = await bed.complete(prompt, stream=spelled)
            assert answer.status == 200
            assert answer.headers["content-type"].startswith("text/event-stream" if meant else "application/json")
            assert (b"data: [DONE]" in answer.body) is meant
            assert len(bed.prefill.seen) == len(bed.decode.seen) == (1 if prompt == "one" else 2)
            assert {seen.body["stream"] for seen in bed.decode.seen} == {meant}

    run(main)


def test_what_no_engine_would_take_for_a_boolean_reaches_decode_as_it_is():
    async def main():
        async with routed() as bed:
            assert (await bed.complete(stream="maybe")).status == 200
            assert bed.decode.seen[0].body["stream"] == "maybe"

    run(main)


_ODD = st.sampled_from(["T", "f", "ON", "2", "", " true", "tru", 0.0, 1.0, -1, 2, 0.5, [], {}, [1], "\u0131"])


@settings(deadline=None)
@given(value=st.one_of(_ODD, st.text(max_size=4), st.integers(), st.floats(allow_nan=False)))
def test_booleans_are_read_as_pydantic_reads_them(value):
    try:
        expected = TypeAdapter(bool).validate_python(value)
    except ValidationError:
        expected = None
    assert truth(value) is expected


def test_a_stream_arrives_byte_for_byte_and_at_once():
    """Decode waits with each chunk until the client has seen the one before it."""
    pieces = [b'data: {"a":1}\n\n', b"data: \xc3", b"\xa9\n\ndata: x\r\n", b"\n" * 70000, b"data: [DONE]\n\n"]

    async def main():
        async with routed(continue_streams=False) as bed:
            turn = asyncio.Semaphore(0)

            async def decode(seen: Seen, out: Out) -> None:
                await out.events()
                for piece in pieces:
                    await out.chunk(piece)
                    await turn.acquire()
                await out.end()

            bed.decode.behave = decode
            reader, writer = await bed.connect()
            writer.write(fakes.wire("POST", "/v1/completions", b'{"prompt":"x","stream":true}'))
            await reader.readuntil(b"\r\n\r\n")
            for piece in pieces:
                got = b""
                while len(got) < len(piece):
                    got += await reader.readexactly(int(await reader.readline(), 16))
                    await reader.readexactly(2)
                assert got == piece
                turn.release()
            assert await reader.readexactly(5) == b"0\r\n\r\n"
            writer.close()
            await writer.wait_closed()

    run(main)


def test_usage_is_counted_from_both_kinds_of_answer():
    async def main():
        async with routed() as bed:
            await bed.complete()
            await bed.complete(stream=True, stream_options={"include_usage": True})
            page = await bed.metrics()
            assert 'pd_router_tokens_total{kind="prompt"} 10.0' in page
            assert 'pd_router_tokens_total{kind="completion"} 4.0' in page

    run(main)


@pytest.mark.parametrize("leg", ["long prefill", "decode", "streaming"])
def test_a_client_that_leaves_aborts_the_leg_under_way(leg):
    async def main():
        async with routed() as bed:

            async def hang(seen: Seen, out: Out) -> None:
                if leg == "streaming":
                    await out.events()
                    await out.chunk(event(seen, 0, "a"))
                await asyncio.sleep(60)

            engine = bed.prefill if leg == "long prefill" else bed.decode
            engine.behave = hang
            reader, writer = await bed.connect()
            prompt = "x" * (400_000 if leg == "long prefill" else 1)
            body = json.dumps({"prompt": prompt, "stream": leg == "streaming"}).encode()
            writer.write(fakes.wire("POST", "/v1/completions", body))
            await until(lambda: engine.seen, "the leg is under way")
            if leg == "streaming":
                await reader.readuntil(b"data:")
            assert [one.in_flight for one in bed.router.fleet] == ([1, 0] if leg == "long prefill" else [0, 1])
            writer.close()
            await writer.wait_closed()
            await until(engine.seen[0].gone.is_set, "the engine sees its client go")
            assert [one.in_flight for one in bed.router.fleet] == [0, 0]
            if leg == "long prefill":
                assert bed.decode.seen == []
            assert 'reason="client_gone"} 1.0' in await bed.metrics()

    run(main)


def test_a_decode_engine_that_dies_in_a_stream_is_seen_as_an_error_and_a_cut():
    async def main():
        async with routed() as bed:

            async def die(seen: Seen, out: Out) -> None:
                await out.events()
                await out.chunk(event(seen, 0, "a"))
                await asyncio.sleep(0.05)
                out.cut()

            bed.decode.behave = die
            answer = await bed.complete(stream=True)
            assert answer.status == 200
            assert not answer.complete, "no end of the body"
            assert answer.events[0]["choices"][0]["text"] == "a"
            assert answer.events[-1]["error"]["code"] == 502
            assert answer.events[-1]["error"]["leg"] == "decode"
            assert b"[DONE]" not in answer.body

    run(main)


def test_a_decode_engine_that_dies_in_a_whole_answer_is_a_502():
    async def main():
        async with routed() as bed:

            async def die(seen: Seen, out: Out) -> None:
                out.writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 99\r\n\r\n{")
                await out.writer.drain()
                await asyncio.sleep(0.05)
                out.cut()

            bed.decode.behave = die
            answer = await bed.complete()
            assert (answer.status, answer.error["leg"]) == (502, "decode")
            assert bed.decode.url in answer.error["message"]

    run(main)


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_an_engine_that_refuses_connections_is_replaced_and_left_alone(role):
    async def main():
        async with routed(2, 2, policy="round_robin", health_interval_secs=60) as bed:
            engines = bed.prefills if role == "prefill" else bed.decodes
            await engines[0].stop()
            for number in range(4):
                assert (await bed.complete(str(number))).status == 200
            assert len(engines[1].seen) == 4
            workers = await bed.workers()
            assert [one["url"] for one in workers if not one["healthy"]] == [engines[0].url]

    run(main)


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_without_a_healthy_engine_of_a_role_the_answer_is_503(role):
    async def main():
        async with routed(queue_timeout_secs=0.2, decode_only=False) as bed:
            engine = bed.prefill if role == "prefill" else bed.decode
            engine.healthy = False
            ready = fakes.wire("GET", "/ready")
            await until(lambda: not bed.router.fleet.ready(), "the engine is seen as down")
            answer = await bed.complete()
            assert (answer.status, answer.error["leg"]) == (503, role)
            assert int(answer.headers["retry-after"]) >= 1
            assert (await bed.send(ready, "GET")).status == 503
            engine.healthy = True
            await until(bed.router.fleet.ready, "the engine is seen as up")
            assert (await bed.complete()).status == 200

    run(main)


def test_a_kept_connection_that_went_stale_costs_no_request():
    async def main():
        async with routed(health_interval_secs=60) as bed:
            await bed.complete()
            before = len(bed.decode.seen)
            dropped: list[Seen] = []

            async def drop_once(seen: Seen, out: Out) -> None:
                """Close just when the next request arrives."""
                if not dropped:
                    dropped.append(seen)
                    out.cut()
                    await asyncio.sleep(60)
                await fakes.decode(seen, out)

            bed.decode.behave = drop_once
            assert (await bed.complete()).status == 200
            assert dropped
            assert len(bed.decode.seen) == before + 2

    run(main)


def test_a_request_that_breaks_every_engine_is_given_up_after_some_tries():
    async def main():
        async with routed(health_interval_secs=60) as bed:
            bed.router.pool._idle.clear()

            async def die(seen: Seen, out: Out) -> None:
                out.cut()
                await asyncio.sleep(60)

            bed.prefill.behave = die
            answer = await bed.complete()
            assert (answer.status, answer.error["leg"]) == (502, "prefill")
            assert len(bed.prefill.seen) == 1 + EACH

    run(main)


def test_connections_to_engines_are_kept_between_requests():
    async def main():
        async with routed(health_interval_secs=60) as bed:
            for _ in range(5):
                await bed.complete()
            assert bed.prefill.connections == 1
            assert bed.decode.connections == 1

    run(main)


def test_a_request_that_takes_too_long_is_broken_off():
    async def main():
        async with routed(request_timeout_secs=0.2) as bed:

            async def hang(seen: Seen, out: Out) -> None:
                await asyncio.sleep(60)

            bed.decode.behave = hang
            answer = await bed.complete()
            assert answer.status == 504
            await until(bed.decode.seen[0].gone.is_set, "decode sees its client go")

    run(main)


@pytest.mark.parametrize("n", [None, 1])
def test_one_choice_is_handed_over_however_it_is_asked_for(n):
    async def main():
        async with routed() as bed:
            assert (await bed.complete(n=n)).status == 200
            assert [len(engine.seen) for engine in (bed.prefill, bed.decode)] == [1, 1]
            assert "kv_transfer_params" in bed.decode.seen[0].body

    run(main)


def test_each_choice_needs_room_for_an_answer_of_its_own():
    key = RoutingKey("k", "test")

    async def main():
        async with routed() as bed:
            needs = bed.router.desk.needs
            prompt = {"prompt": "x" * 40, "max_tokens": 100}
            assert [needs(Prompt(key, prompt | {"n": n})) for n in (None, 1, 3, -1, "3")] == [110, 110, 310, 110, 110]

    run(main)
