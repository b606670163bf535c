"""A cluster for the tests of this folder: one control plane for all, a namespace for each."""

import contextlib
import uuid
from collections.abc import Iterator

import pytest

from .control_plane import BIN, Cluster, ClusterError, ControlPlane, NotPossible
from .fake_nodes import fake_cluster


@pytest.fixture(scope="package")  # it is not left to itself while the process runs other tests
def cluster() -> Iterator[ControlPlane]:
    """Give a control plane with two fake nodes of 8 GPUs, whose pods run as local processes."""
    with contextlib.ExitStack() as held:
        try:
            plane = held.enter_context(fake_cluster())
        except NotPossible as error:
            pytest.skip(str(error))
        except ClusterError as error:
            pytest.fail(str(error), pytrace=False)
        pools = BIN.parent / "schemas/inferencepools.yaml"  # as its module publishes it
        applied = plane.run("kubectl", "apply", "--server-side", "-f", str(pools))
        assert applied.returncode == 0, applied.stderr
        listed = "/apis/inference.networking.k8s.io/v1/inferencepools"
        plane.until(lambda: plane.api.get(listed).is_success, "the API knows InferencePool")
        yield plane


@pytest.fixture
def namespace(cluster: Cluster) -> Iterator[str]:
    """Give a namespace of the test's own."""
    name = f"t-{uuid.uuid4().hex[:8]}"
    made = {"metadata": {"name": name}}
    cluster.api.post("/api/v1/namespaces", json=made).raise_for_status()
    account = f"/api/v1/namespaces/{name}/serviceaccounts/default"
    cluster.until(lambda: cluster.api.get(account).is_success, "the namespace is complete")
    yield name
    cluster.api.delete(f"/api/v1/namespaces/{name}").raise_for_status()
