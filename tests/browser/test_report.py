"""Reports in a real Chromium: every chart drawn, no network, no errors, keyboard, contrast, phone, paper."""

import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, sync_playwright

from pdctl.app import main
from pdctl.report.write import gathered, write
from pdctl.runs import Run
from support import stored

KINDS: dict[str, Callable[[Path], Run]] = {
    "bench": lambda folder: stored.bench(folder, failed=2),
    "compare": stored.compare,
    "sweep": stored.sweep,
    "eval": stored.evaluation,
}
CHARTS = {"bench": 9, "compare": 12, "sweep": 3, "eval": 1}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("needs Chromium: make tools installs it where it may, else install it by hand")
    with sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield made
        made.close()


@pytest.fixture(params=list(KINDS))
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def path(kind: str, tmp_path: Path) -> Path:
    run = KINDS[kind](tmp_path / "run")
    write(run, tmp_path / "report.html")
    return tmp_path / "report.html"


def opened(browser: Browser, path: Path, **how: object) -> Page:
    """Open a page; it fails on anything that it asks of a network and on every word on the console."""
    context = browser.new_context(**how)  # type: ignore[arg-type]
    page = context.new_page()
    wrong: list[str] = []
    page.on("console", lambda message: wrong.append(message.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda request: wrong.append(request.url) if not request.url.startswith(("file:", "data:")) else None)  # fmt: skip # noqa: E501
    page.goto(path.as_uri())
    page.wait_for_function("document.querySelectorAll('[data-chart] svg').length > 0")
    assert wrong == []
    return page


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_chart_is_drawn_without_network_or_errors_and_can_be_read(
    browser: Browser, path: Path, kind: str, scheme: str
) -> None:
    page = opened(browser, path, color_scheme=scheme)
    charts = page.query_selector_all("[data-chart]")
    assert len(charts) == CHARTS[kind]
    for chart in charts:
        assert len(chart.query_selector_all("svg path")) > 3, chart.get_attribute("data-chart")
        assert chart.query_selector_all("svg text")
    found = Axe().run(page)
    assert found.violations_count == 0, found.generate_report()
    assert page.evaluate("document.documentElement.dataset.theme") == scheme
    page.context.close()


def test_it_fits_a_phone(browser: Browser, path: Path) -> None:
    page = opened(browser, path, viewport={"width": 360, "height": 740})
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    for chart in page.query_selector_all("[data-chart] svg"):
        box = chart.bounding_box()
        assert box is not None
        assert 200 < box["width"] <= 360
    page.context.close()


def test_the_keyboard_reaches_everything(browser: Browser, path: Path) -> None:
    page = opened(browser, path)
    reached = set()
    for _ in range(80):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.tagName + '.' + (document.activeElement.className || '')"))
    assert {"A.skip", "SELECT.", "SUMMARY.", "PRE."} <= reached
    page.focus("summary")
    page.keyboard.press("Enter")
    assert page.evaluate("document.querySelector('details').open")
    page.select_option("#theme", "dark")
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    page.context.close()


def test_paper_is_light_and_has_every_chart(browser: Browser, path: Path, kind: str) -> None:
    page = opened(browser, path, color_scheme="dark")
    assert page.pdf(format="A4").startswith(b"%PDF")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.evaluate("document.documentElement.dataset.theme") == "light"
    assert len(page.query_selector_all("[data-chart] svg")) == CHARTS[kind]
    page.context.close()


def test_what_a_server_said_is_text_and_not_markup(browser: Browser, tmp_path: Path) -> None:
    run = stored.bench(tmp_path / "run", failed=3)
    write(run, tmp_path / "report.html")
    page = opened(browser, tmp_path / "report.html")
    page.query_selector_all("#failures summary")[0].click()
    assert "status 503: <script>alert(1)</script>" in page.inner_text("#failures table")
    page.context.close()


def test_simulated_engines_are_said_first_in_both_forms(kind: str, tmp_path: Path) -> None:
    run = KINDS[kind](tmp_path / "run")
    assert gathered(run).banner
    for name in ("report.html", "report.md"):
        write(run, tmp_path / name)
        text = (tmp_path / name).read_text()
        assert text.index("Engines are SIMULATED") < text.index(
            "Headline figures</h2>" if name[-1] == "l" else "## Head"
        )


def test_a_replay_has_such_a_page_too(browser: Browser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "replay.html"
    words = ("synthetic:agents", "--requests", "60", "--split", "2:2", "--speed", "1,2", "--seeds", "2")
    monkeypatch.setattr(sys, "argv", ["pdctl", "replay", *words, "--report", str(path)])
    with pytest.raises(SystemExit):
        main()
    page = opened(browser, path)
    assert len(page.query_selector_all("[data-chart] svg")) == 7
    assert "2:2 at 2x: pd_cost instead of llmd_pd_guide would have " in page.inner_text(".says")
    assert page.inner_text(".banner").startswith("Engines are SIMULATED")
    found = Axe().run(page)
    assert found.violations_count == 0, found.generate_report()
    page.context.close()
