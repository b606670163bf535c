"""The documentation says what the programs say."""

import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]


def test_the_reference_page_is_what_the_programs_help_says() -> None:
    checked = subprocess.run([sys.executable, ROOT / "scripts/reference.py", "--check"], check=False)
    assert checked.returncode == 0, "run make docs"


def test_every_make_target_that_the_documents_name_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    documents = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
    named = {name for path in documents for name in re.findall(r"`make ([a-z-]+)`", path.read_text())}
    assert named
    assert named <= targets


def test_every_pdctl_command_that_the_readme_shows_exists() -> None:
    shown = set(re.findall(r"^pdctl ([a-z]+)", (ROOT / "README.md").read_text(), re.MULTILINE))
    reference = (ROOT / "docs/reference.md").read_text()
    assert shown
    assert {name for name in shown if f"## pdctl {name}" not in reference} == set()
