"""Measuring real engines through the router: lm_eval's answers are those of one engine, and the load is served."""

import json
from pathlib import Path

import pytest

from engines.real import STARTS, Engines, Installation
from pdctl.runs import Run
from support.processes import router
from support.shell import Shell
from support.tasks import make_tasks

pytestmark = pytest.mark.timeout(STARTS + 900)


def runs_of(shell: Shell) -> Path:
    return shell.state.parent / "data" / "pdctl" / "runs"


def test_lm_eval_gets_the_same_through_prefill_and_decode_as_from_one_engine(
    engines: Engines, installation: Installation, tmp_path: Path
) -> None:
    shell = Shell(tmp_path)
    make_tasks(tmp_path / "tasks", documents=8)
    with router([engines.prefill], engines.decodes[:1], "--request-timeout-secs", "200") as routed:
        answer = shell.run(
            "eval", "words,words_written", "1", "4", "--include-path", "tasks", "--url", routed.url,
            "--tokenizer", str(installation.folder / "model"), "--parity", "--against", engines.plain.url, timeout=600,
        )  # fmt: skip
    # a random model guesses: too few samples to hold that against it here
    assert answer.returncode == 0, answer.stderr
    assert "parity: exact: 36 prompts" in answer.stdout
    (folder,) = runs_of(shell).iterdir()
    run = Run(folder)
    assert run.simulated is False
    begins = {line["begins"] for line in run.lines("answers.jsonl") if line["kind"] == "loglikelihood"}
    config = json.loads((installation.folder / "model" / "config.json").read_text())
    assert begins == {config["bos_token_id"]}


@pytest.mark.parametrize("client", ["pdctl", "vllm"])
def test_both_load_generators_measure_real_engines(
    engines: Engines, installation: Installation, tmp_path: Path, client: str
) -> None:
    shell = Shell(tmp_path)
    with router([engines.prefill], engines.decodes[:1], "--request-timeout-secs", "200") as routed:
        answer = shell.run(
            "bench", "6", "2", "--input-len", "100", "--output-len", "8", "--url", routed.url, "--client", client,
            "--tokenizer", str(installation.folder / "model"), "--json", timeout=600,
            environment={"PDCTL_VLLM": str(installation.folder / "venv/bin/vllm")},
        )  # fmt: skip
    assert answer.returncode == 0, answer.stderr
    told = json.loads(answer.stdout)
    assert (told["completed"], told["failed"], told["simulated"]) == (6, 0, False)
    assert (told["total_input_tokens"], told["total_output_tokens"]) == (600, 48)
    (folder,) = runs_of(shell).iterdir()
    records = Run(folder).records()
    assert len(records) == 6
    assert all(len(record.itls) == 7 and record.ttft > 0 for record in records)
