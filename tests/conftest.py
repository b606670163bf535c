"""How `make test` shares the tests among processes (pytest-xdist): in each they run one after another."""

from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

GROUPS = {
    # They wait a lot, and take longest: no process is to be left with one of them when the others are done.
    "tests/cluster/test_pdctl_failures.py::test_an_api_server_that_is_away": "a cluster without an API server",
    "tests/cluster/test_pdctl_failures": "a cluster for failures",
    "tests/cluster/": "a cluster",
    "tests/cluster/test_real_nodes": "real nodes",
    "tests/cluster/test_left_overs": "clusters that are killed",
    # Each of these looks for loopback addresses that are free before it takes them: never two at once.
    "tests/cli/test_eval": "local deployments",
    "tests/cli/test_local": "local deployments",
    "tests/cli/test_compare": "local deployments",
    "tests/cli/test_sweep": "local deployments",
    "tests/cli/test_router_switch": "local deployments",
    # Of all others each file is a group.
    "": "",
    # What they measure is only judged where engines run in real time, so where little else runs.
    "tests/timing/test_calibrate": "real time",
    "tests/virtual/test_validation": "real time",
}
"""Which process runs a test, by the longest beginning of its id, in the order in which they begin."""


def placed(nodeid: str) -> tuple[int, str]:
    """Give when a test's group begins, and its name."""
    begin = max((begin for begin in GROUPS if nodeid.startswith(begin)), key=len)
    return list(GROUPS).index(begin), GROUPS[begin] or nodeid.partition("::")[0]


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
