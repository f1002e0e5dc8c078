"""The report in a real browser: no error, no request, and the curves are drawn; wide and on a phone, light and dark."""

import json
import shutil

import pytest
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By

from qlora_lightning.report.page import render_comparison, write_run_page
from qlora_lightning.report.run import read_run

pytestmark = pytest.mark.slow
_FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--hide-scrollbars"),
)
HOSTILE = "</script><script>document.title = 'taken'</script><img src=x onerror=\"document.title='taken'\">"


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


@pytest.fixture
def open_page(browser):
    """Open a file as wide as asked, light or dark."""

    def show(file, width=1200, scheme="light"):
        browser.get_log("browser"), browser.get_log("performance")
        browser.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600},
        )
        media = [{"name": "prefers-color-scheme", "value": scheme}]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": media})
        browser.get(file.as_uri())

    return show


@pytest.fixture
def page(make_run):
    sample = {"prompt": HOSTILE, "expected": "1", "base": HOSTILE, "adapter": "1"}
    compared = {"metrics": {"loss": {"base": {"value": 2.0}, "adapter": {"value": 0.5}}}, "samples": [sample]}
    return write_run_page(make_run(steps=200, evaluation=compared, warnings=[{"text": HOSTILE, "count": 1}]))


@pytest.fixture
def comparison(make_run, tmp_path):
    runs = [read_run(make_run(f"run-{number}", steps=100 + number, config={"a": number})) for number in range(3)]
    file = tmp_path / "comparison.html"
    file.write_text(render_comparison(runs), encoding="utf-8")
    return file


def requests(browser):
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    return [
        message["params"]["request"]["url"] for message in messages if message["method"] == "Network.requestWillBeSent"
    ]


@pytest.mark.parametrize("name", ["page", "comparison"])
def test_no_error_is_logged_and_no_request_leaves_the_page(browser, open_page, request, name):
    file = request.getfixturevalue(name)
    open_page(file)
    assert requests(browser) == [file.as_uri()]
    assert [entry["message"] for entry in browser.get_log("browser")] == []
    assert browser.title != "taken"
    assert len(browser.find_elements(By.TAG_NAME, "script")) == 1


def test_every_curve_is_drawn_inside_its_plot(browser, open_page, page):
    open_page(page)
    figures = browser.find_elements(By.CSS_SELECTOR, "figure.chart")
    assert len(figures) == 5
    for figure in figures:
        (outer,) = [plot.rect for plot in figure.find_elements(By.CSS_SELECTOR, ".plot svg") if plot.is_displayed()]
        curves = figure.find_elements(By.CSS_SELECTOR, "path[style*='var(--c']")
        assert curves
        for curve in (curve for curve in curves if curve.is_displayed()):
            box = browser.execute_script("return arguments[0].getBoundingClientRect().toJSON()", curve)
            assert outer["x"] <= box["left"] <= box["right"] <= outer["x"] + outer["width"] + 1
            assert outer["y"] - 1 <= box["top"] <= box["bottom"] <= outer["y"] + outer["height"]


def test_hovering_tells_the_values_of_the_nearest_step(browser, open_page, page):
    open_page(page)
    figure = browser.find_element(By.CSS_SELECTOR, "figure.chart")
    plot, tip = figure.find_element(By.CSS_SELECTOR, ".plot svg"), figure.find_element(By.CSS_SELECTOR, ".tip")
    assert not tip.is_displayed()
    ActionChains(browser).move_to_element_with_offset(plot, plot.rect["width"] // 2 - 12, 0).perform()
    assert tip.is_displayed()
    head, *lines = tip.text.splitlines()
    assert head == "step 200"
    assert lines[-1] == "validation 0.505"  # 1.5 - 199 / 200
    ActionChains(browser).move_to_element(browser.find_element(By.TAG_NAME, "h1")).perform()
    assert not tip.is_displayed()


@pytest.mark.parametrize("name", ["page", "comparison"])
def test_a_phone_shows_it_without_scrolling_sideways_and_with_readable_text(browser, open_page, request, name):
    open_page(request.getfixturevalue(name), width=390)
    assert browser.execute_script("return document.documentElement.scrollWidth") == 390
    ticks = [tick for tick in browser.find_elements(By.CSS_SELECTOR, ".plot text") if tick.is_displayed()]
    assert min(tick.rect["height"] for tick in ticks) >= 12


def test_dark_and_light_follow_what_the_reader_prefers(browser, open_page, page):
    grounds = []
    for scheme in ("light", "dark"):
        open_page(page, scheme=scheme)
        colour = browser.find_element(By.TAG_NAME, "body").value_of_css_property("background-color")
        grounds.append(sum(int(part) for part in colour.removeprefix("rgba(").split(",")[:3]))
    assert grounds[0] > 600
    assert grounds[1] < 150
