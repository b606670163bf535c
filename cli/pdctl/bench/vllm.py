"""The real `vllm bench serve`: its arguments, and what it measured.

Here it is an installation of vLLM; in a cluster it runs within an engine's pod (`in_pod`).
"""

import os
import shutil
import subprocess
import tempfile
from collections import Counter
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import orjson

from pdctl.bench.measure import Progress, forget
from pdctl.bench.slo import meeting
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


def arguments(workload: Workload, url: str, model: str, tokenizer: str, seed: int) -> list[str]:
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
    return made


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
        asked = arguments(workload, place.url, place.model, named, workload.seed + repeat)
        command = [vllm, *asked, *saving(folder, "result.json")]
        run.note(client_command=command)
        log = run.folder / f"vllm-{repeat}.log"
        with log.open("wb") as file:
            status = subprocess.run(
                command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, check=False,
                env=os.environ | {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"},
            ).returncode  # fmt: skip
        path = Path(folder) / "result.json"
        if status or not path.exists():
            raise failed(status, log)
        told = keep(run, repeat, path)
    on_progress(told["completed"] + told["failed"], told["failed"])
    return told


def saving(folder: str, name: str) -> list[str]:
    """Give the arguments that say where the result goes, each request with it."""
    return ["--save-result", "--save-detailed", "--result-dir", folder, "--result-filename", name]


class FailedError(PdctlError):
    """It ended with a bad exit status."""


def failed(status: int, log: Path) -> FailedError:
    """Say that it failed, with the end of its log."""
    lines = log.read_text(errors="replace").replace("\r", "\n").splitlines()
    shown = [line for line in lines if line.strip()][-_ERROR_LINES:]
    return FailedError(f"vllm bench serve ended with status {status}", f"see the whole log: {log}", evidence=shown)


def keep(run: Run, repeat: int, path: Path) -> dict[str, Any]:
    """Check the result that it saved, and write it into the run's folder.

    Raises:
        PdctlError: it is not whole.
    """
    try:
        told: dict[str, Any] = orjson.loads(path.read_bytes())
        ended = told["completed"] + told["failed"]
        forget(run.folder / "requests.jsonl", repeat)
        _keep_requests(run, told, repeat)
    except (orjson.JSONDecodeError, LookupError, TypeError) as error:
        raise PdctlError(
            f"the result of vllm bench serve cannot be read: {type(error).__name__}: {error}", f"look at {path}"
        ) from None
    if ended != run.workload.num_prompts:
        raise PdctlError(
            f"vllm bench serve counts {ended} of {run.workload.num_prompts} requests", f"see its log in {run.folder}"
        )
    reasons = Counter(error.strip().splitlines()[-1] for error in told["errors"] if error.strip())
    for name in ("input_lens", "output_lens", "ttfts", "itls", "start_times", "generated_texts", "errors"):
        told.pop(name, None)
    extra = {"partial": False, "repeat": repeat, "client": "vllm", "aborted": 0, "errors": dict(reasons)}
    extra["slos"] = {slo.metric: slo.milliseconds for slo in run.slos}
    if run.slos:  # counted here, as for our own load: vLLM has no objective of the gaps between tokens
        good = meeting(run.records(repeat), run.slos)
        extra["slo_attainment"] = good / ended
        told["request_goodput"] = good / told["duration"]
    told |= {"num_gpus": run.about["fleet"]["gpus"], "simulated": run.simulated, "pdctl": extra}
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
