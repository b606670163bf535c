"""How `make test` shares the tests among processes (pytest-xdist): in each they run one after another."""

from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

FIRST = {
    # They wait most of the time, and take longest: no process is to be left with one of them when others are done.
    "tests/cluster/test_pdctl_failures.py::test_an_api_server_that_is_away": "pdctl without an API server",
    "tests/cluster/test_pdctl_": "pdctl on a cluster",
    "tests/cluster/test_charts": "charts on a cluster",
    "tests/cluster/test_fake_nodes": "charts on a cluster",
    "tests/cluster/test_routing": "charts on a cluster",
    "tests/cluster/": "other clusters",
    # Each of these looks for loopback addresses that are free before it takes them: never two at once.
    "tests/cli/test_eval": "local deployments",
    "tests/cli/test_local": "local deployments",
    "tests/cli/test_compare": "local deployments",
    "tests/cli/test_sweep": "local deployments",
}
LAST = {
    # What they measure is only judged where engines run in real time, so where little else runs.
    "tests/timing/test_calibrate": "real time",
    "tests/virtual/test_validation": "real time",
}
"""Groups that stay in one process, by how their tests' ids begin; of all others each file is a group."""


def placed(nodeid: str) -> tuple[int, str]:
    """Give when a test's group comes, and its name."""
    for rank, (begin, group) in enumerate(FIRST.items()):
        if nodeid.startswith(begin):
            return rank, group
    for begin, group in LAST.items():
        if nodeid.startswith(begin):
            return len(FIRST) + 1, group
    return len(FIRST), nodeid.partition("::")[0]


class Groups(LoadScopeScheduling):
    """Gives processes whole groups, one after another."""

    def _split_scope(self, nodeid: str) -> str:
        return placed(nodeid)[1]


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Groups:
    """Share groups in the order in which they were collected."""
    config.option.loadscopereorder = False
    return Groups(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put groups into their order."""
    items.sort(key=lambda item: placed(item.nodeid)[0])
