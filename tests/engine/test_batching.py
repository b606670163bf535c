"""One engine under load: queues, preemption, stops, faults."""

import json
import socket
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from support.processes import Process, engine, until
from support.requests import COMPLETIONS, WANT_TICKET, completion, prompt


def text_of(answer: httpx.Response) -> str:
    text: str = answer.json()["choices"][0]["text"]
    return text


def refused(url: str) -> bool:
    try:
        httpx.get(url + "/health")
    except httpx.ConnectError:
        return True
    except httpx.HTTPError:
        return False  # still the old connections being reset
    return False


def test_preempted_sequences_end_with_the_text_they_would_have_had_alone() -> None:
    bodies = [completion(prompt(seed, 200), max_tokens=150, ignore_eos=True) for seed in range(8)]
    with engine("both", "--speed", "50") as roomy, engine("both", "--speed", "5", "--num-gpu-blocks", "12") as tight:
        expected = [text_of(roomy.post(COMPLETIONS, body)) for body in bodies]
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda body: text_of(tight.post(COMPLETIONS, body)), bodies))
        assert answers == expected
        page = httpx.get(tight.url + "/metrics").text
        preempted = next(line for line in page.splitlines() if line.startswith("vllm:num_preemptions_total"))
        assert float(preempted.split()[-1]) > 0, "12 blocks are too few for 8 sequences of 350 tokens"


def test_an_engine_with_a_seed_repeats_unseeded_sampling() -> None:
    body = completion("one two three", temperature=1.0, max_tokens=20)
    texts = []
    for _ in range(2):
        with engine("both", "--speed", "50") as started:
            texts.append([text_of(started.post(COMPLETIONS, body)) for _ in range(3)])
    assert texts[0] == texts[1]
    assert len(set(texts[0])) == 3


def test_a_stop_string_ends_the_text_before_it_in_streams_too() -> None:
    with engine("both", "--speed", "50") as started:
        whole = text_of(started.post(COMPLETIONS, completion("one two", max_tokens=40, ignore_eos=True)))
        stop = whole[30:36]
        body = completion("one two", max_tokens=40, ignore_eos=True, stop=stop)
        answer = started.post(COMPLETIONS, body).json()["choices"][0]
        assert answer["text"] == whole[: whole.index(stop)]
        assert (answer["finish_reason"], answer["stop_reason"]) == ("stop", stop)
        kept = started.post(COMPLETIONS, body | {"include_stop_str_in_output": True}).json()["choices"][0]["text"]
        assert kept == whole[: whole.index(stop) + len(stop)]
        with httpx.stream("POST", started.url + COMPLETIONS, json=body | {"stream": True}) as stream:
            events = [json.loads(line[6:]) for line in stream.iter_lines() if line.startswith("data: {")]
        assert "".join(event["choices"][0]["text"] for event in events) == answer["text"]
        assert not any(stop in event["choices"][0]["text"] for event in events)


def test_a_client_that_goes_away_frees_its_sequence() -> None:
    with engine("both") as started:
        body = completion("one two", max_tokens=5000, ignore_eos=True, stream=True)
        with httpx.stream("POST", started.url + COMPLETIONS, json=body) as stream:
            lines = stream.iter_lines()
            next(lines)
            assert started.get("/sim/state")["running"] == 1
        until(lambda: started.get("/sim/state")["running"] == 0, 10, "the sequence is aborted")
        state = started.get("/sim/state")["blocks"]
        assert state["free"] == state["total"]
        with pytest.raises(httpx.ReadTimeout):
            started.post(COMPLETIONS, body | {"stream": False}, timeout=0.5)
        until(lambda: started.get("/sim/state")["running"] == 0, 10, "the sequence is aborted")


def leave_within_a_step(one: Process, body: dict[str, Any]) -> None:
    """Let a slow engine's client leave while a step computes its request; the step ends afterwards."""
    told = json.dumps(body).encode()
    url = httpx.URL(one.url)
    with socket.create_connection((url.host, url.port)) as client:
        client.sendall(b"POST %b HTTP/1.1\r\nhost: x\r\n" % COMPLETIONS.encode())
        client.sendall(b"content-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(told) + told)
        until(lambda: one.get("/sim/state")["running"] == 1, 20, "a step of three seconds has begun")
        one.post("/sim/fault", {"kind": "hang"})
    until(lambda: one.get("/load")["server_load"] == 0, 20, "the engine has seen its client leave")
    assert one.get("/sim/state")["running"] == 1, "the step has not ended"
    one.post("/sim/fault", {"kind": "none"})


def test_a_client_that_goes_away_within_a_step_leaves_no_wrong_blocks_behind() -> None:
    text = prompt(1, 3000)
    with engine("both", "--speed", "0.03") as one, engine("both", "--speed", "50") as other:
        right = text_of(other.post(COMPLETIONS, completion(text)))
        leave_within_a_step(one, completion(text))
        assert text_of(one.post(COMPLETIONS, completion(text), timeout=60)) == right
        state = one.get("/sim/state")["blocks"]
        assert state["free"] == state["total"]


def test_a_prefill_whose_client_leaves_within_its_step_gives_no_ticket() -> None:
    with engine("prefill", "--speed", "0.03") as one:
        leave_within_a_step(one, completion(prompt(1, 3000), max_tokens=1, kv_transfer_params=WANT_TICKET))
        until(lambda: one.get("/sim/state")["running"] == 0, 10, "the sequence is gone")
        assert one.get("/sim/state")["tickets"] == 0
        page = httpx.get(one.url + "/metrics").text
        [row] = [line for line in page.splitlines() if 'finished_reason="abort"' in line and "success_total" in line]
        assert float(row.split()[-1]) == 1


def test_faults_do_what_they_are_called() -> None:
    body = completion("one two", max_tokens=20, ignore_eos=True)
    with engine("both", "--speed", "10") as started:

        def fault(**fields: object) -> None:
            assert started.post("/sim/fault", fields).status_code == 200

        fault(kind="status", code=503, count=2)
        assert [started.post(COMPLETIONS, body).status_code for _ in range(3)] == [503, 503, 200]

        fault(kind="hang")
        with pytest.raises(httpx.ReadTimeout):
            started.post(COMPLETIONS, body, timeout=0.5)
        assert httpx.get(started.url + "/health").status_code == 200
        fault(kind="none")
        assert started.post(COMPLETIONS, body).status_code == 200

        fault(kind="die_mid_stream", after_tokens=3)
        with pytest.raises(httpx.RemoteProtocolError):
            started.post(COMPLETIONS, body | {"stream": True})
        assert started.post(COMPLETIONS, body).status_code == 200

        fault(kind="refuse", seconds=0.5)
        until(lambda: refused(started.url), 5, "connections are refused")
        until(started.ready, 5, "it listens again")

        before = started.post(COMPLETIONS, body).elapsed.total_seconds()
        fault(kind="slow", factor=20)
        assert started.post(COMPLETIONS, body).elapsed.total_seconds() > 5 * before
        assert started.post("/sim/fault", {"kind": "nonsense"}).status_code == 400

        fault(kind="none")
        fault(kind="die_mid_stream", after_tokens=3, exit=True)
        with pytest.raises(httpx.RemoteProtocolError):
            started.post(COMPLETIONS, body | {"stream": True})
        until(lambda: started.process.poll() == 70, 5, "the process ends")


def test_a_sequence_that_hung_in_the_middle_goes_on_at_its_old_pace() -> None:
    body = completion("one two", max_tokens=400, ignore_eos=True)
    with engine("both") as started:
        expected = text_of(started.post(COMPLETIONS, body))
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(started.post, COMPLETIONS, body)
            until(lambda: started.get("/sim/state")["running"] == 1, 5, "it runs")
            started.post("/sim/fault", {"kind": "hang", "seconds": 0.5})
            assert text_of(running.result()) == expected
        steps = started.get("/sim/state")["clock"]["steps"]
        assert 800 <= steps <= 802, "one step a token, before and after"


def test_a_taken_port_is_one_clear_line() -> None:
    with engine("both") as started:
        second = engine("both")
        second.command[second.command.index("--host") + 1] = started.command[started.command.index("--host") + 1]
        second.start()
        assert second.process.wait(20) == 1
        lines = second.output().splitlines()
        second.stop()
        assert len(lines) == 1
        assert "cannot listen on" in lines[0]
        assert "Address already in use" in lines[0]
