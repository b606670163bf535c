"""What is measured: our router compiled, vllm-router, nginx; and the stand-in engines behind them."""

import os
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from string import Template
from types import TracebackType

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
BUILD = ROOT / ".build" / "bench"
NGINX = Template(HERE.with_name("nginx.conf").read_text(encoding="utf-8"))
VLLM_ROUTER = "0.1.17"
# Where there are cores enough the load gets two of its own; neighbours, often two threads of one core, stay unused.
ROUTER_CORE, LOAD_CORE = "0", "4,6" if (os.cpu_count() or 1) >= 8 else "1"
PREFILL, DECODE = 9100, 9200
ENGINES = 2  # of each role: enough to spread, few enough to be cheap


class NotPossibleError(Exception):
    """The measurement cannot run here; the message says what is missing."""


def _package(program: str, package: str) -> None:
    if shutil.which(program) or Path(f"/usr/sbin/{program}").exists():
        return
    print(f"bench-router: installing {package} with the system's package manager")
    for command in (["apt-get", "install", "-y", package], ["dnf", "install", "-y", package]):
        if shutil.which(command[0]) is None:
            continue
        if command[0] == "apt-get":
            subprocess.run(["apt-get", "update"], capture_output=True, check=False)
        if subprocess.run(command, capture_output=True, check=False).returncode == 0:
            return
    raise NotPossibleError(f"{program} is missing and could not be installed; install {package} and run this again")


def _vllm_router() -> str:
    """Install vllm-router if need be; give its program's path."""
    script = ["bash", str(ROOT / "scripts" / "peer.sh"), "vllm-router", VLLM_ROUTER]
    return subprocess.run(script, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def prepare() -> None:
    """Install and build what is missing.

    Raises:
        NotPossibleError: something is missing that cannot be installed from here.
    """
    _package("wrk", "wrk")
    _package("nginx", "nginx-light")
    for tool in ("taskset", "cc"):
        if shutil.which(tool) is None:
            raise NotPossibleError(f"{tool} is missing; install util-linux and a C compiler")
    BUILD.mkdir(parents=True, exist_ok=True)
    subprocess.run(["bash", str(ROOT / "scripts" / "compiled_router.sh")], check=True)
    _vllm_router()
    for name in ("engines", "steps"):
        program = BUILD / name
        if not program.exists() or program.stat().st_mtime < (HERE / f"{name}.c").stat().st_mtime:
            subprocess.run(["cc", "-O2", "-o", str(program), str(HERE / f"{name}.c")], check=True)


class Program(AbstractContextManager["Program"]):
    """A process pinned to one core, ended when the block ends."""

    def __init__(self, core: str, command: Sequence[str], port: int, label: str, ready: str | None = None) -> None:
        """Start it and wait until it listens, and until the path `ready` answers 200 where one is given."""
        self.port = port
        self.label = label
        self._ready = ready
        self._log = (BUILD / f"{label}.log").open("wb")
        self._process = subprocess.Popen(
            ["taskset", "-c", core, *command], stdout=self._log, stderr=self._log, start_new_session=True
        )
        self._wait()

    def _wait(self) -> None:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                break
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0 and self._answers():
                    return
            time.sleep(0.05)
        self.stop()
        raise NotPossibleError(f"{self.label} did not start; see {BUILD / f'{self.label}.log'}")

    def _answers(self) -> bool:
        if self._ready is None:
            return True
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{self._ready}", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """End it and everything it started."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(self._process.pid, 9)
                self._process.wait()
        self._log.close()

    def _family(self) -> list[int]:
        found, tasks = [self._process.pid], [self._process.pid]
        while tasks:
            children = Path(f"/proc/{tasks[0]}/task/{tasks[0]}/children").read_text(encoding="ascii").split()
            tasks = tasks[1:] + [int(child) for child in children]
            found += [int(child) for child in children]
        return found

    def cpu_seconds(self) -> float:
        """CPU time of the process and its children so far (/proc/PID/stat, user and system)."""
        total = 0
        for pid in self._family():
            fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
            total += int(fields[11]) + int(fields[12])
        return total / os.sysconf("SC_CLK_TCK")

    def resident_mib(self) -> float:
        """Resident memory of the process and its children."""
        total = 0
        for pid in self._family():
            for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines():
                if line.startswith("VmRSS:"):
                    total += int(line.split()[1])
        return total / 1024


def engines(chunks: int, tick_ms: int, count: int = ENGINES, metrics: Path | None = None) -> Program:
    """Start stand-in engines, `count` of each role."""
    page = metrics or Path("/dev/null")
    command = [str(BUILD / "engines"), str(PREFILL), str(count), str(DECODE), str(count), str(chunks), str(tick_ms)]
    return Program(LOAD_CORE, [*command, str(page)], DECODE + count - 1, "engines")


def _pairs(count: int) -> list[str]:
    flags = []
    for number in range(count):
        flags += [
            "--prefill",
            f"http://127.0.0.1:{PREFILL + number}",
            "--decode",
            f"http://127.0.0.1:{DECODE + number}",
        ]
    return flags


def ours(
    *flags: str, count: int = ENGINES, port: int = 9301, core: str = ROUTER_CORE, label: str = "pd-router"
) -> Program:
    """Start our router, compiled, with its default settings: metrics, request log and health checks on."""
    command = [str(ROOT / ".build/router/venv/bin/pd-router"), *_pairs(count)]
    return Program(
        core, [*command, "--port", str(port), "--prometheus-port", str(port + 500), *flags], port, label, "/ready"
    )


def vllm_router(port: int = 9303) -> Program:
    """Start vllm-router with its metrics on and its request log off, as its own benchmarks run it."""
    command = [
        _vllm_router(), "--vllm-pd-disaggregation", *_pairs(ENGINES),
        "--policy", "consistent_hash", "--intra-node-data-parallel-size", "1", "--host", "127.0.0.1",
        "--port", str(port), "--prometheus-port", str(port + 500), "--log-level", "error",
    ]  # fmt: skip
    return Program(ROUTER_CORE, command, port, "vllm-router")


def nginx(port: int = 9305) -> Program:
    """Start nginx as a plain proxy to decode: one hop, no second leg, nothing parsed."""
    servers = "".join(f"server 127.0.0.1:{DECODE + number};" for number in range(ENGINES))
    config = BUILD / "nginx.conf"
    config.write_text(NGINX.substitute(folder=BUILD, servers=servers, port=port), encoding="utf-8")
    program = shutil.which("nginx") or "/usr/sbin/nginx"
    return Program(ROUTER_CORE, [program, "-c", str(config)], port, "nginx")


@dataclass(frozen=True)
class Machine:
    """Where the figures come from."""

    cpu: str
    cores: int
    kernel: str
    versions: dict[str, str]


def machine() -> Machine:
    """Read what the report names."""

    def told(*command: str) -> str:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return (done.stdout + done.stderr).strip().splitlines()[0]

    model = next(
        (line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
         if line.startswith("model name")), "unknown",
    )  # fmt: skip
    versions = {
        "python": told(str(ROOT / ".build/router/venv/bin/python"), "-V").removeprefix("Python "),
        "vllm-router": VLLM_ROUTER,
        "nginx": told(shutil.which("nginx") or "/usr/sbin/nginx", "-v").rpartition("/")[2],
        "wrk": told("wrk", "-v").split()[1],
    }
    return Machine(model, os.cpu_count() or 1, os.uname().release, versions)
