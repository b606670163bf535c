"""The flight recorder: what is written of requests, and what is not."""

import json
import random
import sys
from pathlib import Path

import pytest

from pdctl.app import main
from pdrouter.observe.record import Record
from pdrouter.observe.recorder import FILES, Recorder, RecorderError
from pdrouter.openai.features import Prompt
from pdrouter.policies import RoutingKey
from pdsim.virtual.traces import read_trace
from support.processes import engine, new_address, router, start_all, until

WORDS = "the quick brown fox jumps over the lazy dog while nobody looks at it".split()


def text(seed: int, words: int) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=words))


def ended(prompt: str, tokens: int = 0) -> Record:
    record = Record("id", "/v1/completions", generation=True)
    record.asked = Prompt(RoutingKey("key", ""), {"model": "m", "prompt": prompt})
    record.prefill, record.decode = ["http://p:1"], ["http://d:1"]
    record.prompt_tokens, record.completion_tokens = tokens or None, 5
    record.status = 200
    record.first_byte()
    return record


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for path in sorted(folder.glob("*.jsonl")) for line in path.read_text().splitlines()]


def test_equal_beginnings_have_equal_numbers_and_other_recordings_other_ones(tmp_path):
    first, second = (Recorder(tmp_path / name, 10**6) for name in ("a", "b"))
    start = text(1, 1200)
    for recorder in (first, second):
        for prompt in (start, start + text(2, 900), text(3, 1200)):
            recorder.note(ended(prompt), 0.0)
        recorder.close()
    one, longer, other = (told["hash_ids"] for told in lines(tmp_path / "a"))
    whole = len(start) // 2048
    assert longer[:whole] == one[:whole]
    assert not set(longer) & set(other)
    assert not {number for told in lines(tmp_path / "a") for number in told["hash_ids"]} & {
        number for told in lines(tmp_path / "b") for number in told["hash_ids"]
    }


def test_a_recording_is_bounded_and_keeps_the_newest(tmp_path):
    most = 20_000
    recorder = Recorder(tmp_path, most)
    for number in range(1, 500):
        recorder.note(ended(text(number, 20), number), 0.0)
    recorder.close()
    files = sorted(tmp_path.iterdir())
    assert len(files) == FILES
    assert sum(path.stat().st_size for path in files) <= most
    told = [one["input_length"] for one in lines(tmp_path)]
    assert told == list(range(500 - len(told), 500))
    Recorder(tmp_path, most).close()
    assert len(list(tmp_path.iterdir())) == FILES, "what an earlier process left counts too"


def test_a_folder_that_cannot_be_written_is_told_at_the_start(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RecorderError, match="--record-dir"):
        Recorder(tmp_path / "file", 10**6)


def test_the_router_records_lengths_engines_and_outcomes_but_no_text_and_no_key(tmp_path):
    engines = [engine("prefill", "--speed", "20"), engine("decode", "--speed", "20")]
    start_all(engines)
    secret, prompt = "sk-very-secret", text(5, 600)
    try:
        with router(engines[:1], engines[1:], "--record-dir", str(tmp_path)) as front:
            headers = {"authorization": f"Bearer {secret}", "x-user-id": "somebody"}
            for stream in (False, True):
                body = {"model": "tiny", "prompt": prompt, "max_tokens": 7, "ignore_eos": True, "stream": stream}
                assert front.post("/v1/completions", body, headers=headers).status_code == 200
            assert front.post("/v1/completions", {"model": "other", "prompt": "x"}).status_code == 404
            told = until(lambda: len(lines(tmp_path)) == 3 and lines(tmp_path), 10, "three lines")
    finally:
        for one in engines:
            one.stop()
    written = "".join(path.read_text() for path in tmp_path.iterdir())
    for word in (secret, "somebody", "quick", "127.0"):
        assert word not in written
    assert [one["status"] for one in told] == [200, 200, 404]
    for one in told[:2]:
        assert one["output_length"] == 7
        assert (one["prefill"], one["decode"]) == (0, 1)
        assert 0 < one["ttft_ms"] <= one["total_ms"]
    assert told[0]["hash_ids"] == told[1]["hash_ids"]
    (path,) = tmp_path.iterdir()
    workload = read_trace(path)
    assert [one.output for one in workload.requests][:2] == [7, 7]


def test_a_recording_is_stopped_started_and_fetched_over_the_admin_port(tmp_path, monkeypatch, capsys):
    admin, folder, fetched = new_address(), tmp_path / "kept", tmp_path / "trace.jsonl"
    engines = [engine("prefill", "--speed", "20"), engine("decode", "--speed", "20")]
    start_all(engines)

    def pdctl(action: str, *more: str) -> str:
        monkeypatch.setattr(sys, "argv", ["pdctl", "record", action, "--admin", f"http://{admin}:9000", *more])
        with pytest.raises(SystemExit) as ended:
            main()
        assert not ended.value.code
        return capsys.readouterr().out

    flags = ("--record-dir", str(folder), "--admin-host", admin, "--admin-port", "9000")
    body = {"model": "tiny", "prompt": text(5, 600), "max_tokens": 3, "ignore_eos": True}
    try:
        with router(engines[:1], engines[1:], *flags) as front:
            front.post("/v1/completions", body)
            until(lambda: len(lines(folder)) == 1, 10, "a line")
            assert pdctl("stop") == "stopped\n"
            front.post("/v1/completions", body)
            assert pdctl("start") == "recording\n"
            front.post("/v1/completions", body | {"max_tokens": 5})
            until(lambda: len(lines(folder)) == 2, 10, "another line")
            assert pdctl("fetch", "--output", str(fetched)).startswith("2 requests")
    finally:
        for one in engines:
            one.stop()
    assert [one.output for one in read_trace(fetched).requests] == [3, 5]
