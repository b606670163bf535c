"""One measurement each: a figure of one candidate, in one short run."""

import re
import subprocess
import time
import urllib.request
from pathlib import Path

from peers import BUILD, DECODE, LOAD_CORE, PREFILL, Program

PROMPT = "Once upon a time there was a router that never lost a request, and"
COMPLETION = '{"model":"llama31","prompt":"%s","max_tokens":16,"stream":%s}'


class FailedError(Exception):
    """Requests failed while being measured, so there is no figure."""


def _script(stream: bool) -> Path:
    """Write what wrk sends: every prompt is another, so that nothing is found in a cache that would not be there."""
    body = COMPLETION % (PROMPT + " %d", "true" if stream else "false")
    path = BUILD / f"post-{'stream' if stream else 'whole'}.lua"
    path.write_text(
        f"""local number, body = 0, '{body}'
wrk.method = 'POST'
wrk.headers['Content-Type'] = 'application/json'
request = function()
  number = number + 1
  return wrk.format(nil, nil, nil, string.format(body, number))
end
""",
        encoding="utf-8",
    )
    return path


def _wrk(port: int, connections: int, seconds: float, stream: bool) -> str:
    command = ["taskset", "-c", LOAD_CORE, "wrk", "-t1", f"-c{connections}", f"-d{seconds:g}s", "--timeout", "60s"]
    command += ["-s", str(_script(stream)), f"http://127.0.0.1:{port}/v1/completions"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def requests(candidate: Program, stream: bool, seconds: float = 3.0) -> dict[str, float]:
    """CPU microseconds for a request, and requests a second, with 64 requests at once."""
    before = candidate.cpu_seconds()
    told = _wrk(candidate.port, 64, seconds, stream)
    spent = candidate.cpu_seconds() - before
    if "Non-2xx" in told or "Socket errors" in told:
        raise FailedError(f"{candidate.label}: {told}")
    found = re.search(r"(\d+) requests in ([\d.]+)s", told)
    assert found is not None, told
    return {"cpu_us": spent / int(found[1]) * 1e6, "per_second": int(found[1]) / float(found[2])}


def _sent() -> int:
    with urllib.request.urlopen(f"http://127.0.0.1:{DECODE}/count") as answer:
        return int(answer.read())


def tokens(candidate: Program, streams: int = 512, seconds: float = 6.0) -> dict[str, float]:
    """CPU microseconds for a relayed token with `streams` live ones, and resident memory while they live."""
    command = ["taskset", "-c", LOAD_CORE, "wrk", "-t1", f"-c{streams}", f"-d{seconds + 3:g}s", "--timeout", "60s"]
    command += ["-s", str(_script(True)), f"http://127.0.0.1:{candidate.port}/v1/completions"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as load:
        time.sleep(2)  # all streams are open by then: a stream lasts longer than the measurement
        cpu, sent = candidate.cpu_seconds(), _sent()
        time.sleep(seconds - 1)
        cpu, sent = candidate.cpu_seconds() - cpu, _sent() - sent
        memory = candidate.resident_mib()
        load.wait()
    if sent < streams * 10:
        raise FailedError(f"{candidate.label}: only {sent} tokens were relayed")
    return {"cpu_us": cpu / sent * 1e6, "per_second": sent / (seconds - 1), "mib": memory}


def latency(ports: tuple[int, ...], slots: int, body: Path, seconds: float = 2.0) -> dict[str, float]:
    """Median and 99th percentile, microseconds, of a request (one port) or of the two steps (prefill, decode)."""
    command = ["taskset", "-c", LOAD_CORE, str(BUILD / "steps"), str(slots), f"{seconds:g}", str(body)]
    told = subprocess.run([*command, *map(str, ports)], capture_output=True, text=True, check=True).stdout
    count, failures, p50, p99 = told.split()
    if int(failures) or int(count) < 20:
        raise FailedError(f"{ports}: {told}")
    return {"p50_us": float(p50), "p99_us": float(p99)}


def bodies() -> tuple[Path, Path]:
    """Write a small request and one of 400 KB; give their files."""
    small, large = BUILD / "small.json", BUILD / "large.json"
    small.write_text(COMPLETION % (PROMPT, "false"), encoding="utf-8")
    large.write_text(COMPLETION % ("word and " * 45000, "false"), encoding="utf-8")
    return small, large


def idle(candidate: Program, seconds: float = 8.0) -> float:
    """Share of a core, percent, that a router uses without requests."""
    before = candidate.cpu_seconds()
    time.sleep(seconds)
    return (candidate.cpu_seconds() - before) / seconds * 100


DIRECT = (PREFILL, DECODE)
