"""What values the charts take, and what they say to others."""

import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from pdctl.routers.programs import envoy
from pdrouter.settings import schema

from .conftest import ROOT, Objects

Call = Callable[..., subprocess.CompletedProcess[str]]
CHARTS = ("pd-engines", "pd-router", "llm-d-router", "vllm-router")
FREE = {
    "pd-engines": {"resources", "requests", "limits", "affinity", "behavior", "extraConfig"},
    "pd-router": {"resources", "requests", "limits", "affinity", "behavior"},
    "llm-d-router": {"resources", "requests", "limits", "affinity"},
    "vllm-router": {"resources", "requests", "limits", "affinity"},
}
"""Values whose keys are Kubernetes' or vLLM's own."""


def described(chart: str) -> dict[str, Any]:
    told: dict[str, Any] = json.loads((ROOT / "charts" / chart / "values.schema.json").read_text())
    return told


def leaves(values: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, (*path, key))
        else:
            yield (*path, key)


def at(node: dict[str, Any], path: tuple[str, ...]) -> list[dict[str, Any]]:
    """Give the schemas from the root down to a value, as far as its keys are described."""
    found = []
    for key in path:
        options = [node, *node.get("allOf", ())]
        node = next((one["properties"][key] for one in options if key in one.get("properties", {})), {})
        if not node:
            break
        found.append(node)
    return found


@pytest.mark.parametrize("chart", CHARTS)
def test_every_value_is_described(chart: str) -> None:
    values = yaml.safe_load((ROOT / "charts" / chart / "values.yaml").read_text())
    silent = [
        ".".join(path)
        for path in leaves(values)
        if not any(node.get("description") or any(one.get("description") for one in node.get("allOf", ()))
                   for node in at(described(chart), path))
    ]  # fmt: skip
    assert silent == []


@pytest.mark.parametrize("chart", CHARTS)
def test_every_map_refuses_keys_that_it_does_not_know(chart: str) -> None:
    def open_maps(name: str, node: dict[str, Any]) -> Iterator[str]:
        if "properties" in node or node.get("type") == "object":
            if node.get("additionalProperties", True) is True and "allOf" not in node:
                yield name
            for key, child in node.get("properties", {}).items():
                yield from open_maps(key, child)

    told = described(chart)
    assert told["additionalProperties"] is False
    assert set(open_maps("values", told)) - {"global"} == FREE[chart]


def test_the_settings_of_the_router_are_its_own_but_for_those_that_other_values_say() -> None:
    config = json.loads((ROOT / "charts/pd-router/config.schema.json").read_text())
    own = schema()["properties"]
    left_out = set(own) - set(config["properties"])
    assert set(config["properties"]) <= set(own)
    assert config["additionalProperties"] is False
    assert {"policy", "max_concurrent_requests", "kv_lease_seconds", "otel_endpoint"} <= set(config["properties"])
    assert {"prefill", "decode", "port", "api_key", "tls_key_file", "drain_timeout_secs"} <= left_out


@pytest.mark.parametrize(
    ("chart", "wrong", "said"),
    [
        ("pd-engines", "prefil.replicas=4", "additional properties 'prefil' not allowed"),
        ("pd-engines", "prefill.replica=4", "at '/prefill': additional properties 'replica' not allowed"),
        ("pd-engines", "prefill.replicas=-1", "at '/prefill/replicas': minimum"),
        ("pd-engines", "prefill.replicas=many", "got string, want integer"),
        ("pd-engines", "cache.mode=nfs", "value must be one of 'emptyDir', 'pvc', 'download'"),
        ("pd-engines", "image.digest=sha256:12", "at '/image/digest'"),
        ("pd-engines", "kv.backends={MOONCAKE}", "value must be one of 'UCX', 'LIBFABRIC'"),
        ("pd-router", "config.polcy=pd_cost", "at '/config': additional properties 'polcy' not allowed"),
        ("pd-router", "service.type=Ingress", "value must be one of 'ClusterIP', 'NodePort', 'LoadBalancer'"),
    ],
)
@pytest.mark.parametrize("helm", ["helm", "helm3"])
def test_a_wrong_value_is_refused_by_its_name(call: Call, helm: str, chart: str, wrong: str, said: str) -> None:
    good = ("-f", "values/llama31-8b.yaml") if chart == "pd-engines" else ("--set", "engines.release=a")
    done = call(helm, "template", "x", f"charts/{chart}", "--kube-version", "v1.36.0", *good, "--set", wrong)
    assert done.returncode == 1
    assert said in done.stderr


def test_values_that_contradict_are_refused_with_a_sentence_each(call: Call) -> None:
    wrong = "decode.port=5600,prefill.tensorParallelSize=2,args={--disable-log-requests}"
    done = call("helm", "template", "x", "charts/pd-engines", "-f", "values/llama31-8b.yaml", "--set", wrong)
    assert done.returncode == 1
    sentences = [line for line in done.stderr.splitlines() if line.startswith("  - ")]
    assert len(sentences) == 4  # the flag is told for each role
    assert all(sentence.endswith(".") for sentence in sentences)


def test_a_refused_token_is_not_repeated(call: Call) -> None:
    done = call(
        "helm", "template", "x", "charts/pd-engines", "-f", "values/llama31-8b.yaml", "--set", "env.HF_TOKEN=hf_abc"
    )
    assert done.returncode == 1
    assert "huggingFace.existingSecret" in done.stderr
    assert "hf_abc" not in done.stderr + done.stdout


@pytest.mark.parametrize("model", ["llama31-8b", "small"])
@pytest.mark.parametrize("network", ["none", "infiniband", "roce", "efa"])
def test_every_model_goes_with_every_network(call: Call, tools: Any, model: str, network: str) -> None:
    state = f"model={model},network={network},engines=ms-{model},router=router-{model}"
    done = call(
        "helmfile",
        "--helm-binary",
        tools / "helm",
        "--quiet",
        "-n",
        "somewhere",
        "--state-values-set",
        state,
        "template",
    )
    assert done.returncode == 0, done.stderr
    objects = [one for one in yaml.safe_load_all(done.stdout) if one]
    names = {(one["kind"], one["metadata"]["name"]) for one in objects}
    assert ("Deployment", f"router-{model}") in names
    assert not [name for _, name in names if "llm-d-router" in name], "off unless it is asked for"
    config = next(one["data"]["config.yaml"] for one in objects if "config.yaml" in one.get("data", {}))
    assert f"app.kubernetes.io/instance=ms-{model},llm-d.ai/role=decode" in config
    assert "service_discovery_namespace: somewhere" in config


def test_helmfile_lets_llm_d_stand_in_for_our_router_where_that_is_said(call: Call, tools: Any) -> None:
    helmfile = ("helmfile", "--helm-binary", tools / "helm", "--quiet", "-n", "somewhere", "--state-values-set")
    done = call(*helmfile, "serving=llm-d", "template")
    assert done.returncode == 0, done.stderr
    objects = {(one["kind"], one["metadata"]["name"]): one for one in yaml.safe_load_all(done.stdout) if one}
    assert (
        objects["InferencePool", "llm-d-router"]["spec"]["selector"]["matchLabels"].items()
        >= {"app.kubernetes.io/instance": "ms-llama31"}.items()
    )
    pods = objects["Deployment", "llm-d-router"]["spec"]["template"]["metadata"]["labels"]
    clients = objects["Service", "vllm-router-llama31"]["spec"]["selector"]
    assert clients.items() <= pods.items()
    assert objects["Deployment", "vllm-router-llama31"]["spec"]["replicas"] == 0
    done = call(*helmfile, "serving=ours", "template")
    ours = {(one["kind"], one["metadata"]["name"]): one for one in yaml.safe_load_all(done.stdout) if one}
    for role in ("prefill", "decode"):
        name = ("Deployment", f"ms-llama31-llm-d-modelservice-{role}")
        assert ours[name] == objects[name], "no engine is touched"


@pytest.mark.timeout(600)  # Envoy is installed for it
def test_envoy_takes_the_configuration_that_llm_ds_chart_writes(render: Callable[..., Objects], tmp_path: Path) -> None:
    [written] = [one for one in render("llm-d-router", "--set", "engines.release=a") if one["kind"] == "ConfigMap"]
    file = tmp_path / "envoy.yaml"
    file.write_text(written["data"]["envoy.yaml"])
    checked = subprocess.run(
        [envoy(print), "--mode", "validate", "-c", file], capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stderr
