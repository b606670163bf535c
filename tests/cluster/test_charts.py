"""A real API takes what the charts render, in every variant, and its own rules hold."""

import json
from typing import Any

import pytest
import yaml

from charts.variants import VARIANTS

from .control_plane import BIN, Cluster
from .releases import Releases

OPERATORS = {"PodMonitor", "ServiceMonitor", "PrometheusRule", "ScaledObject"}
"""Kinds that this API does not know; their schemas are checked in tests/charts."""
PRIVILEGED = {"engines on InfiniBand", "engines on RoCE", "engines on EFA"}
"""They lock memory as root, so they need a namespace that lets them."""


@pytest.fixture
def restricted(cluster: Cluster, namespace: str) -> str:
    """Give a namespace of the restricted pod security level."""
    labels = {f"pod-security.kubernetes.io/{mode}": "restricted" for mode in ("enforce", "warn")}
    cluster.api.patch(
        f"/api/v1/namespaces/{namespace}",
        json={"metadata": {"labels": labels}},
        headers={"Content-Type": "application/merge-patch+json"},
    ).raise_for_status()
    return namespace


def _list(objects: list[Any]) -> str:
    return json.dumps({"apiVersion": "v1", "kind": "List", "items": objects})


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_api_takes_every_variant_and_pods_are_of_the_restricted_level(
    variant: str, cluster: Cluster, restricted: str
) -> None:
    here = Releases(cluster, restricted)
    chart, *arguments = VARIANTS[variant]
    rendered = here.helm("template", "ms-llama31", f"charts/{chart}", *arguments).stdout
    objects = [one for one in yaml.safe_load_all(rendered) if one and one["kind"] not in OPERATORS]
    for one in objects:  # a Role for engines of another namespace stays where it can be looked at
        one["metadata"]["namespace"] = restricted
    # A pod (that of `helm test`) is refused before its account exists.
    if accounts := [one for one in objects if one["kind"] == "ServiceAccount"]:
        here.kubectl("apply", "--server-side", "-f", "-", stdin=_list(accounts))
    taken = cluster.run("kubectl", "apply", "--server-side", "--dry-run=server", "-f", "-", stdin=_list(objects))
    assert taken.returncode == 0, taken.stderr
    assert taken.stdout.count("serverside-applied") == len(objects) >= 5
    violated = "would violate PodSecurity" in taken.stderr
    assert violated == (variant in PRIVILEGED), taken.stderr


def test_budgets_are_computed_and_an_upgrade_changes_only_what_it_is_told(cluster: Cluster, namespace: str) -> None:
    here = Releases(cluster, namespace)
    here.engines("ms-tiny", 2, 2)
    here.until_ready("ms-tiny", 4)
    budgets = f"/apis/policy/v1/namespaces/{namespace}/poddisruptionbudgets"

    def allowed() -> list[int]:
        return [one["status"].get("disruptionsAllowed", 0) for one in cluster.items(budgets)]

    cluster.until(lambda: allowed() == [1, 1], "one pod of each role may be disrupted")
    pods = {one["metadata"]["uid"] for one in here.pods("ms-tiny")}
    here.engines("ms-tiny", 2, 3)
    here.until_ready("ms-tiny", 5)
    assert pods < {one["metadata"]["uid"] for one in here.pods("ms-tiny")}, "those that were there go on"
    here.helm("rollback", "ms-tiny", "1", "--wait", "--timeout", "60s")
    here.until_ready("ms-tiny", 4)


def test_helmfile_brings_the_deployment_up_and_takes_all_of_it_away(cluster: Cluster, namespace: str) -> None:
    here = Releases(cluster, namespace)
    kinds = "all,configmaps,secrets,serviceaccounts,roles,rolebindings,networkpolicies,pdb,endpointslices,pvc,hpa"
    before = here.kubectl("get", kinds, "-o", "name")
    helmfile = ("--helm-binary", str(BIN / "helm"), "-n", namespace, "--state-values-set", "model=small")
    done = cluster.run("helmfile", *helmfile, "sync", seconds=180)
    assert done.returncode == 0, done.stderr
    here.until_ready("ms-llama31", 2)
    here.until_ready("vllm-router-llama31", 1)
    done = cluster.run("helmfile", *helmfile, "destroy", seconds=180)
    assert done.returncode == 0, done.stderr
    cluster.until(lambda: here.kubectl("get", kinds, "-o", "name") == before, "nothing is left", 120)


def test_llm_ds_picker_may_read_pods_and_pools_of_its_namespace_and_nothing_else(
    cluster: Cluster, namespace: str
) -> None:
    here = Releases(cluster, namespace)
    rendered = here.helm("template", "llm-d-router", "charts/llm-d-router", values={"engines": {"release": "a"}}).stdout
    rights = [one for one in yaml.safe_load_all(rendered) if one["kind"] in ("ServiceAccount", "Role", "RoleBinding")]
    here.kubectl("apply", "--server-side", "-f", "-", stdin=_list(rights))
    held = here.own_rights("llm-d-router")
    assert held == {
        ("pods", "[get", "list", "watch]"),
        *(
            (f"{kind}.{group}", "[get", "list", "watch]")
            for kind, group in (
                ("inferencepools", "inference.networking.k8s.io"),
                ("inferenceobjectives", "llm-d.ai"),
                ("inferencemodelrewrites", "llm-d.ai"),
                ("inferenceobjectives", "inference.networking.x-k8s.io"),
                ("inferencemodelrewrites", "inference.networking.x-k8s.io"),
            )
        ),
    }
