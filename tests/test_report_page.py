"""The report in a real browser: no errors, no requests, sorting, a phone's width, print. Skipped without Chromium.

FASTCIFAR_REQUIRE_BROWSER=1 (as in .ci/run) fails these tests where there is no browser instead of skipping them.
"""

import base64
import json
import os
import shutil

import pytest

from bench.report import write_reports
from bench.results import Results
from tests.bench_results import make_results
from tests.test_report import hostile_results

pytestmark = pytest.mark.slow

PHONE, DESKTOP = 390, 1280  # pixels
OPTIONS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--host-resolver-rules=MAP * ~NOTFOUND",  # whatever is asked for, no network answers
]  # fmt: skip


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """A headless Chromium with its console and its requests recorded."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    if not chromium or not driver:
        absent = pytest.fail if os.environ.get("FASTCIFAR_REQUIRE_BROWSER") == "1" else pytest.skip
        absent("no chromium and chromedriver here: apt-get install chromium chromium-driver")
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for option in [*OPTIONS, f"--user-data-dir={tmp_path_factory.mktemp('browser')}"]:
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("no_proxy", "*")  # the driver is on this machine
        chrome = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=driver))
    chrome.get("about:blank")  # the browser's start page asks for things of its own
    yield chrome
    chrome.quit()


def show(browser, path, width=DESKTOP):
    """Open a page as a screen so many pixels wide shows it (a window's own minimum is wider than a phone)."""
    metrics = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
    browser.get(path.as_uri())


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Pages by what is in them."""
    results = {"whole": make_results(), "hostile": hostile_results(), "empty": Results({}, {}, {})}
    folder = tmp_path_factory.mktemp("pages")
    for name, values in results.items():
        (folder / name).mkdir()
        write_reports(folder / name, values)
    return {name: folder / name / "report.html" for name in results}


@pytest.mark.parametrize("name", ["whole", "hostile", "empty"])
def test_it_renders_at_every_width_without_errors_or_requests(browser, pages, name):
    browser.get_log("browser"), browser.get_log("performance")  # what earlier pages left
    for width in (320, PHONE, 768, DESKTOP):
        show(browser, pages[name], width)
        assert browser.execute_script("return document.scrollingElement.scrollWidth") <= width
        too_wide = """
            const inside = (element) => element.closest(".scroll, svg");
            return [...document.body.querySelectorAll("*")]
                .filter((element) => !inside(element) && element.getBoundingClientRect().right > innerWidth + 0.5)
                .map((element) => element.outerHTML.slice(0, 120));
        """
        assert browser.execute_script(too_wide) == []
    assert browser.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    requests = [event["params"] for event in events if event["method"] == "Network.requestWillBeSent"]
    asked = [each["request"]["url"] for each in requests if not each["documentURL"].startswith(("about:", "chrome:"))]
    assert {url for url in asked if not url.startswith("data:")} == {pages[name].as_uri()}  # data: pictures in the page


def test_a_phone_shows_minutes_and_accuracy_first_and_texts_large_enough_to_read(browser, pages):
    show(browser, pages["whole"], PHONE)
    shown = browser.execute_script("""
        return [...document.querySelector("table.sortable").tHead.rows[0].cells]
            .filter((cell) => cell.getBoundingClientRect().right <= innerWidth).map((cell) => cell.textContent);
    """)
    assert shown == ["Variant", "Min/epoch", "Top-1, %"]
    smallest = """
        return Math.min(...[...document.querySelectorAll("svg text")].map((text) => {
            const screen = text.getScreenCTM();  // a turned one too
            return parseFloat(getComputedStyle(text).fontSize) * Math.hypot(screen.a, screen.b);
        }));
    """
    assert browser.execute_script(smallest) >= 8


def column(browser, table, number):
    script = "return [...document.querySelectorAll('table.sortable')[arguments[0]].tBodies[0].rows]"
    return browser.execute_script(f"{script}.map((row) => row.cells[arguments[1]].dataset.sort ?? null)", table, number)


def headings(browser, table):
    return browser.find_elements("css selector", "table.sortable")[table].find_elements("css selector", "thead button")


def orders(browser, table):
    cells = browser.find_elements("css selector", "table.sortable")[table].find_elements("css selector", "thead th")
    return [cell.get_attribute("aria-sort") for cell in cells]


def test_a_heading_sorts_its_column_by_mouse_and_keyboard(browser, pages):
    show(browser, pages["whole"])
    found = headings(browser, 0)
    assert set(orders(browser, 0)) == {"none"}
    for number, heading in enumerate(found[:4]):
        numeric = number > 0
        for order in ("descending", "ascending") if numeric else ("ascending", "descending"):
            heading.click() if number < 2 else heading.send_keys("\ue007" if number == 2 else " ")
            assert orders(browser, 0) == [order if place == number else "none" for place in range(len(found))]
            values = column(browser, 0, number)
            assert values == sorted(values, key=float if numeric else str, reverse=order == "descending")
    parameters = next(place for place, heading in enumerate(headings(browser, 1)) if heading.text.startswith("Parameters"))
    headings(browser, 1)[parameters].click()
    assert [float(value) for value in column(browser, 1, parameters)][:2] == [11_173_962, 4_999_535]  # not as text
    reached = headings(browser, 2)
    (place,) = (place for place, heading in enumerate(reached) if heading.text.startswith("Seconds"))
    for _ in range(2):
        reached[place].click()
        values = column(browser, 2, place)
        assert 0 < values.count(None) < 9
        assert values[-values.count(None) :] == [None] * values.count(None)  # last in either order


def test_it_reads_without_scripts(browser, pages):
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        show(browser, pages["whole"])
        assert len(browser.find_elements("css selector", "table.sortable tbody tr")) == 27
    finally:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


def test_print_loses_no_column(browser, pages):
    show(browser, pages["whole"])
    assert base64.b64decode(browser.execute_cdp_cmd("Page.printToPDF", {"preferCSSPageSize": True})["data"])[:5] == b"%PDF-"
    paper = {"width": 703, "height": 1000, "deviceScaleFactor": 1, "mobile": False}  # A4 within its margins, at 96 px an inch
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", paper)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    assert browser.execute_script("return getComputedStyle(document.body).color") == "rgb(0, 0, 0)"
    assert browser.execute_script("return document.scrollingElement.scrollWidth") <= 703
