"""The simulated engine answers every request that was recorded from real vLLM in the same shape."""

import json
import pathlib
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from support.processes import Process, engine
from support.requests import WANT_TICKET
from wire.shape import by_choice, differences, events

CAPTURES = pathlib.Path(__file__).parent / "captures"

PLAIN = {entry["name"]: entry for entry in map(json.loads, (CAPTURES / "plain.jsonl").read_text().splitlines())}
PAIRS = {entry["name"]: entry for entry in map(json.loads, (CAPTURES / "pd.jsonl").read_text().splitlines())}
# what an answer cannot have in common with the recorded one, with the reason
OTHER_SENTENCE = {"chat_messages_bad"}  # vLLM lists one complaint for each of its eleven message classes
ENDS_ELSEWHERE = {
    "m_chat_stop",  # their stop strings stand in the recorded text, not in ours
    "m_cmpl_stop",
    "n3_chat_3_step2",  # ours draws the end of the sequence early
}


@pytest.fixture(scope="module")
def plain() -> Iterator[Process]:
    with engine("both", "--max-model-len", "2048", "--speed", "20") as started:
        yield started


@pytest.fixture(scope="module")
def pair() -> Iterator[tuple[Process, Process]]:
    with (
        engine("prefill", "--max-model-len", "2048", "--speed", "20") as prefill,
        engine("decode", "--max-model-len", "2048", "--speed", "20") as decode,
    ):
        yield prefill, decode


def send(process: Process, request: dict[str, Any]) -> httpx.Response:
    body = request.get("body")
    content = None if body is None else body if isinstance(body, str) else json.dumps(body)
    headers = dict(request.get("headers") or {})
    return httpx.request(request["method"], process.url + request["path"], content=content, headers=headers, timeout=60)


def compare(name: str, recorded: dict[str, Any], answer: httpx.Response) -> list[str]:
    """List what differs between a recorded answer and ours."""
    found = []
    if recorded["status"] != answer.status_code:
        return [f"status {recorded['status']} became {answer.status_code}: {answer.text[:300]}"]
    for header in ("content-type", "server", "vary", "allow"):
        if recorded["headers"].get(header) != answer.headers.get(header):
            found.append(f"header {header}: {recorded['headers'].get(header)} became {answer.headers.get(header)}")
    if name in OTHER_SENTENCE:
        return found
    body = recorded["body"]
    if not isinstance(body, str):
        found += differences(body, answer.json() if answer.content else "")
        ending = ("finish_reason", "stop_reason", "total_tokens", "completion_tokens")
        return [line for line in found if not (name in ENDS_ELSEWHERE and line.split(":")[0].endswith(ending))]
    if not body.startswith("data: "):
        return found + ([] if body == answer.text else [f"body {body[:100]!r} became {answer.text[:100]!r}"])
    real, ours = by_choice(events(body)), by_choice(events(answer.text))
    if list(real) != list(ours):
        return [*found, f"choices {list(real)} became {list(ours)}"]
    for choice, messages in real.items():
        # either may put several tokens into one chunk: the first and the last tell the shape
        mine = ours[choice]
        found += differences(messages[0], mine[0]) + differences(messages[-1], mine[-1])
    return found


@pytest.mark.parametrize("name", [name for name in PLAIN if name != "/metrics"])
def test_a_plain_engine_answers_in_the_shape_of_real_vllm(plain: Process, name: str) -> None:
    entry = PLAIN[name]
    found = compare(name, entry["response"], send(plain, entry["request"]))
    assert [line for line in found if not line.startswith((".data[0].root", ".name_or_path"))] == []  # a folder


def names(page: str, prefix: str) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Give type and label names of each metric family of a Prometheus page."""
    told = {}
    for family in text_string_to_metric_families(page):
        labels = {label for sample in family.samples for label in sample.labels if label != "le"}
        if family.name.startswith(prefix) and not family.name.endswith("_created"):
            told[family.name] = (family.type, tuple(sorted(labels)))
    return told


def test_the_metrics_page_has_vllms_names_types_and_labels(plain: Process) -> None:
    real = names(PLAIN["/metrics"]["response"]["body"], "vllm:")
    ours = names(httpx.get(plain.url + "/metrics").text, "vllm:")
    # not simulated: an estimate of FLOPs, images, admission control
    left_out = {name for name in real if name.startswith(("vllm:estimated_", "vllm:mm_", "vllm:admission_"))}
    info = "vllm:cache_config_info"
    assert {name: real[name] for name in real if name not in left_out | {info}} == {
        name: ours[name] for name in ours if not name.startswith(("vllm:nixl", "vllm:cache_config"))
    }
    assert {"vllm:nixl_bytes_transferred", "vllm:nixl_xfer_time_seconds", "vllm:nixl_num_kv_expired_reqs"} <= set(ours)


HAND_DRIVEN = sorted(
    name.removesuffix("_step1")
    for name in PAIRS
    if name.endswith("_step1") and f"{name.removesuffix('_step1')}_step2" in PAIRS
)


@pytest.mark.parametrize("name", HAND_DRIVEN)
def test_a_pair_driven_by_hand_answers_in_the_shape_of_a_real_pair(pair: tuple[Process, Process], name: str) -> None:
    first, second = PAIRS[f"{name}_step1"], PAIRS[f"{name}_step2"]
    assert first["request"]["body"]["kv_transfer_params"] == WANT_TICKET
    answer = send(pair[0], first["request"])
    assert compare(name, first["response"], answer) == []
    request = second["request"]
    if answer.status_code == 200 and "kv_transfer_params" in request["body"]:
        ticket = answer.json()["kv_transfer_params"]
        request = request | {"body": request["body"] | {"kv_transfer_params": ticket}}
    assert compare(name, second["response"], send(pair[1], request)) == []


ALONE = sorted(name for name in PAIRS if name.endswith("_plain") or name.startswith(("dprank_", "plain_")))


@pytest.mark.parametrize("name", ALONE)
def test_one_engine_alone_answers_earlier_records_in_their_shape(plain: Process, name: str) -> None:
    entry = PAIRS[name]
    ends = f"{name.removesuffix('_plain')}"
    assert compare(ends, entry["response"], send(plain, entry["request"])) == []


DECODES = {
    "fail_bogus_reqid": "text as if computed here: the blocks are read by their ids",
    "wrong_ktp_step2": "another prompt's ticket",
    "failpol_expired": "an expired ticket",
    "recompute_dead_port": "nobody at the ticket's port",
    "batch2_corrupt_step2": "one ticket for two prompts",
    "n3_cmpl_3_step2": "three choices of one ticket",
    "n3_chat_3_step2": "three choices of one ticket",
}


@pytest.mark.parametrize("name", DECODES)
def test_a_decode_leg_that_went_wrong_in_silence_looks_like_a_right_one(
    pair: tuple[Process, Process], name: str
) -> None:
    """Real vLLM answered each of these with status 200; with a ticket of this fleet so do we."""
    entry = PAIRS[name]
    body = entry["request"]["body"]
    first = {**body, "max_tokens": 1, "n": 1, "kv_transfer_params": WANT_TICKET}
    answer = send(pair[0], entry["request"] | {"body": first})
    ticket = answer.json()["kv_transfer_params"]
    if name == "recompute_dead_port":
        ticket |= {"remote_port": 5999}
    elif name == "fail_bogus_reqid":
        ticket |= {"remote_request_id": "cmpl-does-not-exist-0"}
    request = entry["request"] | {"body": body | {"kv_transfer_params": ticket}}
    assert compare(name, entry["response"], send(pair[1], request)) == []
