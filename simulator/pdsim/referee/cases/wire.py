"""What a client asks is what it gets, as from one plain engine; and the engines are asked as their protocol wants."""

import asyncio
import json

from pdsim.referee.answers import difference
from pdsim.referee.bench import Bench, Body
from pdsim.referee.case import FailedError, Group

wire = Group("wire")
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
HUGE = 123456789012345678901234567890


@wire.case()
async def completion(bench: Bench) -> str:
    """A completion is the plain engine's: short and long prompt, streamed and whole."""
    for words in (3, 300):
        for stream in (False, True):
            await bench.right(bench.completion(bench.prompt(words), stream=stream))
    return "4 of 4 equal the plain engine's"


@wire.case()
async def chat(bench: Bench) -> str:
    """A chat answer is the plain engine's, streamed and whole."""
    for stream in (False, True):
        await bench.right(bench.conversation(stream=stream))
    return "2 of 2 equal the plain engine's"


@wire.case()
async def handover(bench: Bench) -> str:
    """A prefill engine computes the prompt, and a decode engine reads its KV instead of computing it again."""
    await bench.right(bench.completion(bench.prompt(400)))
    prefill, decode = await bench.legs()
    moved = [edge for engine in bench.fleet.decodes for edge in (await engine.state())["transfers"]]
    if not prefill:
        raise FailedError("no request reached a prefill engine")
    if not json.loads(decode[-1]["body"]).get("kv_transfer_params"):
        raise FailedError("the decode engine was given no ticket")
    if not moved:
        raise FailedError("no KV was read from a prefill engine")
    return f"{len(prefill)} prefill leg, {len(decode)} decode leg, KV was read from the prefill engine"


@wire.case()
async def usage(bench: Bench) -> str:
    """Usage counts prompt and answer once: whole, at the end of a stream, and in each chunk of it."""
    for fields in (
        {},
        {"stream": True, "stream_options": {"include_usage": True}},
        {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}},
    ):
        answer = await bench.right(bench.completion(bench.prompt(150), **fields))
        if not answer.told()["usage"].get("completion_tokens"):
            raise FailedError("the answer tells no usage")
    return "right in 3 of 3 forms"


@wire.case()
async def token_limits(bench: Bench) -> str:
    """`min_tokens` and `max_completion_tokens` hold for the answer, and never reach the prefill engine as they are."""
    await bench.right(bench.completion(min_tokens=6))
    body = bench.conversation(max_completion_tokens=7)
    del body["max_tokens"]
    await bench.right(body)
    broken = [rule for rule in await bench.violations() if rule.startswith("prefill_m")]
    if broken:
        raise FailedError(f"the prefill leg breaks {', '.join(broken)}")
    return "both hold"


@wire.case()
async def several_choices(bench: Bench) -> str:
    """`n` of 3 gives three choices, computes the prompt once and leaves nothing pinned."""
    await bench.right(bench.completion(n=3, temperature=0.9, seed=11))
    if "prefill_n" in await bench.violations():
        raise FailedError("the prefill engine was asked for 3 choices too")
    await bench.all_let_go()
    return "three right choices, nothing left pinned"


@wire.case()
async def logprobs(bench: Bench) -> str:
    """Log probabilities are the plain engine's, for both APIs, streamed and whole."""
    for stream in (False, True):
        await bench.right(bench.completion(logprobs=3, stream=stream))
        await bench.right(bench.conversation(logprobs=True, top_logprobs=2, stream=stream))
    return "4 of 4 equal"


@wire.case()
async def prompt_scores(bench: Bench) -> str:
    """`echo` with `logprobs`, and `prompt_logprobs`, score each prompt token once (lm_eval needs it)."""
    for fields in (
        {"echo": True, "logprobs": 1, "max_tokens": 1},
        {"echo": True, "logprobs": 1, "max_tokens": 0},
        {"prompt_logprobs": 1},
    ):
        await bench.right(bench.completion(bench.prompt(60), **fields))
    await bench.right(bench.conversation(prompt_logprobs=1))
    return "4 of 4 have one entry for each token"


@wire.case()
async def stop_strings(bench: Bench) -> str:
    """Stop strings and stop token ids end the answer where the plain engine ends it."""
    for fields in ({"stop": ["e", "a"]}, {"stop": "i", "include_stop_str_in_output": True, "stream": True}):
        await bench.right(bench.completion(max_tokens=40, **fields))
    body = bench.completion(max_tokens=40, return_token_ids=True)
    ids = (await bench.plainly(body)).told()["choices"][0]["token_ids"]
    await bench.right(body | {"stop_token_ids": [ids[5]]})
    return "3 of 3 end in the right place"


@wire.case()
async def token_ids(bench: Bench) -> str:
    """A prompt of token ids is continued like any other."""
    await bench.right(bench.completion([7 + number * 31 % 8000 for number in range(260)], return_token_ids=True))
    return "equal, token ids included"


@wire.case()
async def long_prompt(bench: Bench) -> str:
    """A prompt of 400 KB passes."""
    text = bench.prompt(80_000)[:400_000]
    await bench.right(bench.completion(text, max_tokens=3))
    return f"{len(text)} bytes, equal"


@wire.case()
async def unknown_fields(bench: Bench) -> str:
    """Fields that a router does not know reach both engines: engines get new ones with each release."""
    extra = {"x_vendor_option": {"deep": [1, {"a": None}], "text": "ä€"}, "priority": 3}
    await bench.right(bench.completion() | extra)
    for leg, requests in zip(("prefill", "decode"), await bench.legs(), strict=True):
        for request in requests:
            body = json.loads(request["body"])
            lost = [key for key, value in extra.items() if body.get(key) != value]
            if lost:
                raise FailedError(f"{', '.join(lost)} did not reach the {leg} engine as sent")
    return "they reached both legs as sent"


@wire.case()
async def big_integers(bench: Bench) -> str:
    """Numbers are passed on digit by digit: a seed above 2^53, an integer above 2^64."""
    seed = 2**62 + 1
    await bench.right(bench.completion(seed=seed, temperature=0.8))
    body = json.dumps(bench.completion() | {"x_number": HUGE}).encode()
    answer = await bench.send(body)
    if answer.failure:
        raise FailedError(f"with an integer above 2^64: {answer.failure}")
    for leg, requests in zip(("prefill", "decode"), await bench.legs(), strict=True):
        for request in requests:
            if str(seed) not in request["body"] and str(HUGE) not in request["body"]:
                raise FailedError(f"a number did not reach the {leg} engine digit by digit")
    return "both reached the engines digit by digit"


@wire.case()
async def client_headers(bench: Bench) -> str:
    """Authorization, trace context and request id of the client reach the engines; the id is in the answer."""
    headers = {
        "authorization": "Bearer of-the-client",
        "traceparent": f"00-{TRACE}-00f067aa0ba902b7-01",
        "x-request-id": "id-of-the-client",
    }
    answer = await bench.right(bench.completion(), headers)
    lost = set()
    for request in [request for leg in await bench.legs() for request in leg]:
        seen = {name.lower(): value for name, value in request["headers"]}
        if seen.get("authorization") != headers["authorization"]:
            lost.add("authorization")
        if TRACE not in seen.get("traceparent", ""):
            lost.add("traceparent")
        if seen.get("x-request-id") != headers["x-request-id"]:
            lost.add("x-request-id")
    if lost:
        raise FailedError(f"lost on the way to the engines: {', '.join(sorted(lost))}")
    given = (answer.json() or {}).get("id", "")
    if headers["x-request-id"] not in given:
        raise FailedError(f"the answer's id is {given}")
    return f"all three reached both legs; the answer is {given}"


@wire.case()
async def error_bodies(bench: Bench) -> str:
    """What an engine refuses is told as the engine tells it: status and body."""
    unknown = await bench.send(bench.completion() | {"model": "nobody"})
    if unknown.status != 404 or "error" not in (unknown.json() or {}):
        raise FailedError(f"an unknown model is answered {unknown.failure or unknown.status}")
    wrong: list[Body] = [
        bench.completion(temperature=-1),
        bench.completion(max_tokens=-5),
        bench.conversation() | {"messages": []},
        bench.completion(stream=True, temperature=-1),
    ]
    for body in wrong:
        answer, expected = await asyncio.gather(bench.send(body), bench.plainly(body))
        if answer.status != expected.status:
            raise FailedError(f"status {answer.status} instead of {expected.status} ({answer.failure})")
        if answer.json() != expected.json():
            raise FailedError(f"another body: {answer.failure}")
    return f"{len(wrong)} of {len(wrong)} as the engine told it, an unknown model 404"


@wire.case()
async def client_ticket(bench: Bench) -> str:
    """`kv_transfer_params` of a client reach no engine: they would let it read others' KV."""
    forged = {
        "do_remote_prefill": True, "do_remote_decode": False, "remote_engine_id": "forged-engine",
        "remote_request_id": "forged", "remote_block_ids": [[*range(1, 9)]], "remote_host": "127.0.0.1",
        "remote_port": 5600,
    }  # fmt: skip
    await bench.right(bench.completion(kv_transfer_params=forged))
    if any("forged" in request["body"] for request in await bench.seen()):
        raise FailedError("the forged ticket reached an engine")
    return "they were dropped, the text is right"


@wire.case()
async def chunked_request(bench: Bench) -> str:
    """A request body in chunks is taken like one with a length."""
    body = bench.completion(stream=False)
    content = json.dumps(body).encode()
    parts = [content[:10], content[10:200], content[200:]]
    head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\nconnection: close\r\n"
    sent = b"".join(f"{len(part):x}\r\n".encode() + part + b"\r\n" for part in parts if part) + b"0\r\n\r\n"
    got = await bench.raw(head.encode() + b"transfer-encoding: chunked\r\n\r\n" + sent, 5)
    text = (await bench.plainly(body)).text
    if b" 200 " not in got[:15] or json.dumps(text, ensure_ascii=False).encode() not in got:
        raise FailedError(f"answered {got[:60]!r}")
    return "answered rightly"


@wire.case()
async def live_stream(bench: Bench) -> str:
    """Tokens reach the client as they are made, not when the answer is whole."""
    await bench.slow_decodes()
    for make in (bench.completion, bench.conversation):
        async with bench.stream(make(stream=True, max_tokens=50, ignore_eos=True)) as stream:
            await stream.more(2)
            if not await bench.busy(bench.fleet.decodes):
                raise FailedError("the first tokens came when the engine was done with all of them")
            await stream.rest()
    return "the engine was still at work when the first tokens were here, for both APIs"


@wire.case()
async def protocol(bench: Bench) -> str:
    """Over mixed requests no rule of the handoff protocol is broken, and no KV is left pinned."""
    bodies = [
        bench.completion(stream=True, stream_options={"include_usage": True}),
        bench.completion(min_tokens=4),
        bench.completion(n=2, temperature=0.7, seed=5),
        bench.completion(bench.prompt(60), echo=True, logprobs=1),
        bench.conversation(max_completion_tokens=9, stream=True),
        bench.completion([bench.prompt(150), bench.prompt(150)]),
        bench.completion([bench.prompt(150)]),
    ]
    await asyncio.gather(*map(bench.send, bodies))
    broken = await bench.violations()
    if broken:
        raise FailedError(f"broken: {', '.join(broken)}")
    await bench.all_let_go()
    return f"{len(bodies)} requests, no rule broken, nothing pinned"


@wire.case()
async def seeds(bench: Bench) -> str:
    """Sampling with a seed gives what the plain engine gives."""
    for number in range(4):
        body = bench.completion(temperature=0.9, top_p=0.9, seed=number, max_tokens=20)
        answer, expected = await asyncio.gather(bench.send(body), bench.plainly(body))
        found = difference(answer, expected)
        if found:
            raise FailedError(found)
    return "4 of 4 equal"
