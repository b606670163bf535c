"""Real vLLM engines (CPU build with NIXL, no GPU) as processes on loopback addresses of their own."""

import json
import os
import re
import signal
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import httpx

from support.processes import Process, new_address, until

STARTS = 600  # seconds within which engines are up, on two busy cores
BLOCK = 128
LONGEST = 16384  # tokens of a request: half a minute of decoding on a quick machine
# Steps of 128 tokens on all engines: a prompt's prefill takes a while and can be met half done, and one engine alone
# computes with the same shapes as two. Few processes for few cores: the executor is part of the engine core's.
COMMON = (
    "--dtype", "float32", "--enforce-eager", "--block-size", str(BLOCK),
    "--max-model-len", str(LONGEST), "--hf-overrides", json.dumps({"max_position_embeddings": LONGEST}),
    "--max-num-batched-tokens", "128", "--max-num-seqs", "8", "--distributed-executor-backend", "uni",
)  # fmt: skip
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_TARGET_DEVICE": "cpu",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "PYTHONHASHSEED": "0",
    "UCX_TLS": "tcp,shm,self",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # else the CPU build makes the executor a process of its own all the same
}


@dataclass
class RealEngine(Process):
    """One `vllm serve`, a process group of its own so that all of it can be killed at once.

    No session of its own: kernels with `sched_autogroup_enabled` schedule each session as one, and Linux 6.18 was seen
    to let runnable threads of such sessions wait for a minute on two busy cores.
    """

    environment: dict[str, str] = field(default_factory=dict)
    _client: httpx.Client = field(default_factory=lambda: httpx.Client(timeout=30))

    def start(self) -> Self:
        """Start it without waiting."""
        self.log = tempfile.TemporaryFile()  # noqa: SIM115 closed by stop()
        self.process = subprocess.Popen(
            self.command, stdout=self.log, stderr=subprocess.STDOUT, env=os.environ | self.environment,
            process_group=0,
        )  # fmt: skip
        return self

    def up(self) -> Self:
        """Wait until it answers."""
        until(self.ready, STARTS, f"{self.url} answers")
        return self

    def send(self, number: int) -> None:
        """Signal all its processes."""
        os.killpg(self.process.pid, number)

    def kill(self) -> None:
        """Kill all of it, as the kernel does when memory is short."""
        self.send(signal.SIGKILL)
        self.process.wait()

    def alive(self) -> bool:
        """Whether its first process runs."""
        return self.process.poll() is None

    def stop(self, number: int = signal.SIGKILL) -> int:
        """End it, whatever state it is in."""
        if self.alive():
            self.kill()
        self._client.close()
        self.log.close()
        return self.process.returncode

    def revive(self) -> None:
        """Start it again at its address if it is dead; it is another life with another engine id."""
        if not self.alive():
            self.log.close()
            self.start()
            self.up()

    def metric(self, name: str) -> float:
        """Give the sum of a metric's samples of one name; quick, for tests wait for states that do not last."""
        page = self._client.get(f"{self.url}/metrics").text
        values = re.findall(rf"^{re.escape(name)}(?:{{.*}})? (\S+)$", page, re.MULTILINE)
        assert values, f"{self.url} has no metric {name}"
        return sum(map(float, values))

    @property
    def pinned(self) -> float:
        """Share of the KV blocks that somebody holds."""
        return self.metric("vllm:kv_cache_usage_perc")

    @property
    def running(self) -> float:
        """Requests in the running batch."""
        return self.metric("vllm:num_requests_running")


@dataclass(frozen=True)
class Installation:
    """A folder with `venv` (vLLM's CPU build and NIXL) and `model`."""

    folder: Path

    @property
    def block_bytes(self) -> int:
        """Bytes of one KV block: keys and values of its tokens in every layer, four bytes a number."""
        config = json.loads((self.folder / "model" / "config.json").read_text())
        layers, heads = config["num_hidden_layers"], config["num_key_value_heads"]
        return int(2 * layers * heads * config["head_dim"] * 4 * BLOCK)

    def engine(self, role: str, *flags: str, lease: int = 30) -> RealEngine:
        """Make an engine, not started; `lease` is its `kv_lease_duration`, seconds; decode sends heartbeats by it."""
        host, port = new_address(), {"prefill": 8000, "decode": 8200, "plain": 8300}[role]
        transfer: dict[str, Any] = {"kv_connector": "NixlConnector", "kv_buffer_device": "cpu"}
        transfer["kv_connector_extra_config"] = {"kv_lease_duration": lease}
        if role == "prefill":
            transfer |= {"kv_role": "kv_producer"}
        elif role == "decode":
            transfer |= {"kv_role": "kv_consumer", "kv_load_failure_policy": "recompute"}
        command = [str(self.folder / "venv/bin/vllm"), "serve", str(self.folder / "model")]
        command += ["--served-model-name", "tiny", "--host", host, "--port", str(port), *COMMON, *flags]
        if role != "plain":
            command += ["--kv-transfer-config", json.dumps(transfer)]
        environment = ENVIRONMENT | {
            "VLLM_NIXL_SIDE_CHANNEL_HOST": host,
            "VLLM_NIXL_SIDE_CHANNEL_PORT": "5600",
            "PATH": f"{self.folder / 'venv/bin'}:{os.environ['PATH']}",
        }
        return RealEngine(command, f"http://{host}:{port}", environment=environment)


@dataclass
class Engines:
    """The engines of a test run."""

    installation: Installation
    prefill: RealEngine
    decodes: list[RealEngine]
    plain: RealEngine

    @property
    def all(self) -> list[RealEngine]:
        """Give all of them."""
        return [self.prefill, *self.decodes, self.plain]

    def quiet(self) -> bool:
        """Whether no engine runs a request or holds a block."""
        return all(one.pinned == 0 and one.running == 0 for one in self.all)
