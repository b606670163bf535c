"""What the end of a crashed engine's log says about the cause."""

import re
from dataclasses import dataclass

from pdctl.podstate.state import Ended


@dataclass(frozen=True, slots=True)
class Guess:
    """A cause that is known.

    Args:
        hopeless: whether another start can only end the same way.
    """

    cause: str
    fix: str
    hopeless: bool = True


_KNOWN: tuple[tuple[str, str, str, bool], ...] = (
    (
        r"unrecognized arguments: (?P<what>.+)",
        "this vLLM does not know the argument {what}",
        "remove it from args, or set image.tag to a vLLM that knows it",
        True,
    ),
    (
        r"argument (?P<what>--[\w-]+): (?:invalid|expected)",
        "this vLLM does not take the value of {what}",
        "correct it in args or in the values that set it",
        True,
    ),
    (
        r"GatedRepoError|[Cc]annot access gated repo|Access to model (?P<what>\S+) is restricted|"
        r"(?P<that>\S+) is not given to this token",
        "the hub does not give the model to this token",
        "ask for access on the model's page at huggingface.co, then deploy again with HF_TOKEN of that account",
        True,
    ),
    (
        r"401 Client Error|Invalid (?:user|username or password)|Invalid credentials in Authorization header",
        "the hub does not accept the token",
        "deploy again with HF_TOKEN set to a valid token",
        True,
    ),
    (
        r"429 Client Error|Too Many Requests",
        "the hub answers 429: too many downloads at once",
        "deploy again with --set engines.cache.mode=download, so that one Job fetches the model for all",
        False,
    ),
    (
        r"RepositoryNotFoundError|404 Client Error.*huggingface|is not a local folder and is not a valid model",
        "the hub has no such model",
        "correct model.name or model.revision",
        True,
    ),
    (
        r"(?:CUDA|HIP) out of memory|OutOfMemoryError",
        "the GPU's memory is too small for what the engine takes",
        "lower model.maxLength or --gpu-memory-utilization, or raise tensorParallelSize",
        True,
    ),
    (
        r"larger than the (?:available|maximum) (?:KV cache memory|number of tokens)|No available memory for the cache",
        "the GPU has no room for the KV cache of a whole context",
        "lower model.maxLength, or raise tensorParallelSize",
        True,
    ),
    (
        r"Free memory on device.*is less than desired",
        "something else uses the same GPU",
        "look on the node (nvidia-smi) for what holds it; a pod that still stops gives it back by itself",
        False,
    ),
    (
        r"No CUDA GPUs are available|Failed to infer device type|CUDA driver version is insufficient|libcuda\.so",
        "the container sees no usable GPU",
        "check the node's driver and device plugin: kubectl describe node, nvidia.com/gpu under Allocatable",
        False,
    ),
    (
        r"No space left on device",
        "the disk is full",
        "raise cache.size, or give the node more ephemeral storage",
        True,
    ),
    (
        r"NIXL is not available|No module named '(?P<what>nixl\w*)'",
        "the image has no NIXL, without which no KV can be handed over",
        "take an image with NIXL, such as vllm/vllm-openai",
        True,
    ),
    (
        r"Permission denied: '(?P<what>[^']+)'",
        "the container may not write to {what}",
        "let runAsUser own the volume, or take another storage class",
        True,
    ),
    (
        r"Name or service not known|Temporary failure in name resolution|LocalEntryNotFoundError|ConnectTimeout",
        "the pod cannot reach the hub",
        "check DNS, proxy and network policy; or fetch the model once with cache.mode=download",
        False,
    ),
    (
        r"[Aa]ddress already in use",
        "a port of the engine is taken within its pod",
        "check prefill.port, decode.port and kv.sideChannelPort against args",
        True,
    ),
)  # fmt: skip


def guess(lines: list[str]) -> Guess | None:
    """Look for a known cause, in the last lines first."""
    for line in reversed(lines):
        for pattern, cause, fix, hopeless in _KNOWN:
            if found := re.search(pattern, line):
                what = next((told for told in found.groups() if told), "")
                return Guess(cause.format(what=what.strip()), fix, hopeless)
    return None


def ending(ended: Ended) -> str:
    """Say in words how a container ended."""
    if ended.code > 128 and ended.reason != "OOMKilled":
        return f"killed by signal {ended.code - 128}"
    return f"exit status {ended.code}"
