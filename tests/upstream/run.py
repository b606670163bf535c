"""vllm-router's own integration tests with our router in place of theirs (`make upstream-tests ROUTER=DIR`).

DIR is a checkout of vllm-project/router; its tests and its mock worker are used as they are. What they start as
vllm-router is `vllm_router/launch_router.py` beside this file. `outcomes.toml` tells which of them pass and why others
do not apply; any other outcome, and any test that it does not have, ends this program with status 1.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn
from xml.etree import ElementTree

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
BUILD = ROOT / ".build" / "upstream-tests"
RESULT = BUILD / "junit.xml"
TESTS = "py_test/integration"
MOST_SECONDS = 120  # for one test; its own requests may wait for ever


def _fail(message: str) -> NoReturn:
    print(f"upstream-tests: {message}", file=sys.stderr)
    sys.exit(1)


@dataclass(frozen=True)
class Expected:
    """What `outcomes.toml` says."""

    passes: Mapping[str, str]
    does_not_apply: Mapping[str, str]
    not_run: Mapping[str, str]

    def row(self, test: str) -> tuple[str, str]:
        """Give outcome and remark of a test; both empty when it is unknown."""
        if test in self.passes:
            return "passes", self.passes[test]
        remark = self.does_not_apply.get(test) or self.not_run.get(test)
        return ("does not apply", remark) if remark else ("", "")


def expected() -> Expected:
    """Read `outcomes.toml`."""
    return Expected(**tomllib.loads((HERE / "outcomes.toml").read_text(encoding="utf-8")))


def install() -> Path:
    """Give the environment of the tests its packages (group `upstream` of `uv.lock`); give its folder of programs."""
    bins = ROOT / ".venv" / "bin"
    command: list[str | Path] = [
        bins / "uv",
        "sync",
        "--quiet",
        "--frozen",
        "--only-group",
        "upstream",
        "--python",
        bins / "python",
    ]
    subprocess.run(command, check=True, cwd=ROOT, env=os.environ | {"UV_PROJECT_ENVIRONMENT": str(BUILD / "venv")})
    return BUILD / "venv" / "bin"


def run(checkout: Path, bins: Path, not_run: Mapping[str, str]) -> dict[str, str]:
    """Run the tests; give each one's failure, or nothing for those that passed."""
    RESULT.unlink(missing_ok=True)
    environment = os.environ | {
        "PATH": f"{bins}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(HERE), "PYTHONDONTWRITEBYTECODE": "1",
        "PD_ROUTER": os.environ.get("PD_ROUTER", str(ROOT / ".venv" / "bin" / "pd-router")),
    }  # fmt: skip
    command: list[str | Path] = [
        bins / "python",
        "-m",
        "pytest",
        TESTS,
        "-v",
        "--no-header",
        "--tb=no",
        "-p",
        "no:cacheprovider",
    ]
    command += [f"--timeout={MOST_SECONDS}", f"--junitxml={RESULT}", "-o", "junit_logging=all"]
    command += [f"--deselect={TESTS}/{test}" for test in not_run]
    tests = subprocess.Popen(command, cwd=checkout, env=environment, start_new_session=True)
    try:
        tests.wait()
    finally:
        with suppress(ProcessLookupError):  # their fixtures forget a mock worker that takes too long to start
            os.killpg(tests.pid, signal.SIGKILL)
    if not RESULT.exists():
        _fail("pytest did not get as far as running the tests; see above")
    return outcomes(ElementTree.parse(RESULT))


def outcomes(result: "ElementTree.ElementTree[ElementTree.Element]") -> dict[str, str]:
    """Read a JUnit report: test, and why it did not pass."""
    told: dict[str, str] = {}
    for case in result.iter("testcase"):
        module = case.get("classname", "").removeprefix(TESTS.replace("/", ".") + ".").replace(".", "/")
        why = [f"{part.tag}: {part.get('message', '')}" for part in case if part.tag in ("failure", "error", "skipped")]
        told[f"{module}.py::{case.get('name')}"] = " ".join(" ".join(why).split())
    return told


def surprises(told: Mapping[str, str], known: Expected) -> list[str]:
    """Say what is not as expected."""
    found = []
    for test, why in told.items():
        outcome, _ = known.row(test)
        if not outcome:
            found.append(f"{test}: not in outcomes.toml; it {'passes' if not why else f'does not pass ({why})'}")
        elif outcome == "passes" and why:
            found.append(f"{test}: should pass, but {why}")
        elif outcome != "passes" and not why:
            found.append(f"{test}: passes, so it does apply; move it in outcomes.toml")
    return found


def _commit(checkout: Path) -> str:
    def git(*words: str) -> str:
        command = ["git", "-C", str(checkout), *words]
        return subprocess.run(command, check=False, capture_output=True, text=True).stdout.strip()

    described = git("log", "-1", "--format=`%H` (%cs)")
    changed = " with local changes" if git("status", "--porcelain", "--", "py_test") else ""
    return f"commit {described}{changed}" if described else "no git checkout"


def summary(told: Mapping[str, str]) -> str:
    """Count."""
    passed = sum(not why for why in told.values())
    return f"{passed} of {len(told)} tests pass"


def table(told: Mapping[str, str], known: Expected, commit: str) -> str:
    """Give the outcomes as Markdown."""
    lines = [
        f"vllm-project/router, {commit}; run on {time.strftime('%Y-%m-%d')}: {summary(told)}, "
        f"{sum(bool(why) for why in told.values())} do not apply.",
        "",
        "| test | outcome | remark |",
        "|---|---|---|",
    ]
    listed = {**known.passes, **known.does_not_apply, **known.not_run}
    for test in sorted(listed):
        outcome, remark = known.row(test)
        here = outcome if test in told else f"not in this commit ({outcome})"
        lines.append(f"| `{test}` | {here} | {remark} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Install, run, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, nargs="?", help="a checkout of vllm-project/router")
    parser.add_argument("--report", type=Path, help="write the table as Markdown between the marks in this file")
    asked = parser.parse_args()
    if asked.checkout is None or not (asked.checkout / TESTS).is_dir():
        where = f"{asked.checkout} has no {TESTS}" if asked.checkout else "no checkout is given"
        _fail(f"{where}; git clone https://github.com/vllm-project/router DIR, then make upstream-tests ROUTER=DIR")
    known = expected()
    told = run(asked.checkout.resolve(), install(), known.not_run)
    found = surprises(told, known)
    for one in found:
        print(f"not as expected: {one}")
    print(f"{summary(told)}; details: {RESULT}")
    if found:
        sys.exit(1)
    if asked.report is not None:
        before, _, rest = asked.report.read_text(encoding="utf-8").partition("<!-- outcomes -->\n")
        _, _, after = rest.partition("<!-- end -->")
        rows = table(told, known, _commit(asked.checkout))
        asked.report.write_text(f"{before}<!-- outcomes -->\n{rows}<!-- end -->{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
