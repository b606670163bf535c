"""The real `vllm bench serve`, where an installation of vLLM is given: its arguments, and what it measured."""

import os
import shutil
import subprocess
import tempfile
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import orjson

from pdctl.bench.measure import Progress
from pdctl.bench.slo import Slo
from pdctl.bench.workload import Workload
from pdctl.errors import ExitCode, PdctlError
from pdctl.runs.run import Run
from pdctl.runs.setting import Place

VARIABLE = "PDCTL_VLLM"
_ERROR_LINES = 12


def program() -> str:
    """Find vLLM's program: `$PDCTL_VLLM`, else `vllm` on PATH.

    Raises:
        PdctlError: there is none.
    """
    found = os.environ.get(VARIABLE) or shutil.which("vllm")
    if not found or not Path(found).exists():
        raise PdctlError(
            f"{found or 'vllm'} is not installed",
            f"install vLLM and put it on PATH, or name its program by {VARIABLE}; or use --client pdctl",
            ExitCode.PREFLIGHT,
        )
    return found


def arguments(workload: Workload, url: str, model: str, tokenizer: str, slos: list[Slo], seed: int) -> list[str]:
    """Give the arguments of `vllm bench serve` for a workload, without the program and where the result goes.

    Raises:
        PdctlError: it cannot send such a workload.
    """
    if workload.data != "random" or workload.abort_share:
        raise PdctlError(
            "vllm bench serve has no such conversations, traces or aborts",
            "use --client pdctl for them",
            ExitCode.USAGE,
        )
    made = [
        "bench", "serve", "--backend", "openai", "--base-url", url, "--endpoint", "/v1/completions", "--model", model,
        "--tokenizer", tokenizer, "--dataset-name", "random", "--num-prompts", str(workload.num_prompts),
        "--random-input-len", str(workload.input_len - workload.shared_prefix),
        "--random-prefix-len", str(workload.shared_prefix), "--random-output-len", str(workload.output_len),
        "--random-range-ratio", "0", "--seed", str(seed), "--ignore-eos", "--temperature", "0",
        "--burstiness", f"{workload.burstiness:g}", "--num-warmups", str(workload.warmup),
        "--percentile-metrics", "ttft,tpot,itl,e2el",
    ]  # fmt: skip
    if workload.concurrency is not None:
        made += ["--max-concurrency", str(workload.concurrency)]
    if workload.rate is not None:
        made += ["--request-rate", f"{workload.rate:g}"]
    if workload.ramp is not None:
        ramp = workload.ramp
        made += ["--ramp-up-strategy", ramp.strategy, "--ramp-up-start-rps", f"{ramp.start:g}"]
        made += ["--ramp-up-end-rps", f"{ramp.end:g}"]
    known = [f"{slo.metric}:{slo.milliseconds:g}" for slo in slos if slo.metric != "itl"]
    return made + (["--goodput", *known] if known else [])


def measure(
    run: Run, workload: Workload, place: Place, repeat: int, tokenizer: str | None, on_progress: Progress
) -> dict[str, Any]:
    """Run `vllm bench serve` once and write its result, with what it tells of each request, into the run's folder.

    Raises:
        PdctlError: it is not installed, or failed.
    """
    vllm = program()
    with tempfile.TemporaryDirectory() as folder, as_file(files("pdsim.engine") / "tokenizer") as simulated:
        named = tokenizer or (str(simulated) if place.simulated else place.model)
        command = [vllm, *arguments(workload, place.url, place.model, named, run.slos, workload.seed)]
        command += ["--save-result", "--save-detailed", "--result-dir", folder, "--result-filename", "result.json"]
        run.note(client_command=command)
        log = run.folder / f"vllm-{repeat}.log"
        with log.open("wb") as file:
            status = subprocess.run(
                command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, check=False,
                env=os.environ | {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"},
            ).returncode  # fmt: skip
        path = Path(folder) / "result.json"
        if status or not path.exists():
            raise PdctlError(
                f"vllm bench serve ended with status {status}", f"see the whole log: {log}",
                evidence=log.read_text(errors="replace").splitlines()[-_ERROR_LINES:],
            )  # fmt: skip
        told: dict[str, Any] = orjson.loads(path.read_bytes())
    _keep_requests(run, told, repeat)
    for name in ("input_lens", "output_lens", "ttfts", "itls", "start_times", "generated_texts", "errors"):
        told.pop(name, None)
    extra = {"partial": False, "repeat": repeat, "client": "vllm", "slos": {}, "aborted": 0, "errors": {}}
    told |= {"num_gpus": place.gpus, "simulated": place.simulated, "pdctl": extra}
    on_progress(told["completed"] + told["failed"], told["failed"])
    run.keep(repeat, told)
    return told


def _keep_requests(run: Run, told: dict[str, Any], repeat: int) -> None:
    begin = min(told["start_times"], default=0.0)
    with (run.folder / "requests.jsonl").open("ab") as file:
        for number, start in enumerate(told["start_times"]):
            line = {
                "repeat": repeat, "number": number, "start": start - begin, "ttft": told["ttfts"][number],
                "itls": told["itls"][number], "latency": told["latencies"][number],
                "prompt_tokens": told["input_lens"][number], "output_tokens": told["output_lens"][number],
                "error": told["errors"][number], "queued": told["queue_times"][number],
            }  # fmt: skip
            file.write(orjson.dumps(line) + b"\n")
