"""What every pod of the charts has in common, whatever the values."""

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

from pdrouter.settings import load

from .conftest import ROOT, Objects
from .variants import VARIANTS

AS_ROOT = ("engines on InfiniBand", "engines on RoCE", "engines on EFA")
RESTRICTED_VOLUMES = {"configMap", "emptyDir", "persistentVolumeClaim", "secret", "projected", "downwardAPI"}


def pods(objects: Objects) -> Iterator[tuple[str, dict[str, Any]]]:
    for one in objects:
        if one["kind"] == "Pod":
            yield one["metadata"]["name"], one["spec"]
        elif one["kind"] in ("Deployment", "Job"):
            yield one["metadata"]["name"], one["spec"]["template"]["spec"]


def containers(spec: dict[str, Any]) -> list[dict[str, Any]]:
    return [*spec.get("initContainers", []), *spec["containers"]]


def above_restricted(spec: dict[str, Any]) -> set[str]:
    """Give what the restricted pod security level would refuse."""
    found = {name for name in ("hostNetwork", "hostPID", "hostIPC") if spec.get(name)}
    security = spec["securityContext"]
    found |= set() if security["runAsNonRoot"] and security.get("runAsUser", 1) != 0 else {"root"}
    found |= set() if security["seccompProfile"] == {"type": "RuntimeDefault"} else {"seccomp"}
    for one in containers(spec):
        own = one["securityContext"]
        found |= {"escalation"} if own["allowPrivilegeEscalation"] else set()
        found |= set() if own["capabilities"]["drop"] == ["ALL"] else {"capabilities"}
        found |= set(own["capabilities"].get("add", ()))
    found |= {key for volume in spec.get("volumes", ()) for key in set(volume) - {"name"} - RESTRICTED_VOLUMES}
    return found


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_pod_is_of_the_restricted_level_unless_it_locks_memory_for_rdma(
    variant: str, everything: dict[str, Objects]
) -> None:
    expected = {"root", "IPC_LOCK"} if variant in AS_ROOT else set()
    for name, spec in pods(everything[variant]):
        assert above_restricted(spec) == expected, name


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_name_is_there_twice_and_no_mount_is_without_its_volume(
    variant: str, everything: dict[str, Objects]
) -> None:
    for pod, spec in pods(everything[variant]):
        volumes = [volume["name"] for volume in spec.get("volumes", ())]
        assert len(volumes) == len(set(volumes)), pod
        for one in containers(spec):
            for key, field in (("env", "name"), ("ports", "name"), ("volumeMounts", "mountPath")):
                names = [entry[field] for entry in one.get(key, ())]
                assert len(names) == len(set(names)), f"{pod}: {key}"
            assert {mount["name"] for mount in one.get("volumeMounts", ())} <= set(volumes), pod


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_container_has_a_pinned_image_and_says_what_it_needs(
    variant: str, everything: dict[str, Objects]
) -> None:
    for pod, spec in pods(everything[variant]):
        assert spec["enableServiceLinks"] is False, pod
        for one in containers(spec):
            assert re.search(r"(:(distroless-)?v?\d+\.\d+\.\d+|@sha256:[0-9a-f]{64})$", one["image"]), one["image"]
            for kind in ("requests", "limits"):
                assert {"cpu", "memory"} <= set(one["resources"][kind]), f"{pod}: {one['name']}"


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_secret_is_part_of_a_release(variant: str, everything: dict[str, Objects]) -> None:
    assert not [one for one in everything[variant] if one["kind"] == "Secret"]
    for pod, spec in pods(everything[variant]):
        for one in containers(spec):
            for variable in one.get("env", ()):
                if re.search("TOKEN|KEY$|PASSWORD|SECRET", variable["name"]):
                    assert set(variable) == {"name", "valueFrom"}, f"{pod}: {variable['name']}"


def test_only_the_download_has_the_token_when_there_is_one(everything: dict[str, Objects]) -> None:
    holders = {
        one["name"]
        for _, spec in pods(everything["engines with a download"])
        for one in containers(spec)
        if any(variable["name"] == "HF_TOKEN" for variable in one.get("env", ()))
    }
    assert holders == {"download"}


def test_vllm_knows_every_flag_that_an_engine_is_called_with(everything: dict[str, Objects]) -> None:
    known = set((ROOT / "tests/charts/data/vllm_serve_flags.txt").read_text().splitlines())
    seen = set()
    for variant, objects in everything.items():
        for _, spec in pods(objects) if variant.startswith("engines") else ():
            for one in spec["containers"]:
                if one["command"] == ["vllm", "serve"]:
                    seen |= {argument.split("=")[0] for argument in one["args"] if argument.startswith("--")}
    assert {"--kv-transfer-config", "--served-model-name", "--revision", "--shutdown-timeout"} <= seen
    assert seen <= known


def test_prefill_and_decode_agree_on_all_that_their_kv_depends_on(everything: dict[str, Objects]) -> None:
    for variant, objects in everything.items():
        if not variant.startswith("engines"):
            continue
        engines = [spec["containers"][0] for _, spec in pods(objects) if spec["containers"][0]["name"] == "vllm"]
        assert len(engines) == 2
        assert len({one["image"] for one in engines}) == 1
        shared = [
            {argument for argument in one["args"] if not argument.startswith(("--port", "--kv-transfer-config"))}
            for one in engines
        ]
        assert shared[0] == shared[1], variant
        configs = [
            json.loads(argument.partition("=")[2])
            for one in engines for argument in one["args"] if argument.startswith("--kv-transfer-config")
        ]  # fmt: skip
        assert {config["kv_role"] for config in configs} == {"kv_producer", "kv_consumer"}
        assert configs[0]["kv_connector_extra_config"] == configs[1]["kv_connector_extra_config"]


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name.startswith("router")])
def test_the_router_takes_the_settings_that_its_chart_renders(
    variant: str, everything: dict[str, Objects], tmp_path: Any
) -> None:
    configs = [one["data"]["config.yaml"] for one in everything[variant] if "config.yaml" in one.get("data", {})]
    assert len(configs) == 1
    key = tmp_path / "key"
    key.write_text("a key")
    file = tmp_path / "config.yaml"
    file.write_text(configs[0].replace("/etc/pd-router/api-key/key", str(key)))
    settings = load(["--config", str(file)])
    assert (settings.port, settings.prometheus_port, settings.admin_port) == (10001, 29000, 29001)
    assert settings.admin_host == "127.0.0.1"
    by_kubernetes = variant != "router of fixed engines"
    assert (settings.prefill_selector is not None) == by_kubernetes
    assert (settings.service_discovery_port == "http") == by_kubernetes


def test_the_routers_selector_finds_the_services_of_the_engines(everything: dict[str, Objects]) -> None:
    config = next(one["data"]["config.yaml"] for one in everything["router"] if "config.yaml" in one.get("data", {}))
    services = {
        one["metadata"]["name"]: one["metadata"]["labels"] for one in everything["engines"] if one["kind"] == "Service"
    }
    for role in ("prefill", "decode"):
        told = re.search(rf"^{role}_selector: (.+)$", config, re.MULTILINE)
        assert told
        wanted = dict(part.split("=") for part in told[1].split(","))
        assert [name for name, labels in services.items() if wanted.items() <= labels.items()] == [
            f"ms-llama31-llm-d-modelservice-{role}"
        ]


def test_the_lease_that_the_router_counts_with_is_the_engines(everything: dict[str, Objects], tmp_path: Any) -> None:
    config = next(one["data"]["config.yaml"] for one in everything["router"] if "config.yaml" in one.get("data", {}))
    (tmp_path / "config.yaml").write_text(config)
    spec = next(spec for name, spec in pods(everything["engines"]) if name.endswith("prefill"))
    told = next(one for one in spec["containers"][0]["args"] if one.startswith("--kv-transfer-config"))
    lease = json.loads(told.partition("=")[2])["kv_connector_extra_config"]["kv_lease_duration"]
    assert load(["--config", str(tmp_path / "config.yaml")]).kv_lease_seconds == lease
