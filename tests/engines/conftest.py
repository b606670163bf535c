"""Real engines for one run; skipped where they are not installed."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from engines.real import Engines, Installation
from support.processes import until

_MEASURED: list[str] = []


@pytest.fixture(scope="session")
def measured() -> Callable[[str], None]:
    """Take a line with a measurement; all are printed at the end of the run."""
    return _MEASURED.append


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _MEASURED:
        terminalreporter.section("measured on real engines (CPU build)")
        for line in _MEASURED:
            terminalreporter.line(line)


@pytest.fixture(scope="session")
def installation() -> Installation:
    folder = os.environ.get("VLLM", "")
    if not folder:
        pytest.skip("needs real vLLM: make test-engines VLLM=DIR, DIR holding venv (vLLM's CPU build, NIXL) and model")
    found = Installation(Path(folder).resolve())
    assert (found.folder / "venv/bin/vllm").exists(), f"no venv/bin/vllm in {folder}; is VLLM the right folder?"
    return found


@pytest.fixture(scope="session")
def started(installation: Installation) -> Iterator[Engines]:
    make = installation.engine
    decodes = [make("decode", lease=6), make("decode")]  # one keeps short leases, too
    made = Engines(installation, make("prefill"), decodes, make("plain"))
    try:
        for one in made.all:
            one.start()
        for one in made.all:
            one.up()
        yield made
    finally:
        for one in made.all:
            one.stop()


@pytest.fixture
def engines(started: Engines) -> Engines:
    """All engines, alive and at rest; one that a test killed is another life by now."""
    for one in started.all:
        one.revive()
    until(started.quiet, 60, "what the test before left behind has ended")
    return started
