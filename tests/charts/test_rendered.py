"""What the charts render: known objects of known fields, from every values file, by every Helm."""

import json
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping

import kubernetes_validate
import pytest
import yaml

from .conftest import ROOT, Objects
from .variants import VARIANTS

PUBLISHED = pathlib.Path(kubernetes_validate.__file__).parent / "kubernetes-json-schema"
OLDEST, NEWEST = "v1.30.0", "v1.37.0"


@pytest.fixture(scope="module")
def check(
    call: Callable[..., subprocess.CompletedProcess[str]], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, Mapping[str, Objects]], subprocess.CompletedProcess[str]]:
    """Give a function that compares objects with the schemas of a Kubernetes version and of the operators."""

    def checked(version: str, rendered: Mapping[str, Objects]) -> subprocess.CompletedProcess[str]:
        folder = tmp_path_factory.mktemp(version)
        published = PUBLISHED / f"{version}-local-strict"
        kinds = {
            "-".join([one["kind"].lower(), *(part.split(".")[0] for part in one["apiVersion"].split("/"))])
            for objects in rendered.values() for one in objects
        }  # fmt: skip
        for name in ("_definitions", *kinds):
            if (published / f"{name}.json").exists():
                schema = json.loads((published / f"{name}.json").read_text())
                del schema["$id"]  # an address, where the definitions would be looked for
                text = json.dumps(schema).replace('"/api/_definitions.json#', '"_definitions.json#')
                (folder / f"{name}.json").write_text(text)
        manifests = folder / "manifests"
        manifests.mkdir()
        for number, (name, objects) in enumerate(rendered.items()):
            (manifests / f"{number}.yaml").write_text(f"# {name}\n" + yaml.safe_dump_all(objects))
        named = "{{.ResourceKind}}{{.KindSuffix}}.json"
        places = [
            part for where in (folder, ROOT / ".tools/schemas") for part in ("-schema-location", f"{where}/{named}")
        ]
        return call("kubeconform", "-strict", "-summary", *places, manifests)

    return checked


@pytest.mark.parametrize("version", [OLDEST, NEWEST])
def test_kubernetes_knows_every_field_of_everything_that_is_rendered(
    version: str,
    everything: dict[str, Objects],
    check: Callable[[str, Mapping[str, Objects]], subprocess.CompletedProcess[str]],
) -> None:
    checked = check(version, everything)
    assert checked.returncode == 0, checked.stdout
    count = sum(len(objects) for objects in everything.values())
    assert f"Valid: {count}, Invalid: 0, Errors: 0, Skipped: 0" in checked.stdout


def test_a_field_that_kubernetes_does_not_know_would_be_seen(
    everything: dict[str, Objects], check: Callable[[str, Mapping[str, Objects]], subprocess.CompletedProcess[str]]
) -> None:
    deployment = next(one for one in everything["engines"] if one["kind"] == "Deployment")
    checked = check(NEWEST, {"wrong": [deployment | {"spec": deployment["spec"] | {"replica": 8}}]})
    assert checked.returncode == 1
    assert "additional properties 'replica' not allowed" in checked.stdout


def test_helm_3_renders_what_helm_4_renders(everything: dict[str, Objects], render: Callable[..., Objects]) -> None:
    for name in ("engines", "engines with a download", "router with monitors"):
        assert render(*VARIANTS[name], helm="helm3") == everything[name], name


def test_the_suites_beside_the_charts_pass(call: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    charts = sorted(str(path.parent) for path in ROOT.glob("charts/*/Chart.yaml"))
    done = call("helm-unittest", "--strict", *charts)
    assert done.returncode == 0, done.stdout
    assert f"Charts:      {len(charts)} passed, {len(charts)} total" in done.stdout
    assert all(list((ROOT / "charts" / chart / "tests").glob("*_test.yaml")) for chart in charts)


def test_helm_finds_nothing_to_say_about_the_charts(call: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    for name in ("engines", "router", "llm-d", "vllm-router"):
        chart, *arguments = VARIANTS[name]
        done = call("helm", "lint", "--strict", f"charts/{chart}", *arguments)
        assert done.returncode == 0, done.stdout


def test_schemas_readmes_and_the_rendered_deployment_follow_from_their_sources(
    tools: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    script = ROOT / "scripts/charts.py"
    done = subprocess.run(
        [sys.executable, script, "--check", tmp_path], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr


def test_a_stale_readme_is_noticed(tools: pathlib.Path, tmp_path: pathlib.Path) -> None:
    there = tmp_path / "repository"
    for part in ("charts", "values", "scripts", "tests/charts/rendered"):
        shutil.copytree(ROOT / part, there / part)
    shutil.copy(ROOT / "helmfile.yaml", there)
    (there / ".tools").symlink_to(ROOT / ".tools")
    values = there / "charts/pd-router/values.yaml"
    values.write_text(values.read_text().replace("# -- Port of the OpenAI API.", "# -- Where clients come."))
    done = subprocess.run(
        [sys.executable, there / "scripts/charts.py", "--check", tmp_path / "copy"],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 1
    assert "charts/pd-router/README.md is not what its sources say; call make charts" in done.stderr
    assert "charts/pd-router/values.schema.json is not" in done.stderr
    assert "llama31-8b.yaml" not in done.stderr
