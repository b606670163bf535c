"""What an engine's death in the middle of a stream does to stop strings."""

import json
from itertools import pairwise
from typing import Any

from support.processes import Process, engine, router, start_all
from support.requests import COMPLETIONS, completion, prompt


def choices(process: Process, body: dict[str, Any]) -> list[dict[str, Any]]:
    """Give what each event of a stream tells; fails where one tells an error."""
    answer = process.post(COMPLETIONS, body).text.split("\n\n")
    chunks = [json.loads(event[6:]) for event in answer if event.startswith("data: {")]
    return [choice for chunk in chunks for choice in chunk["choices"]]


def told(process: Process, body: dict[str, Any]) -> tuple[str, list[tuple[Any, Any]]]:
    """Give a stream's text and how it ends."""
    said = choices(process, body)
    ends = [(one["finish_reason"], one["stop_reason"]) for one in said if one["finish_reason"]]
    return "".join(one["text"] for one in said), ends


def test_a_stop_string_that_is_told_too_is_found_across_the_death_of_its_engine() -> None:
    prefill, decodes, plain = engine("prefill"), [engine("decode") for _ in range(2)], engine("both")
    start_all([prefill, *decodes, plain])
    try:
        body = completion(prompt(3, 60), max_tokens=60, ignore_eos=True, stream=True)
        texts = [one["text"] for one in choices(plain, body)]
        # The first ten tokens end with what begins the stop string, and no such text is before.
        number, stop = next(
            (number, one[-1] + other[:2])
            for number, (one, other) in enumerate(pairwise(texts[9:]), 10)
            if one and other and "".join(texts).find(one[-1] + other[:2]) == len("".join(texts[:number])) - 1
        )
        body |= {"stop": stop, "include_stop_str_in_output": True}
        right = told(plain, body)
        assert right == ("".join(texts[:number]) + stop[1:], [("stop", stop)])
        with router([prefill], decodes) as started:
            for one in decodes:
                one.post("/sim/fault", {"kind": "die_mid_stream", "after_tokens": number})
            assert told(started, body) == right
    finally:
        for one in [prefill, *decodes, plain]:
            one.stop()
