import asyncio
import json
import re

import pytest

from router import fakes
from router.fakes import Out, Seen, answer_to, event, routed, run, until

IDS = [[1, 2], [3], [4, 5, 6]]


@pytest.mark.parametrize("prompts", [["a", "b", "c"], IDS])
def test_each_prompt_gets_a_handoff_of_its_own_and_answers_come_in_order(prompts):
    async def main():
        async with routed(2, 2) as bed:

            async def later_first(seen: Seen, out: Out) -> None:
                await asyncio.sleep(0.1 * (2 - prompts.index(seen.body["prompt"])))
                await out.json(answer_to(seen))

            for engine in bed.decodes:
                engine.behave = later_first
            answer = await bed.complete(prompts, x_field=1)
            assert answer.status == 200
            assert [c["text"] for c in answer.json["choices"]] == [f"<{prompt}>0" for prompt in prompts]
            assert [c["index"] for c in answer.json["choices"]] == [0, 1, 2]
            assert answer.json["usage"] == {"prompt_tokens": 15, "total_tokens": 21, "completion_tokens": 6}
            legs = [seen.body for engine in bed.prefills for seen in engine.seen]
            assert sorted(map(str, (leg["prompt"] for leg in legs))) == sorted(map(str, prompts))
            decodes = [seen.body for engine in bed.decodes for seen in engine.seen]
            assert all(leg["x_field"] == 1 and leg["kv_transfer_params"] for leg in decodes)

    run(main)


def test_a_batch_has_one_id_and_its_parts_have_their_own():
    async def main():
        async with routed() as bed:
            answer = await bed.post("/v1/completions", {"prompt": ["a", "b"]}, x_request_id="mine")
            assert answer.json["id"] == "cmpl-mine"
            assert answer.headers["x-request-id"] == "mine"
            assert sorted(seen.headers["x-request-id"] for seen in bed.prefill.seen) == ["mine-0", "mine-1"]
            assert sorted(seen.headers["x-request-id"] for seen in bed.decode.seen) == ["mine-0", "mine-1"]

    run(main)


@pytest.mark.parametrize("usage", [False, True])
def test_a_streamed_batch_has_one_usage_one_fingerprint_and_one_end(usage):
    async def main():
        async with routed() as bed:
            options = {"stream_options": {"include_usage": True}} if usage else {}
            answer = await bed.post(
                "/v1/completions", {"prompt": ["a", "b", "c"], "stream": True} | options, x_request_id="mine"
            )
            assert answer.complete
            assert answer.body.count(b"data: [DONE]\n\n") == 1
            assert answer.body.endswith(b"data: [DONE]\n\n")
            assert {one["id"] for one in answer.events} == {"cmpl-mine"}
            assert [i for i, one in enumerate(answer.events) if "system_fingerprint" in one] == [len(answer.events) - 1]
            told = [one for one in answer.events if one.get("usage")]
            if usage:
                assert [one["usage"] for one in told] == [
                    {"prompt_tokens": 15, "total_tokens": 21, "completion_tokens": 6}
                ]
                assert told[0] == answer.events[-1]
                assert told[0]["choices"] == []
            else:
                assert told == []

    run(main)


def test_continuous_usage_stays_each_prompts_own():
    async def main():
        async with routed() as bed:

            async def decode(seen: Seen, out: Out) -> None:
                own = {"prompt_tokens": len(seen.body["prompt"]), "total_tokens": 9, "completion_tokens": 1}
                await out.events()
                await out.chunk(event(seen, 0, "x", usage=own))
                await out.chunk(event(seen, 0, "", choices=[], usage=own, system_fingerprint="f") + b"data: [DONE]\n\n")
                await out.end()

            bed.decode.behave = decode
            answer = await bed.complete(
                ["a", "bbb"], stream=True, stream_options={"include_usage": True, "continuous_usage_stats": True}
            )
            own = {one["choices"][0]["index"]: one["usage"]["prompt_tokens"] for one in answer.events[:-1]}
            assert own == {0: 1, 1: 3}
            assert answer.events[-1]["usage"]["prompt_tokens"] == 4

    run(main)


def test_prompts_of_a_stream_are_interleaved_as_they_come():
    async def main():
        async with routed() as bed:
            second_done = asyncio.Event()

            async def decode(seen: Seen, out: Out) -> None:
                await out.events()
                await out.chunk(event(seen, 0, "1"))
                if seen.body["prompt"] == "a":
                    await second_done.wait()
                await out.chunk(event(seen, 0, "2")[:20])
                await out.chunk(event(seen, 0, "2")[20:] + b"data: [DONE]\n\n")
                await out.end()
                if seen.body["prompt"] == "b":
                    second_done.set()

            bed.decode.behave = decode
            answer = await bed.complete(["a", "b"], stream=True)
            order = [(one["choices"][0]["index"], one["choices"][0]["text"]) for one in answer.events]
            assert order[-1] == (0, "2")
            assert sorted(order) == [(0, "1"), (0, "2"), (1, "1"), (1, "2")]

    run(main)


def test_a_single_prompt_in_a_list_is_one_handoff_with_the_clients_own_body():
    async def main():
        async with routed() as bed:
            await bed.complete(["only"])
            assert bed.prefill.seen[0].body["prompt"] == ["only"]
            assert len(bed.decode.seen) == 1
            await bed.complete([1, 2, 3])
            assert bed.prefill.seen[1].body["prompt"] == [1, 2, 3]
            assert len(bed.decode.seen) == 2

    run(main)


@pytest.mark.parametrize("stream", [False, True])
def test_one_prompts_error_is_the_whole_batchs_error_and_aborts_the_others(stream):
    error = b'{"error": {"message": "too long", "type": "BadRequestError", "param": null, "code": 400}}'

    async def main():
        async with routed() as bed:

            async def prefill(seen: Seen, out: Out) -> None:
                if seen.body["prompt"] == "bad":
                    await until(lambda: bed.decode.seen, "the other prompt is being decoded")
                    await out.json(error, 400)
                else:
                    await fakes.prefill(seen, out)

            async def decode(seen: Seen, out: Out) -> None:
                await asyncio.sleep(60)

            bed.prefill.behave = prefill
            bed.decode.behave = decode
            answer = await bed.complete(["good", "bad"], stream=stream)
            assert (answer.status, answer.body) == (400, error)
            await until(bed.decode.seen[0].gone.is_set, "the other prompt is aborted")

    run(main)


def test_an_error_in_a_running_stream_is_an_event_and_a_cut():
    async def main():
        async with routed() as bed:

            async def decode(seen: Seen, out: Out) -> None:
                await out.events()
                await out.chunk(event(seen, 0, "x"))
                await asyncio.sleep(0.05 if seen.body["prompt"] == "dies" else 60)
                out.cut()

            bed.decode.behave = decode
            answer = await bed.complete(["lives", "dies"], stream=True)
            assert not answer.complete
            assert answer.events[-1]["error"]["code"] == 502
            assert b"[DONE]" not in answer.body

    run(main)


def test_a_client_that_leaves_aborts_every_prompt():
    async def main():
        async with routed() as bed:

            async def hang(seen: Seen, out: Out) -> None:
                await asyncio.sleep(60)

            bed.decode.behave = hang
            _, writer = await bed.connect()
            writer.write(fakes.wire("POST", "/v1/completions", json.dumps({"prompt": ["a", "b", "c"]}).encode()))
            await until(lambda: len(bed.decode.seen) == 3, "all prompts are being decoded")
            writer.close()
            await writer.wait_closed()
            await until(lambda: all(seen.gone.is_set() for seen in bed.decode.seen), "all are aborted")
            assert [one.in_flight for one in bed.router.fleet] == [0, 0]

    run(main)


def test_a_long_list_is_served_in_order_without_a_connection_for_each_prompt():
    async def main():
        async with routed() as bed:
            prompts = [f"p{number}" for number in range(300)]
            answer = await bed.complete(prompts)
            assert [c["text"] for c in answer.json["choices"]] == [f"<{prompt}>0" for prompt in prompts]
            assert bed.prefill.connections + bed.decode.connections < 150

    run(main)


def test_a_session_keeps_all_prompts_of_its_batch_on_one_pair(capfd):
    async def main():
        async with routed(4, 4) as bed:
            await bed.post("/v1/completions", {"prompt": [f"p{i}" for i in range(12)]}, x_session_id="s")
            assert sorted(len(engine.seen) for engine in bed.prefills) == [0, 0, 0, 12]
            await bed.complete([f"q{i}" for i in range(40)])
            assert all(engine.seen for engine in bed.prefills), "without a key prompts are spread"

    run(main)
    assert re.search(r"reason=consistent_hash:header:x-session-id:batch_of_12\n", capfd.readouterr().err)
