"""The rendered deployment is the one that it continues, but for what docs/seed-differences.md gives a reason for."""

import json
import re
from typing import Any

import pytest
import yaml

from .conftest import ROOT, Objects

PAGE = ROOT / "docs/seed-differences.md"
NOWHERE = "–"


def of_kind(objects: Objects, kind: str) -> Objects:
    return [one for one in objects if one["kind"] == kind]


def both(values: list[Any]) -> Any:
    """Give what both roles have in common, or the two."""
    assert len(values) == 2
    return values[0] if values[0] == values[1] else values


def volume(spec: dict[str, Any], path: str) -> Any:
    mounts = {mount["mountPath"]: mount["name"] for mount in spec["containers"][0]["volumeMounts"]}
    if path not in mounts:
        return None
    told = next(one for one in spec["volumes"] if one["name"] == mounts[path])
    room = told.get("emptyDir")
    return f"{room['medium']} {room['sizeLimit']}" if room and "medium" in room else next(iter(set(told) - {"name"}))


def engines(objects: Objects) -> dict[str, Any]:
    deployments = of_kind(objects, "Deployment")
    deployments.sort(key=lambda one: one["metadata"]["labels"]["llm-d.ai/role"], reverse=True)
    services = {one["metadata"]["name"]: one["spec"] for one in of_kind(objects, "Service")}
    specs = [one["spec"]["template"]["spec"] for one in deployments]
    vllm = [spec["containers"][0] for spec in specs]
    arguments = [{one.partition("=")[0]: one.partition("=")[2] for one in engine["args"]} for engine in vllm]
    configs = [json.loads(told["--kv-transfer-config"]) for told in arguments]
    environment = [{one["name"]: one for one in engine["env"]} for engine in vllm]
    names = [one["metadata"]["name"] for one in deployments]
    told: dict[str, Any] = {
        "names": names,
        "replicas": [one["spec"]["replicas"] for one in deployments],
        "service ports": [services[name]["ports"][0]["port"] for name in names],
        "container": both([engine["name"] for engine in vllm]),
        "image": both([engine["image"] for engine in vllm]),
        "command": both([" ".join(engine["command"]) for engine in vllm]),
        "model": both([engine["args"][0] for engine in vllm]),
        "container ports": both([", ".join(port["name"] for port in engine["ports"]) for engine in vllm]),
        "resources": both([plain(engine["resources"]["limits"]) for engine in vllm]),
        "limits are requests": both([one["resources"]["limits"] == one["resources"]["requests"] for one in vllm]),
        "kv_connector": both([config["kv_connector"] for config in configs]),
        "kv_role": [config["kv_role"] for config in configs],
        "kv_load_failure_policy": [config.get("kv_load_failure_policy", "none") for config in configs],
        "kv_connector_extra_config": both([config["kv_connector_extra_config"] for config in configs]),
        "sidecars": ["none" if len(spec["containers"]) == 1 else "some" for spec in specs],
        "pod labels": both([sorted(one["spec"]["template"]["metadata"]["labels"]) for one in deployments]),
        "selector": both([sorted(one["spec"]["selector"]["matchLabels"]) for one in deployments]),
        "scrape": "annotations" if not of_kind(objects, "PodMonitor") else "PodMonitor",
        "probes": both([sorted(key for key in engine if key.endswith("Probe")) for engine in vllm]),
        "preStop": both([engine["lifecycle"]["preStop"] for engine in vllm]),
        "terminationGracePeriodSeconds": both([spec["terminationGracePeriodSeconds"] for spec in specs]),
        "terminationMessagePolicy": both([engine["terminationMessagePolicy"] for engine in vllm]),
        "progressDeadlineSeconds": both([one["spec"]["progressDeadlineSeconds"] for one in deployments]),
        "rollingUpdate": both([one["spec"]["strategy"]["rollingUpdate"] for one in deployments]),
        "user": both([spec["securityContext"]["runAsUser"] for spec in specs]),
        "capabilities": both([engine["securityContext"]["capabilities"] for engine in vllm]),
        "service account token": both([spec["automountServiceAccountToken"] for spec in specs]),
        "service links": both([spec["enableServiceLinks"] for spec in specs]),
        "topology spread": both([spec["topologySpreadConstraints"][0]["topologyKey"] for spec in specs]),
        "objects": sorted({one["kind"] for one in objects}),
    }  # fmt: skip
    for flag in sorted(set(arguments[0]) | set(arguments[1])):
        if flag.startswith("--") and flag != "--kv-transfer-config":
            told[flag] = both([plain(one.get(flag)) for one in arguments])
    for name in sorted(set(environment[0]) | set(environment[1])):
        told[f"env {name}"] = both([variable(one[name]) for one in environment])
    for path in ("/dev/shm", "/.config", "/.cache", "/scratch", "/model-cache"):
        found = both([volume(spec, path) for spec in specs])
        if found is not None:
            told[f"volume {path}"] = found
    return told


def variable(told: dict[str, Any]) -> Any:
    if "value" in told:
        return plain(told["value"])
    source = told["valueFrom"]
    if "fieldRef" in source:
        return source["fieldRef"]["fieldPath"]
    return f"{source['secretKeyRef']['name']}/{source['secretKeyRef']['key']}"


def plain(told: Any) -> Any:
    """Give numbers for what is written as text, since YAML's quotes are no difference."""
    if isinstance(told, dict):
        return {key: plain(value) for key, value in told.items()}
    return int(told) if isinstance(told, str) and told.isdecimal() else told


def router(objects: Objects) -> dict[str, Any]:
    deployment = of_kind(objects, "Deployment")[0]
    pod = deployment["spec"]["template"]
    one = pod["spec"]["containers"][0]
    config = yaml.safe_load(next(m["data"]["config.yaml"] for m in objects if "config.yaml" in m.get("data", {})))
    probes = {
        name: f"{probe['httpGet']['path']} every {probe['periodSeconds']} s"
        for name, probe in ((key.removesuffix("Probe"), value) for key, value in one.items() if key.endswith("Probe"))
    }
    service = of_kind(objects, "Service")[0]["spec"]
    return probes | {
        "name": deployment["metadata"]["name"],
        "replicas": deployment["spec"]["replicas"],
        "container": one["name"],
        "image": one["image"],
        "command": "pd-router",
        "engines": "EndpointSlices" if "prefill_selector" in config else "URLs",
        "--port": config["port"],
        "--prometheus-port": config["prometheus_port"],
        "--policy": config["policy"],
        "--log-level": config.get("log_level", "info"),
        "--admin-port": config["admin_port"],
        "--drain-timeout-secs": config["drain_timeout_secs"],
        "container ports": {port["name"]: port["containerPort"] for port in one["ports"]},
        "service ports": {port["name"]: port["port"] for port in service["ports"]},
        "requests": plain(one["resources"]["requests"]),
        "limits": plain(one["resources"]["limits"]),
        "preStop": one["lifecycle"]["preStop"],
        "terminationGracePeriodSeconds": pod["spec"]["terminationGracePeriodSeconds"],
        "progressDeadlineSeconds": deployment["spec"]["progressDeadlineSeconds"],
        "rollingUpdate": deployment["spec"]["strategy"]["rollingUpdate"],
        "user": pod["spec"]["securityContext"]["runAsUser"],
        "root file system": "read-only" if one["securityContext"]["readOnlyRootFilesystem"] else "writable",
        "capabilities": one["securityContext"]["capabilities"],
        "pod labels": sorted(pod["metadata"]["labels"]),
        "selector": sorted(deployment["spec"]["selector"]["matchLabels"]),
        "scrape": "annotations",
        "topology spread": pod["spec"]["topologySpreadConstraints"][0]["topologyKey"],
        "objects": sorted({one["kind"] for one in objects}),
    }  # fmt: skip


def written(told: Any) -> str:
    """Give a value as a cell of the table has it."""
    if told is None:
        return NOWHERE
    if isinstance(told, list):
        return ", ".join(str(one) for one in told)
    if isinstance(told, dict):
        return ", ".join(f"{key} {written(value)}" for key, value in sorted(told.items()))
    return str(told).lower() if isinstance(told, bool) else str(told)


def rows(part: str) -> dict[str, tuple[str, str, str]]:
    text = PAGE.read_text().partition(f"## {part}\n")[2].partition("\n## ")[0]
    found = re.findall(r"^\| `([^`]+)` \| (.*?) \| (.*?) \| (.*?) \|$", text, re.MULTILINE)
    assert len(found) == len({row[0] for row in found}), "a row is there twice"
    return {row[0]: (row[1].replace("`", ""), row[2].replace("`", ""), row[3]) for row in found}


@pytest.fixture(scope="module")
def rendered() -> dict[str, dict[str, Any]]:
    objects = [one for one in yaml.safe_load_all((ROOT / "tests/charts/rendered/llama31-8b.yaml").read_text()) if one]
    mine = {"pd-engines": engines, "pd-router": router}
    parts = {
        chart: [
            one for one in objects
            if one["metadata"].get("labels", {}).get("app.kubernetes.io/name") == chart
            and "helm.sh/hook" not in one["metadata"].get("annotations", {})
        ]
        for chart in mine
    }  # fmt: skip
    return {chart.removeprefix("pd-"): mine[chart](found) for chart, found in parts.items()}


@pytest.mark.parametrize("part", ["engines", "router"])
def test_every_difference_has_its_row_and_every_row_its_difference(
    part: str, rendered: dict[str, dict[str, Any]]
) -> None:
    seed = yaml.safe_load((ROOT / "tests/charts/data/seed.yaml").read_text())[part]
    here = rendered[part]
    differences = {
        key: (written(seed.get(key)), written(here.get(key)))
        for key in sorted(set(seed) | set(here))
        if written(seed.get(key)) != written(here.get(key))
    }
    told = {key: row[:2] for key, row in rows(part).items()}
    missing = "\n".join(f"| `{key}` | {was} | {now} |  |" for key, (was, now) in differences.items() if key not in told)
    assert not missing, f"{PAGE.name} lacks\n{missing}"
    assert told == differences


@pytest.mark.parametrize("part", ["engines", "router"])
def test_every_row_gives_its_reason(part: str) -> None:
    for key, row in rows(part).items():
        assert len(row[2]) > 20, key


def test_what_people_look_for_by_name_is_where_it_was(rendered: dict[str, dict[str, Any]]) -> None:
    seed = yaml.safe_load((ROOT / "tests/charts/data/seed.yaml").read_text())
    for part, keys in (
        ("engines", ("names", "replicas", "service ports", "container", "--port", "resources", "volume /dev/shm")),
        (
            "router",
            ("name", "replicas", "container", "--port", "container ports", "service ports", "requests", "limits"),
        ),
    ):
        for key in keys:
            assert written(rendered[part][key]) == written(seed[part][key]), key
    for key in ("app", "mode", "model"):
        assert key in rendered["router"]["pod labels"]
