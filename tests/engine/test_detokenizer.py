"""Text and names of tokens that hold parts of characters, beside what real vLLM gave for the same token ids."""

import json
import pathlib
from typing import Any

import pytest

from pdsim.engine.detokenizer import Detokenizer, name
from pdsim.engine.tokenizer import Tokenizer
from wire.shape import events

CAPTURES = pathlib.Path(__file__).parent.parent / "wire" / "captures" / "plain.jsonl"
RECORDED = {
    entry["name"]: entry["response"]["body"]
    for entry in map(json.loads, CAPTURES.read_text().splitlines())
    if "unfinished" in entry["name"]
}
STREAMED = [name for name, body in RECORDED.items() if isinstance(body, str)]
SCORED = [name for name in RECORDED if name.endswith("logprobs")]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer()


def texts(tokenizer: Tokenizer) -> list[str]:
    return ["" if token in tokenizer.special else tokenizer.text(token) for token in range(tokenizer.vocabulary)]


def parts(stream: str) -> tuple[list[int], list[tuple[list[int], str]]]:
    """Give a recorded stream's prompt, and the token ids and the text of each of its chunks."""
    prompt: list[int] = []
    found = []
    for message in events(stream)[:-1]:
        (choice,) = message["choices"]
        prompt = prompt or message.get("prompt_token_ids") or choice.get("prompt_token_ids") or []
        if choice.get("token_ids"):
            found.append((choice["token_ids"], choice["text"] if "text" in choice else choice["delta"]["content"]))
    return prompt, found


@pytest.mark.parametrize("case", STREAMED)
def test_text_comes_with_the_token_that_completes_a_character_as_from_real_vllm(
    tokenizer: Tokenizer, case: str
) -> None:
    prompt, chunks = parts(RECORDED[case])
    detokenizer = Detokenizer(tokenizer, texts(tokenizer), prompt, skip_special=True)
    assert ["".join(map(detokenizer.step, ids)) for ids, _ in chunks] == [text for _, text in chunks]
    assert any(text == "" for _, text in chunks)


def test_a_prompt_that_ends_within_a_character_is_given_whole_with_the_first_text(tokenizer: Tokenizer) -> None:
    prompt, chunks = parts(RECORDED["cmpl_unfinished_prompt"])
    first = next(text for _, text in chunks if text)
    assert first.startswith(tokenizer.decode(prompt[:-1], skip_special=True))


@pytest.mark.parametrize("case", SCORED)
def test_a_token_is_named_by_what_it_adds_as_by_real_vllm(tokenizer: Tokenizer, case: str) -> None:
    (choice,) = RECORDED[case]["choices"]
    ids: list[int] = choice["token_ids"]
    told: Any = choice["logprobs"]
    named = told["tokens"] if "tokens" in told else [entry["token"] for entry in told["content"]]
    assert [name(tokenizer, token, ids[:place]) for place, token in enumerate(ids)] == named


def test_a_sequence_without_such_tokens_is_the_texts_of_its_tokens(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("the quick brown fox jumps over 17 lazy dogs", special=False)
    detokenizer = Detokenizer(tokenizer, texts(tokenizer), [tokenizer.bos], skip_special=True)
    assert "".join(map(detokenizer.step, ids)) == "the quick brown fox jumps over 17 lazy dogs"
