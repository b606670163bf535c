"""Record what real vLLM answers to a list of requests, as JSON lines for tests/wire.

Start a plain vLLM engine (any small model with the tokenizer of the simulator, served as `tiny`, `--block-size 128`,
`--max-model-len 2048`, `--enable-tokenizer-info-endpoint`, `VLLM_SERVER_DEV_MODE=1`), then:

    python scripts/record_captures.py --url http://127.0.0.1:8300 tests/wire/captures/plain.jsonl

Each line: {"name", "request": {method, path, headers, body}, "response": {status, headers, body}}; an SSE body stays
text. A request whose body is a string is sent as those bytes.
"""

import argparse
import json
import pathlib
from typing import Any

import httpx

WORDS = [
    "return",
    "over",
    "def",
    "in",
    "class",
    "brown",
    "quick",
    "dog",
    "dict",
    "value",
    "import",
    "the",
    "lazy",
    "fox",
    "list",
    "jumps",
    "self",
    "range",
    "print",
    "os",
]


def prompt(start: int, words: int) -> str:
    """Give `words` words, the same ones for the same start."""
    state, out = start * 2654435761 % 2**32, []
    for _ in range(words):
        state = (state * 1664525 + 1013904223) % 2**32
        out.append(WORDS[(state >> 16) % len(WORDS)])
    return " ".join(out)


def completion(start: int = 1, words: int = 40, **fields: Any) -> dict[str, Any]:
    """Make a body for /v1/completions."""
    return {"model": "tiny", "prompt": prompt(start, words), "max_tokens": 6, "temperature": 0} | fields


def chat(start: int = 1, words: int = 20, **fields: Any) -> dict[str, Any]:
    """Make a body for /v1/chat/completions."""
    messages = [{"role": "system", "content": "you are"}, {"role": "user", "content": prompt(start, words)}]
    return {"model": "tiny", "messages": messages, "max_tokens": 6, "temperature": 0} | fields


def without(body: dict[str, Any], *keys: str) -> dict[str, Any]:
    """Leave out some fields of a body."""
    return {key: value for key, value in body.items() if key not in keys}


C, H = "/v1/completions", "/v1/chat/completions"
USAGE = {"include_usage": True}
BATCH = [prompt(5, 30), prompt(6, 35)]

# The tokens of the bytes C3 and A9: together they are é, each alone is no character.
UNFINISHED: dict[str, Any] = {"allowed_token_ids": [132, 107], "return_token_ids": True}
GET_CASES = [
    "/v1/models", "/health", "/ping", "/version", "/load", "/tokenizer_info", "/nothing", "/v1/completions", "/metrics",
    "/server_info", "/is_sleeping", "/docs",
]  # fmt: skip

POST_CASES: list[tuple[str, str, Any]] = [
    ("cmpl_basic", C, completion()),
    ("cmpl_ids", C, completion(prompt=[0, 300, 301, 302, 303])),
    ("cmpl_ids_batch", C, completion(prompt=[[0, 300, 301], [0, 400, 401, 402]])),
    ("cmpl_text_batch", C, completion(prompt=BATCH)),
    ("cmpl_text_batch_stream", C, completion(prompt=BATCH, stream=True, stream_options=USAGE)),
    ("cmpl_stream", C, completion(2, stream=True)),
    ("cmpl_stream_usage", C, completion(2, stream=True, stream_options=USAGE)),
    ("cmpl_stream_continuous", C, completion(2, stream=True, stream_options=USAGE | {"continuous_usage_stats": True})),
    ("cmpl_stream_logprobs", C, completion(2, stream=True, logprobs=2)),
    ("cmpl_stream_echo", C, completion(2, stream=True, echo=True)),
    ("cmpl_stream_echo_logprobs", C, completion(2, 10, stream=True, echo=True, logprobs=1)),
    ("cmpl_stream_return_ids", C, completion(2, 8, stream=True, return_token_ids=True)),
    ("cmpl_return_ids", C, completion(2, 8, return_token_ids=True)),
    ("cmpl_return_ids_echo", C, completion(2, 8, return_token_ids=True, echo=True)),
    ("cmpl_return_ids_echo_logprobs", C, completion(2, 8, return_token_ids=True, echo=True, logprobs=1)),
    ("cmpl_return_ids_echo_stream", C, completion(2, 8, return_token_ids=True, echo=True, stream=True)),
    ("cmpl_unfinished", C, completion(2, 8, max_tokens=24, **UNFINISHED)),
    ("cmpl_unfinished_logprobs", C, completion(2, 8, max_tokens=24, logprobs=1, **UNFINISHED)),
    ("cmpl_unfinished_stream", C, completion(2, 8, max_tokens=24, stream=True, **UNFINISHED)),
    ("cmpl_unfinished_three", C, completion(3, 8, max_tokens=40, stream=True, **UNFINISHED | {"allowed_token_ids": [163, 229, 110]})),
    ("cmpl_unfinished_prompt", C, completion(max_tokens=12, stream=True, **UNFINISHED | {"prompt": [0, 1632, 2535, 909, 132]})),
    ("cmpl_logprobs0", C, completion(2, logprobs=0)),
    ("cmpl_logprobs2", C, completion(2, logprobs=2)),
    ("cmpl_logprobs_seeded", C, completion(2, logprobs=2, temperature=1.0, seed=5)),
    ("cmpl_logprobs_too_many", C, completion(2, logprobs=50)),
    ("cmpl_echo", C, completion(2, 8, echo=True)),
    ("cmpl_echo_logprobs", C, completion(2, 8, echo=True, logprobs=1)),
    ("cmpl_echo_logprobs_mt0", C, completion(2, 8, echo=True, logprobs=1, max_tokens=0)),
    ("cmpl_mt0", C, completion(2, 8, max_tokens=0)),
    ("cmpl_echo_ids_logprobs", C, completion(prompt=[0, 300, 301, 302], echo=True, logprobs=1, max_tokens=1)),
    ("cmpl_prompt_logprobs", C, completion(2, 6, prompt_logprobs=1)),
    ("cmpl_prompt_logprobs0", C, completion(2, 6, prompt_logprobs=0)),
    ("cmpl_prompt_logprobs_stream", C, completion(2, 6, prompt_logprobs=1, stream=True)),
    ("cmpl_n2_seeded", C, completion(3, n=2, temperature=0.8, seed=7)),
    ("cmpl_n2_seeded_stream", C, completion(3, n=2, temperature=0.8, seed=7, stream=True, stream_options=USAGE)),
    ("cmpl_n2_batch_seeded", C, completion(prompt=BATCH, n=2, temperature=0.8, seed=7)),
    ("cmpl_n_greedy", C, completion(3, n=3)),
    ("cmpl_n0", C, completion(3, n=0)),
    ("cmpl_best_of", C, completion(3, best_of=2)),
    ("cmpl_max_tokens_null", C, completion(3, max_tokens=None)),
    ("cmpl_max_tokens_absent", C, without(completion(3), "max_tokens")),
    ("cmpl_max_tokens_negative", C, completion(3, max_tokens=-1)),
    ("cmpl_max_tokens_string", C, completion(3, max_tokens="abc")),
    ("cmpl_max_tokens_float", C, completion(3, max_tokens=1.5)),
    ("cmpl_max_tokens_too_large", C, completion(3, max_tokens=100000)),
    ("cmpl_prompt_too_long", C, completion(prompt=[300] * 2100)),
    ("cmpl_prompt_and_max_tokens_too_long", C, completion(prompt=[300] * 2000, max_tokens=100)),
    ("cmpl_prompt_full", C, completion(prompt=[300] * 2048, max_tokens=1)),
    ("cmpl_prompt_empty", C, completion(prompt="")),
    ("cmpl_prompt_empty_list", C, completion(prompt=[])),
    ("cmpl_prompt_absent", C, without(completion(), "prompt")),
    ("cmpl_prompt_number", C, completion(prompt=5)),
    ("cmpl_prompt_ids_out_of_vocab", C, completion(prompt=[0, 99999])),
    ("cmpl_prompt_ids_negative", C, completion(prompt=[-1])),
    ("cmpl_model_wrong", C, completion(model="other")),
    ("cmpl_model_absent", C, without(completion(), "model")),
    ("cmpl_temperature_negative", C, completion(temperature=-1)),
    ("cmpl_top_p_zero", C, completion(temperature=1, top_p=0)),
    ("cmpl_top_k_bad", C, completion(temperature=1, top_k=-5)),
    ("cmpl_min_tokens", C, completion(4, min_tokens=4)),
    ("cmpl_min_tokens_above", C, completion(4, min_tokens=40)),
    ("cmpl_min_tokens_negative", C, completion(4, min_tokens=-4)),
    ("cmpl_stream_options_alone", C, completion(4, stream_options=USAGE)),
    ("cmpl_stop_list", C, completion(4, stop=["zzz", "yyy"])),
    ("cmpl_stop_empty", C, completion(4, stop=[""])),
    ("cmpl_stop_token_ids", C, completion(4, stop_token_ids=[300])),
    ("cmpl_ignore_eos", C, completion(4, ignore_eos=True)),
    ("cmpl_suffix", C, completion(4, suffix="x")),
    ("cmpl_unknown_field", C, completion(4, unknown_field=1)),
    ("cmpl_user", C, completion(4, user="me")),
    ("cmpl_body_invalid", C, '{"model": "tiny", '),
    ("cmpl_body_list", C, "[1]"),
    ("cmpl_body_empty", C, ""),
    ("cmpl_logit_bias", C, completion(4, logit_bias={"300": 100}, max_tokens=3)),
    ("cmpl_allowed_ids", C, completion(4, allowed_token_ids=[300, 301], max_tokens=3)),
    ("chat_basic", H, chat()),
    ("chat_parts", H, chat(messages=[{"role": "user", "content": [{"type": "text", "text": "hello there"}]}])),
    ("chat_name", H, chat(messages=[{"role": "user", "name": "bob", "content": "hi"}])),
    ("chat_continue", H, chat(messages=[{"role": "user", "content": "hi"}, {"role": "assistant", "content": "the value"}], add_generation_prompt=False, continue_final_message=True)),
    ("chat_echo", H, chat(echo=True)),
    ("chat_stream", H, chat(2, stream=True)),
    ("chat_stream_usage", H, chat(2, stream=True, stream_options=USAGE)),
    ("chat_stream_continuous", H, chat(2, stream=True, stream_options=USAGE | {"continuous_usage_stats": True})),
    ("chat_stream_logprobs", H, chat(2, stream=True, logprobs=True, top_logprobs=2)),
    ("chat_logprobs", H, chat(2, logprobs=True, top_logprobs=2)),
    ("chat_logprobs_no_top", H, chat(2, logprobs=True)),
    ("chat_top_logprobs_alone", H, chat(2, top_logprobs=2)),
    ("chat_prompt_logprobs", H, chat(2, 4, prompt_logprobs=1)),
    ("chat_n2", H, chat(2, n=2, temperature=0.8, seed=7)),
    ("chat_n2_stream", H, chat(2, n=2, temperature=0.8, seed=7, stream=True)),
    ("chat_n_greedy", H, chat(2, n=2)),
    ("chat_max_completion_tokens", H, without(chat(2, max_completion_tokens=5), "max_tokens")),
    ("chat_both_limits", H, chat(2, max_completion_tokens=3)),
    ("chat_return_ids", H, chat(2, 4, return_token_ids=True)),
    ("chat_return_ids_stream", H, chat(2, 4, return_token_ids=True, stream=True)),
    ("chat_unfinished_stream", H, chat(2, 4, max_tokens=24, stream=True, **UNFINISHED)),
    ("chat_unfinished_logprobs", H, chat(2, 4, max_tokens=24, logprobs=True, top_logprobs=1, **UNFINISHED)),
    ("chat_messages_absent", H, without(chat(), "messages")),
    ("chat_messages_empty", H, chat(messages=[])),
    ("chat_messages_bad", H, chat(messages=[{"content": "x"}])),
    ("chat_messages_string", H, chat(messages="hello")),
    ("chat_model_wrong", H, chat(model="other")),
    ("chat_too_long", H, chat(1, 1900)),
    ("chat_min_tokens_above", H, chat(min_tokens=40)),
    ("chat_stream_options_alone", H, chat(stream_options=USAGE)),
    ("chat_tools", H, chat(tools=[{"type": "function", "function": {"name": "f", "parameters": {}}}], tool_choice="auto")),
    ("tokenize", "/tokenize", {"model": "tiny", "prompt": "the quick fox"}),
    ("tokenize_strs", "/tokenize", {"model": "tiny", "prompt": "the quick fox", "return_token_strs": True}),
    ("tokenize_nospecial", "/tokenize", {"prompt": "the quick fox", "add_special_tokens": False}),
    ("tokenize_chat", "/tokenize", {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}),
    ("tokenize_empty", "/tokenize", {}),
    ("detokenize", "/detokenize", {"model": "tiny", "tokens": [0, 300, 301, 302]}),
    ("detokenize_bad", "/detokenize", {"model": "tiny", "tokens": [999999]}),
    ("detokenize_empty", "/detokenize", {"model": "tiny"}),
    ("reset_prefix_cache", "/reset_prefix_cache", ""),
    ("embeddings", "/v1/embeddings", {"model": "tiny", "input": "x"}),
    ("post_models", "/v1/models", {}),
    ("post_nothing", "/v1/nothing", {}),
]  # fmt: skip


def record(client: httpx.Client, name: str, method: str, path: str, body: Any) -> dict[str, Any]:
    """Send one request and keep what came back; the body parsed when it is JSON."""
    headers = {"content-type": "application/json"} if method == "POST" else {}
    content = None if method == "GET" else body if isinstance(body, str) else json.dumps(body)
    answer = client.request(method, path, content=content, headers=headers)
    is_json = answer.headers.get("content-type", "").startswith("application/json")
    return {
        "name": name,
        "request": {"method": method, "path": path, "headers": headers, "body": body},
        "response": {
            "status": answer.status_code,
            "headers": {key: value for key, value in answer.headers.items() if key != "date"},
            "body": answer.json() if is_json and answer.content else answer.text,
        },
    }


def main() -> None:
    """Record every case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", required=True)
    parser.add_argument("--only", default="", help="record the cases whose name contains this")
    parser.add_argument("out", type=pathlib.Path)
    options = parser.parse_args()
    cases = [(path, "GET", path, None) for path in GET_CASES] + [(n, "POST", p, b) for n, p, b in POST_CASES]
    cases = [case for case in cases if options.only in case[0]]
    with httpx.Client(base_url=options.url, timeout=120) as client, options.out.open("w") as out:
        for name, method, path, body in cases:
            entry = record(client, name, method, path, body)
            print(f"{entry['response']['status']} {name}", flush=True)
            out.write(json.dumps(entry) + "\n")


if __name__ == "__main__":
    main()
