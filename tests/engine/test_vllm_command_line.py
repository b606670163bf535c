"""The simulated engine under vLLM's command line, as the charts and the image start it."""

import json
import sys

import pytest
import yaml

from pdsim.engine import app, vllm
from support.processes import Process, new_address

CONFIG = {"kv_connector": "NixlConnector", "kv_role": "kv_consumer", "kv_load_failure_policy": "recompute",
          "kv_connector_extra_config": {"backends": ["UCX"], "kv_lease_duration": 12}}  # fmt: skip


def test_flags_mean_what_they_mean_to_vllm() -> None:
    told = vllm.parser().parse_args([
        "org/model", "--served-model-name", "served", "other", "--port=8200", "--block-size=64", "--max-model-len=4096",
        f"--kv-transfer-config={json.dumps(CONFIG)}", "--shutdown-timeout=7", "--tensor-parallel-size=1",
    ])  # fmt: skip
    side = {
        "VLLM_NIXL_SIDE_CHANNEL_HOST": "10.0.0.7",
        "VLLM_NIXL_SIDE_CHANNEL_PORT": "5601",
        "PD_SIM_FLAGS": "--speed 3",
    }
    made = app.parser().parse_args(vllm.simulated(told, side))
    assert (made.role, made.model, made.port, made.block_size, made.max_model_len) == (
        "decode",
        "served",
        8200,
        64,
        4096,
    )
    assert (made.kv_lease_duration, made.kv_load_failure_policy, made.shutdown_timeout) == (12, "recompute", 7)
    assert (made.side_channel_host, made.side_channel_port, made.speed) == ("10.0.0.7", 5601, 3)
    assert not made.no_kv_connector
    alone = vllm.simulated(vllm.parser().parse_args(["org/model"]), {})
    assert app.parser().parse_args(alone).no_kv_connector, "vLLM moves no KV unless it is told by what"


def test_the_rendered_deployment_is_understood() -> None:
    with open("tests/charts/rendered/llama31-8b.yaml") as file:
        objects = [one for one in yaml.safe_load_all(file) if one and one["kind"] == "Deployment"]
    [prefill] = [one for one in objects if one["metadata"]["name"].endswith("-prefill")]
    [container] = prefill["spec"]["template"]["spec"]["containers"]
    assert container["command"] == ["vllm", "serve"]
    made = app.parser().parse_args(vllm.simulated(vllm.parser().parse_args(container["args"]), {}))
    assert (made.role, made.model) == ("prefill", "meta-llama/Llama-3.1-8B-Instruct")


def test_a_flag_that_vllm_would_refuse_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        vllm.main(["serve", "tiny", "--disable-log-requests"], {})
    assert ended.value.code == 2
    assert "unrecognized arguments: --disable-log-requests" in capsys.readouterr().err


def test_it_serves() -> None:
    host = new_address()
    command = [sys.executable, "-m", "pdsim.engine.vllm", "serve", "tiny", f"--host={host}", "--port=8000"]
    with Process(command, f"http://{host}:8000") as engine:
        assert engine.get("/v1/models")["data"][0]["id"] == "tiny"
        assert engine.get("/sim/state")["role"] == "both"
