"""The report in a real browser: no error, no request; the curves are drawn, in light and dark, wide and on a phone."""

import json
import re
import shlex
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By

from qlora_lightning.report import read_run, render_report
from tests.report.conftest import write_run

no_browser = pytest.mark.skipif(shutil.which("chromedriver") is None, reason="takes chromium and chromedriver")
pytestmark = [pytest.mark.slow, no_browser]
_ROOT = Path(__file__).parents[2]
_FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--hide-scrollbars"),
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for flag in (*_FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    service = webdriver.ChromeService(shutil.which("chromedriver"))  # named, so that selenium looks for none
    found = webdriver.Chrome(options=options, service=service)
    found.get("about:blank")  # away from the browser's own first page, which asks for much
    yield found
    found.quit()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """The page of one run, and that of three."""
    folder = tmp_path_factory.mktemp("runs")
    runs = [read_run(write_run(folder / f"run-{n}", steps=200 + n, config={"a": n})) for n in range(3)]
    files = {"one": folder / "one.html", "several": folder / "several.html"}
    files["one"].write_text(render_report(runs[:1]), encoding="utf-8")
    files["several"].write_text(render_report(runs), encoding="utf-8")
    return files


@pytest.fixture
def open_page(browser, pages):
    """Open a page as wide as asked; return its file."""

    def show(name, width=1200, scheme="light"):
        browser.get_log("browser"), browser.get_log("performance")
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        browser.get(pages[name].as_uri())
        return pages[name]

    return show


@pytest.mark.parametrize("name", ["one", "several"])
def test_no_error_is_logged_and_no_request_leaves_the_page(browser, open_page, name):
    file = open_page(name)
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    requests = [message["params"] for message in messages if message["method"] == "Network.requestWillBeSent"]
    assert [request["request"]["url"] for request in requests] == [file.as_uri()]
    assert [entry["message"] for entry in browser.get_log("browser")] == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_curve_is_drawn_inside_its_plot(browser, open_page, scheme):
    open_page("one", scheme=scheme)
    figures = browser.find_elements(By.CSS_SELECTOR, "figure")
    assert len(figures) == 5
    for figure in figures:
        svg = figure.find_element(By.CSS_SELECTOR, "svg")
        assert ("invert" in svg.value_of_css_property("filter")) == (scheme == "dark")
        outer = svg.rect
        curves = figure.find_elements(By.CSS_SELECTOR, "path[style*='stroke-linecap: round']")
        assert curves
        for curve in (curve for curve in curves if curve.is_displayed()):
            box = browser.execute_script("return arguments[0].getBoundingClientRect().toJSON()", curve)
            assert outer["x"] <= box["left"] <= box["right"] <= outer["x"] + outer["width"] + 1
            assert outer["y"] - 1 <= box["top"] <= box["bottom"] <= outer["y"] + outer["height"]


@pytest.mark.parametrize("name", ["one", "several"])
def test_a_phone_shows_it_without_scrolling_sideways_and_with_readable_text(browser, open_page, name):
    open_page(name, width=390)
    assert browser.execute_script("return document.documentElement.scrollWidth") == 390
    ticks = browser.find_elements(By.CSS_SELECTOR, "svg text")
    assert min(tick.rect["height"] for tick in ticks) >= 12


def _png_size(file):
    """Width and height in pixels, from the header."""
    return struct.unpack(">II", file.read_bytes()[16:24])


def test_the_readme_names_the_command_that_drew_its_picture(pages, tmp_path):
    readme = (_ROOT / "README.md").read_text(encoding="utf-8")
    command = re.search(r"^chromium .*", readme, flags=re.MULTILINE)[0]
    arguments = shlex.split(command.replace("runs/quickstart/report.html", pages["one"].as_uri()))
    arguments[1:1] = ["--no-sandbox", f"--user-data-dir={tmp_path / 'profile'}"]  # root may use it only so
    subprocess.run(arguments, cwd=tmp_path, check=True, capture_output=True, timeout=120)

    picture = _ROOT / re.search(r'<img src="([^"]+)"', readme)[1]
    assert _png_size(tmp_path / "report.png") == _png_size(picture)
