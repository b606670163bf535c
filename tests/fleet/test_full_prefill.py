"""A prefill engine whose KV cache is full of what waits to be fetched has nothing to say, and is not called stalled."""

from concurrent.futures import ThreadPoolExecutor

from support.answers import told
from support.processes import engine, router, start_all
from support.requests import COMPLETIONS, completion, prompt


def test_requests_behind_a_prefill_engine_full_of_tickets_are_served_when_those_are_fetched() -> None:
    # Three prompts fill its cache, and the only decode engine decodes one at a time, for twice the stall timeout each.
    prefill = engine("prefill", "--num-gpu-blocks", "8", "--max-model-len", "1024")
    decode = engine("decode", "--max-num-seqs", "1")
    plain = engine("both", "--speed", "20")
    start_all([prefill, decode, plain])
    bodies = [completion(prompt(number, 250), max_tokens=300, ignore_eos=True, stream=True) for number in range(6)]
    try:
        with router([prefill], [decode], "--stall-timeout-secs", "1") as serving, ThreadPoolExecutor(6) as pool:
            answers = list(pool.map(lambda body: serving.post(COMPLETIONS, body), bodies))
            assert [answer.status_code for answer in answers] == [200] * 6
            for answer, body in zip(answers, bodies, strict=True):
                assert told(answer) == told(plain.post(COMPLETIONS, body))
            assert "stalled=" not in serving.output()
    finally:
        for one in [prefill, decode, plain]:
            one.stop()
