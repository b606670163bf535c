"""What a vLLM engine tells of itself over HTTP."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

NIXL = {
    "transfers": "vllm:nixl_xfer_time_seconds_count",
    "bytes": "vllm:nixl_bytes_transferred_sum",
    "transfer_s": "vllm:nixl_xfer_time_seconds_sum",
    "post_s": "vllm:nixl_post_time_seconds_sum",
    "failed_transfers": "vllm:nixl_num_failed_transfers_total",
    "failed_notifications": "vllm:nixl_num_failed_notifications_total",
    "expired": "vllm:nixl_num_kv_expired_reqs_total",
}
COUNTED = NIXL | {
    "prompt_tokens": "vllm:prompt_tokens_total",
    "generated_tokens": "vllm:generation_tokens_total",
    "preemptions": "vllm:num_preemptions_total",
    "cached_tokens": "vllm:prefix_cache_hits_total",
    "fetched_tokens": "vllm:external_prefix_cache_hits_total",
}


class EngineError(Exception):
    """An engine is not as it has to be; the message says what to do."""


def samples(url: str) -> dict[str, float]:
    """Give the samples of a metrics page, those of one name added up."""
    page = httpx.get(url, timeout=30).raise_for_status().text
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            found[sample.name] = found.get(sample.name, 0.0) + sample.value
    return found


@dataclass(frozen=True, slots=True)
class Engine:
    """One engine.

    Args:
        role: prefill or decode.
        url: as `http://HOST:PORT`.
    """

    role: str
    url: str

    def get(self, path: str) -> Any:
        """Give the JSON of a path.

        Raises:
            EngineError: it does not answer.
        """
        try:
            return httpx.get(self.url + path, timeout=30).raise_for_status().json()
        except (httpx.HTTPError, ValueError) as error:
            raise EngineError(f"the {self.role} engine {self.url}{path} does not answer: {error}; is it up?") from None

    @property
    def model(self) -> dict[str, Any]:
        """What it serves: `id` is the name for requests, `root` where its files are."""
        told: dict[str, Any] = self.get("/v1/models")["data"][0]
        return told

    def counters(self) -> dict[str, float]:
        """Give what it has counted so far; a counter that it does not have is left out."""
        page = samples(f"{self.url}/metrics")
        return {name: page[metric] for name, metric in COUNTED.items() if metric in page}

    def cache(self) -> dict[str, str]:
        """Give how its KV cache is set up, as `vllm:cache_config_info` tells."""
        page = httpx.get(f"{self.url}/metrics", timeout=30).raise_for_status().text
        for family in text_string_to_metric_families(page):
            for sample in family.samples:
                if sample.name.startswith("vllm:cache_config_info"):
                    return dict(sample.labels)
        raise EngineError(f"{self.url}/metrics has no vllm:cache_config_info; is this a vLLM engine?")

    @property
    def alive(self) -> bool:
        """Whether it answers at all."""
        try:
            return httpx.get(f"{self.url}/health", timeout=5).status_code == 200
        except httpx.HTTPError:
            return False

    @property
    def held(self) -> float:
        """Share of the KV blocks that somebody holds. Read quickly, for it changes: without a parser."""
        page = httpx.get(f"{self.url}/metrics", timeout=30).raise_for_status().text
        lines = [line for line in page.splitlines() if line.startswith("vllm:kv_cache_usage_perc")]
        return sum(float(line.rpartition(" ")[2]) for line in lines)


def counted(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    """Give what was counted in between."""
    return {name: value - before.get(name, 0.0) for name, value in after.items()}


def block_bytes(model: dict[str, Any], block: int) -> int | None:
    """Give the bytes of one KV block of a Llama in its own type; None where its files are not on this machine.

    Keys and values, in each layer, for each KV head: 2 * layers * heads * head size numbers a token.
    """
    path = Path(str(model.get("root", ""))) / "config.json"
    if not path.exists():
        return None
    told = json.loads(path.read_text())
    size = told.get("head_dim") or told["hidden_size"] // told["num_attention_heads"]
    number = 4 if "float32" in (told.get("torch_dtype"), told.get("dtype")) else 2
    return int(2 * told["num_hidden_layers"] * told["num_key_value_heads"] * size * number * block)


def seconds_until(done: Callable[[], bool], patience: float, step: float = 0.01) -> float | None:
    """Give the seconds until something holds; None when it did not in time."""
    began = time.monotonic()
    while not done():
        if time.monotonic() - began > patience:
            return None
        time.sleep(step)
    return time.monotonic() - began
