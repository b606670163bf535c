"""Evaluations: the real lm_eval, with a task made here, and scores that are none."""

import json
import signal
import threading
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from pdctl.errors import PdctlError
from pdctl.evals import in_cluster, traps
from pdctl.evals.difference import changes
from pdctl.evals.parity import parity
from pdctl.evals.scores import Score, read
from pdctl.runs import Run
from support import stored
from support.processes import until
from support.shell import Shell
from support.tasks import make_tasks

LM_EVAL_SECONDS = 280  # it is installed by the first of these tests, and slow to start


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Shell]:
    made = Shell(tmp_path)
    make_tasks(tmp_path / "tasks")
    yield made
    for process in made.processes():
        process.kill()


def runs_of(shell: Shell) -> Path:
    return shell.state.parent / "data" / "pdctl" / "runs"


@pytest.mark.timeout(600)
def test_scores_come_through_the_fleet_and_are_those_of_one_engine_to_the_last_bit(shell: Shell) -> None:
    assert shell.run("deploy", "--local", "--prefill", "1", "--decode", "1", "--speed", "20", "-y").returncode == 0
    answer = shell.run(
        "eval", "words,words_written", "4", "6", "--include-path", "tasks", "--parity", timeout=LM_EVAL_SECONDS * 2
    )
    assert answer.returncode == 0, answer.stderr
    assert "SIMULATED" in answer.stdout
    assert "parity: exact: 54 prompts" in answer.stdout  # 2 tasks x 6 documents x 4 choices, and 6 texts
    assert "2 tasks: 48 requests" in answer.stderr
    assert "the limit of 6 is of each of the 2 tasks" in answer.stderr
    (folder,) = runs_of(shell).iterdir()
    run = Run(folder)
    assert run.about["requests"] == 54
    scores = {(one.task, one.metric): one for one in read(json.loads((folder / "scores.json").read_text()))}
    assert scores["words_one", "acc"].samples == 6
    assert scores["words", "acc"].group
    answers = list(run.lines("answers.jsonl"))
    # the begin token leads every prompt, and is counted in where the continuation begins
    assert {line["begins"] for line in answers if line["kind"] == "loglikelihood"} == {0}
    assert all(0 < len(line["continuation"]) < len(line["logprobs"]) for line in answers if "continuation" in line)
    (violations,) = {json.dumps(shell.told("routing")["violations"])}
    assert violations == "[]"
    assert (folder / "report.html").exists()


@pytest.mark.timeout(600)
def test_a_killed_evaluation_goes_on_and_asks_nothing_twice(shell: Shell) -> None:
    assert shell.run("deploy", "--local", "--prefill", "1", "--decode", "1", "--speed", "1", "-y").returncode == 0
    running = shell.start("eval", "words_written", "1", "30", "--include-path", "tasks", "--label", "e")
    until(
        lambda: any(path.read_bytes().count(b"\n") >= 5 for path in runs_of(shell).glob("*/answers.jsonl")),
        LM_EVAL_SECONDS, "some were answered",
    )  # fmt: skip
    running.send_signal(signal.SIGKILL)
    running.communicate()
    (folder,) = runs_of(shell).iterdir()
    until(lambda: not [p for p in shell.processes() if "driver.py" in " ".join(p.cmdline())], 20, "lm_eval has ended")
    before = [json.loads(line)["prompt"] for line in (folder / "answers.jsonl").read_text().splitlines()]
    again = shell.run("eval", "--resume", "e", timeout=LM_EVAL_SECONDS)
    assert again.returncode == 0, again.stderr
    assert "were answered before" in again.stderr
    after = [json.loads(line)["prompt"] for line in (folder / "answers.jsonl").read_text().splitlines()]
    assert after[: len(before)] == before
    assert len(set(after)) == 30
    assert len(after) - 30 <= 1, "only what was under way when it was killed may be asked again"
    assert Run(folder).about["requests"] == 30


class Liar(BaseHTTPRequestHandler):
    """An OpenAI server that gets one thing wrong."""

    answer: Any = None

    def do_GET(self) -> None:
        self._send({"data": [{"id": "m", "max_model_len": 2048}], "eos_token": "</s>", "bos_token": "<s>"})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if self.path == "/tokenize":
            self._send({"tokens": [len(word) for word in body["prompt"].split()]})
        else:
            told = type(self).answer(len(body["prompt"][0]))  # lm_eval sends lists of one prompt
            self._send({"choices": [{"index": 0, "text": "x", "logprobs": told}]})

    def _send(self, told: object) -> None:
        content = json.dumps(told).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        pass


def logprobs(values: list[float | None]) -> dict[str, Any]:
    return {"token_logprobs": values, "top_logprobs": [None if value is None else {"x": value} for value in values]}


@pytest.fixture
def liar() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Liar)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.timeout(600)
def test_prefills_and_decodes_answers_put_together_are_an_error_and_no_score(shell: Shell, liar: str) -> None:
    Liar.answer = staticmethod(lambda tokens: logprobs([None, *(-0.1 * n for n in range(2 * tokens - 2))]))
    answer = shell.run(
        "eval", "words_one", "2", "5", "--include-path", "tasks", "--url", liar, "--tokenizer", "served",
        timeout=LM_EVAL_SECONDS,
    )  # fmt: skip
    assert answer.returncode == 1
    assert "prefill's and decode's answers were put together" in answer.stderr
    assert "Traceback" not in answer.stderr
    (folder,) = runs_of(shell).iterdir()
    assert Run(folder).state == "failed"
    assert not (folder / "scores.json").exists()


def driver() -> Any:
    """Give the part of the driver that checks answers, without lm_eval."""
    source = (Path(traps.__file__).parent / "driver.py").read_text()
    begin, end = source.index("class TrapError"), source.index("class Progress")
    names: dict[str, Any] = {"SAME_FROM": 8, "Any": Any, "Sequence": Sequence}
    exec(source[begin:end].replace("tell(", "print("), names)
    return names


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ([-1.0], "ignores `echo`"),
        ([None] + [-0.5] * 10, "all 10 tokens have the log-probability"),
        ([None, None, *(-0.1 * n for n in range(9))], "skipped a cached prefix"),
        ([None, *(-0.1 * n for n in range(18))], "put together"),
        ([None, *(-0.1 * n for n in range(5))], "11 expected"),
        ([None, *(-0.1 * n for n in range(10))], None),
    ],
)
def test_answers_that_cannot_be_right_are_traps(values: list[float | None], why: str | None) -> None:
    names = driver()
    if why is None:
        names["check_logprobs"](logprobs(values), [1] * 10)
    else:
        with pytest.raises(names["TrapError"], match=why):
            names["check_logprobs"](logprobs(values), [1] * 10)


def samples(task: str, count: int, choices: int) -> list[dict[str, Any]]:
    answer = [[-1.0, False]] * choices if choices else ["text"]
    return [{"task": task, "doc_id": n, "arguments": answer, "filtered_resps": answer} for n in range(count)]


@pytest.mark.parametrize(
    ("value", "count", "choices", "doubted"),
    [(0.26, 100, 4, True), (0.45, 100, 4, False), (0.26, 10, 4, False), (0.0, 30, 0, True), (0.1, 30, 0, False)],
)
def test_a_score_that_guessing_would_give_is_doubted(value: float, count: int, choices: int, doubted: bool) -> None:
    score = Score("t", "acc" if choices else "exact_match", "none", value, 0.04, count)
    found = traps.by_chance([score], samples("t", count, choices))
    assert bool(found) is doubted
    assert all("chance level" in text for text in found)


def test_texts_that_are_all_empty_or_the_same_are_doubted() -> None:
    def texts(*all_of: str) -> list[dict[str, Any]]:
        return [{"kind": "generate_until", "text": text} for text in all_of]

    assert traps.of_texts(texts(*[" "] * 6)) == ["all 6 generated texts are empty"]
    assert traps.of_texts(texts(*["42"] * 6)) == ["all 6 generated texts are the same"]
    assert traps.of_texts(texts("1", "2", "1", "1", "1")) == []


def test_parity_lists_every_difference() -> None:
    one = [
        {"prompt": "a", "kind": "generate_until", "text": "the quick fox"},
        {"prompt": "b", "kind": "loglikelihood", "logprobs": [-1.0, -2.0]},
        {"prompt": "c", "kind": "loglikelihood", "logprobs": [-1.0]},
    ]
    other = [
        {"prompt": "a", "kind": "generate_until", "text": "the quick dog"},
        {"prompt": "b", "kind": "loglikelihood", "logprobs": [-1.0, -2.25]},
    ]
    found = parity(one, other)
    assert (found.compared, found.texts_differ, found.logprobs_differ, found.missing) == (2, 1, 1, 1)
    assert found.largest == 0.25
    assert not found.exact
    assert any("at character 10" in text for text in found.examples)
    assert any("token 2 of 2" in text for text in found.examples)
    assert parity(one, one).exact
    assert not parity([], []).exact


def test_the_job_has_the_engines_security_and_their_token_by_its_secret_only(tmp_path: Path) -> None:
    token = {"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "hub", "key": "HF_TOKEN"}}}
    secure = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    engine = {
        "name": "vllm", "image": "vllm:1", "securityContext": secure, "resources": {"limits": {"nvidia.com/gpu": 1}},
        "env": [{"name": "SECRET", "value": "of the engine"}, token],
    }  # fmt: skip
    template = {
        "spec": {"containers": [engine], "securityContext": {"runAsNonRoot": True}, "tolerations": [{"key": "g"}]}
    }
    make_tasks(tmp_path / "tasks")
    texts = in_cluster.shipped({"tasks": ["words"]}, tmp_path / "tasks")
    config_map, job = in_cluster.objects("20260101-120000-My_Eval.2", "vllm:1", template, texts)
    assert config_map["metadata"]["name"] == job["metadata"]["name"] == "pdctl-20260101-120000-my-eval-2"
    pod = job["spec"]["template"]["spec"]
    [container] = pod["containers"]
    assert [one for one in container["env"] if "value" not in one] == [token]
    assert "of the engine" not in json.dumps(job)
    assert "nvidia.com/gpu" not in json.dumps(job), "it needs no GPU"
    assert container["securityContext"] == secure
    assert (pod["securityContext"], pod["tolerations"]) == ({"runAsNonRoot": True}, [{"key": "g"}])
    paths = {one["path"]: config_map["data"][one["key"]] for one in pod["volumes"][0]["configMap"]["items"]}
    assert paths["tasks/group.yaml"] == (tmp_path / "tasks/group.yaml").read_text()
    (tmp_path / "tasks/large.json").write_text(" " * 2**20)
    with pytest.raises(PdctlError, match="too large for a ConfigMap"):
        in_cluster.shipped({}, tmp_path / "tasks")


def test_two_evaluations_are_compared_document_by_document(tmp_path: Path) -> None:
    base = stored.evaluation(tmp_path / "a", "0" * 20 + "1" * 20)
    better, same = stored.evaluation(tmp_path / "b", "1" * 30 + "1" * 10), stored.evaluation(tmp_path / "c", "01" * 20)
    [one] = changes(base, better)
    # by hand: 20 of 40 documents gain 1, the others nothing: sqrt(0.25 * 40 / 39 / 40)
    assert (one.change, one.samples, one.changed, one.verdict) == (0.5, 40, 20, "better")
    assert one.stderr == pytest.approx(0.080064, abs=1e-6)
    [back] = changes(better, base)
    assert back.verdict == "worse"
    [none] = changes(base, same)
    assert (none.change, none.changed, none.verdict) == (0.0, 20, "within noise")
    (tmp_path / "b/samples.jsonl").unlink()
    [apart] = changes(base, better)
    assert apart.stderr == pytest.approx(0.080064, abs=1e-6), "of the base alone: all answers of the other are right"
    assert apart.samples is None


def test_evaluations_of_other_documents_are_refused(shell: Shell) -> None:
    for label, limit in (("a", 50), ("b", 50), ("c", 100)):
        stored.evaluation(runs_of(shell) / f"20260101-000000-{label}", limit=limit)
    refused = shell.run("compare", "a", "c")
    assert refused.returncode == 2
    assert "limit: 50 and 100" in refused.stderr
    told = shell.run("compare", "a", "b")
    assert "0.2000  0.2000  +0.0000 ± 0.0000" in told.stdout, told.stdout + told.stderr
    assert "within noise" in told.stdout
