"""A list of prompts: vLLM answers a list with one ticket, which fits only its first prompt."""

from pdsim.referee.bench import Bench
from pdsim.referee.case import FailedError, Group

batch = Group("batch")


@batch.case()
async def batch_texts(bench: Bench) -> str:
    """Each prompt of a list gets its own right text, in order, and usage is the sum."""
    prompts = [bench.prompt(words) for words in (260, 140, 300)]
    await bench.right(bench.completion(prompts))
    await bench.right(bench.completion([bench.prompt(200)]))
    return "3 and 1 prompts, all texts right"


@batch.case()
async def batch_stream(bench: Bench) -> str:
    """The streams of a list are one stream: each index right, one usage, one end."""
    prompts = [bench.prompt(200) for _ in range(3)]
    answer = await bench.right(bench.completion(prompts, stream=True, stream_options={"include_usage": True}))
    if answer.events.count("[DONE]") != 1:
        raise FailedError(f"{answer.events.count('[DONE]')} times [DONE]")
    return "3 streams merged"


@batch.case()
async def batch_token_ids(bench: Bench) -> str:
    """A list of token id lists is a list of prompts."""
    prompts = [[5 + (number * 37 + part * 101) % 8000 for number in range(200)] for part in range(3)]
    await bench.right(bench.completion(prompts, n=2, temperature=0.8, seed=3))
    return "3 prompts of 2 choices, all right"


@batch.case()
async def batch_cache(bench: Bench) -> str:
    """A list leaves no wrong KV behind: later requests for the same prompts are right on every decode engine."""
    prompts = [bench.prompt(300) for _ in range(3)]
    await bench.send(bench.completion(prompts))
    for prompt in prompts:
        body = bench.completion(prompt)
        right = (await bench.plainly(body)).text
        for engine in bench.fleet.decodes:
            if (await bench.send(body, url=engine.url)).text != right:
                raise FailedError(
                    f"decode engine {engine.name} answers wrongly afterwards: its prefix cache is poisoned"
                )
    return "all decode engines right afterwards"
