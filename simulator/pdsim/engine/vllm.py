"""`vllm serve …` answered by a simulated engine: `python -m pdsim.engine.vllm serve MODEL --flags`.

It stands in for vLLM where a chart or an image starts it by vLLM's own command line. It takes the flags that a P/D
deployment needs and, like vLLM, ends with status 2 on any other. `PD_SIM_FLAGS` has further flags of `pd-engine-sim`
(`--speed 10`), and decides before the others.
"""

import argparse
import json
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from pdsim.engine import app

SIMULATED_FLAGS = "PD_SIM_FLAGS"
_ROLES = {"kv_producer": "prefill", "kv_consumer": "decode", "kv_both": "both"}


def parser() -> argparse.ArgumentParser:
    """Make the parser of the command line; flags without help are taken and change nothing."""
    made = argparse.ArgumentParser(prog="vllm serve", description="A simulated engine under vLLM's command line.")
    add = made.add_argument
    add("model", help="name of the model")
    add("--served-model-name", nargs="+", help="the first is served")
    add("--host", default="0.0.0.0")
    add("--port", type=int, default=8000)
    add("--block-size", type=int, default=128)
    add("--max-model-len", type=int)
    add("--max-num-seqs", type=int)
    add("--num-gpu-blocks-override", type=int)
    add("--seed", type=int)
    add("--shutdown-timeout", type=float, default=0)
    add("--kv-transfer-config", type=json.loads, default={}, help="kv_role, lease and failure policy are used")
    for name in ("--revision", "--tensor-parallel-size", "--disable-access-log-for-endpoints", "--dtype",
                 "--gpu-memory-utilization", "--tokenizer", "--download-dir"):  # fmt: skip
        add(name)
    for name in ("--enforce-eager", "--enable-prefix-caching", "--no-enable-prefix-caching", "--trust-remote-code"):
        add(name, action="store_true")
    return made


def simulated(options: argparse.Namespace, environment: Mapping[str, str]) -> list[str]:
    """Give the flags of `pd-engine-sim` that mean the same."""
    transfer: dict[str, Any] = options.kv_transfer_config
    extra = transfer.get("kv_connector_extra_config", {})
    told = {
        "--role": _ROLES.get(transfer.get("kv_role", ""), "both"),
        "--model": options.served_model_name[0] if options.served_model_name else options.model,
        "--host": options.host,
        "--port": options.port,
        "--side-channel-host": environment.get("VLLM_NIXL_SIDE_CHANNEL_HOST", "localhost"),
        "--side-channel-port": environment.get("VLLM_NIXL_SIDE_CHANNEL_PORT", 5600),
        "--block-size": options.block_size,
        "--max-model-len": options.max_model_len,
        "--max-num-seqs": options.max_num_seqs,
        "--num-gpu-blocks": options.num_gpu_blocks_override,
        "--seed": options.seed,
        "--shutdown-timeout": options.shutdown_timeout,
        "--kv-lease-duration": extra.get("kv_lease_duration"),
        "--kv-load-failure-policy": transfer.get("kv_load_failure_policy", "fail"),
    }
    flags = [f"{name}={value}" for name, value in told.items() if value is not None]
    if "kv_connector" not in transfer:
        flags.append("--no-kv-connector")
    return flags + shlex.split(environment.get(SIMULATED_FLAGS, ""))


def main(argv: Sequence[str] | None = None, environment: Mapping[str, str] = os.environ) -> None:
    """Run an engine until SIGTERM or SIGINT, as `pd-engine-sim` does."""
    verb, *rest = sys.argv[1:] if argv is None else argv or [""]
    if verb != "serve":
        print(f"vllm: the simulated engine knows only `vllm serve`, not {verb!r}", file=sys.stderr)
        sys.exit(2)
    app.main(simulated(parser().parse_args(rest), environment))


if __name__ == "__main__":
    main()
