"""The report in a real browser: no errors, no requests, sorting, a phone's width, print. Skipped without Chromium.

FASTCIFAR_REQUIRE_BROWSER=1 (as in .ci/run) fails these tests where there is no browser instead of skipping them.
"""

import base64
import json
import os
import shutil
from dataclasses import replace

import pytest

from bench.report import write_reports
from bench.schema import Results
from tests.bench_results import make_results

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
    chrome = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=driver))
    yield chrome
    chrome.quit()


def show(browser, path, width=DESKTOP, colours="light"):
    """Open a page as a screen so many pixels wide shows it (a window's own minimum is wider than a phone)."""
    metrics = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    features = {"prefers-color-scheme": colours, "prefers-reduced-motion": "reduce"}  # no scrolling under the pointer
    media = [{"name": name, "value": value} for name, value in features.items()]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "", "features": media})
    browser.get(path.as_uri())


def page_of(folder, results):
    folder.mkdir()
    return write_reports(folder, results)[0]


def hostile_results():
    """Names without a space to break at, longer than a phone is wide, that would be markup if they could."""
    long = "<img src=http://example.com/x onerror=alert(1)>" + "w" * 120
    results = make_results()
    ladder = replace(results.ladder, arch=long, rungs=[replace(r, name=long, note=long) for r in results.ladder.rungs])
    peers = replace(results.peers, entries=[replace(e, name=long, note=long) for e in results.peers.entries])
    arms = [replace(arm, name=long, overrides={long: long}) for arm in results.ablations[0].arms]
    cells = [replace(c, arch=long, error=c.error and long) for c in results.cells if c.arch in ("resnet18", "resnet42")]
    return Results(
        environment={"hardware": long, "command": long}, data={"name": long, "synthetic": True}, settings={long: long},
        variants=[replace(results.variants[0], arch=long, claim=long)], cells=cells, ladder=ladder, peers=peers,
        ablations=[replace(results.ablations[0], name=long, arms=arms)],
    )  # fmt: skip


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Pages by what is in them."""
    folder = tmp_path_factory.mktemp("pages")
    return {
        "whole": page_of(folder / "whole", make_results()),
        "one seed": page_of(folder / "one", make_results(seeds=1, epochs=1)),
        "hostile": page_of(folder / "hostile", hostile_results()),
        "empty": page_of(folder / "empty", Results({}, {}, {})),
    }


NAMES = ["whole", "one seed", "hostile", "empty"]


@pytest.mark.parametrize("colours", ["light", "dark"])
@pytest.mark.parametrize("name", NAMES)
def test_it_renders_without_errors_or_requests(browser, pages, name, colours):
    browser.get_log("browser"), browser.get_log("performance")  # what earlier pages left
    show(browser, pages[name], colours=colours)
    assert browser.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    assert {url for url in asked if not url.startswith("data:")} == {pages[name].as_uri()}
    ground = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(255, 255, 255)") == (colours == "light")


@pytest.mark.parametrize("width", [320, PHONE, 768, DESKTOP])
@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_wider_than_the_screen(browser, pages, name, width):
    show(browser, pages[name], width)
    assert browser.execute_script("return document.scrollingElement.scrollWidth") <= width
    too_wide = """
        const inside = (element) => element.closest(".scroll, .hidden, .shared, .track, svg");
        return [...document.body.querySelectorAll("*")]
            .filter((element) => !inside(element) && element.getBoundingClientRect().right > innerWidth + 0.5)
            .map((element) => element.outerHTML.slice(0, 120));
    """
    assert browser.execute_script(too_wide) == []


def test_texts_of_a_phones_charts_are_large_enough_to_read(browser, pages):
    show(browser, pages["whole"], PHONE)
    smallest = """
        return Math.min(...[...document.querySelectorAll("svg text")].filter((text) => text.getClientRects().length)
            .map((text) => parseFloat(getComputedStyle(text).fontSize) * text.getScreenCTM().a));
    """
    assert browser.execute_script(smallest) >= 9


def column(browser, table, number):
    script = "return [...document.querySelectorAll('table.sortable')[arguments[0]].tBodies[0].rows]"
    return browser.execute_script(f"{script}.map((row) => row.cells[arguments[1]].dataset.sort ?? null)", table, number)


def headings(browser, table):
    return browser.find_elements("css selector", "table.sortable")[table].find_elements("css selector", "thead button")


def orders(browser, table):
    cells = browser.find_elements("css selector", "table.sortable")[table].find_elements("css selector", "thead th")
    return [cell.get_attribute("aria-sort") for cell in cells]


def test_a_click_sorts_by_number_and_a_second_one_turns_it_round(browser, pages):
    show(browser, pages["whole"])
    assert orders(browser, 0)[1] == "descending"
    for number, heading in enumerate(headings(browser, 0)[:6]):
        for order in ("ascending", "descending"):
            heading.click()
            if orders(browser, 0)[number] != order:  # numbers come largest first
                heading.click()
            assert orders(browser, 0) == [order if place == number else "none" for place in range(8)]
            values = column(browser, 0, number)
            key = float if number else str
            assert values == sorted(values, key=key, reverse=order == "descending")
    parameters = next(place for place, heading in enumerate(headings(browser, 1)) if heading.text.startswith("Parameters"))
    headings(browser, 1)[parameters].click()
    assert [float(value) for value in column(browser, 1, parameters)][:2] == [11_173_962, 4_999_535]  # not as text


def test_what_has_no_figure_is_last_in_either_order(browser, pages):
    show(browser, pages["whole"])
    (place,) = (place for place, heading in enumerate(headings(browser, 0)) if heading.text.startswith("To "))
    for _ in range(2):
        headings(browser, 0)[place].click()
        values = column(browser, 0, place)
        missing = values.count(None)
        assert 0 < missing < 9
        assert values[-missing:] == [None] * missing


@pytest.mark.parametrize("key", ["\ue007", " "], ids=["enter", "space"])
def test_the_keyboard_sorts_too(browser, pages, key):
    show(browser, pages["whole"])
    headings(browser, 0)[2].send_keys(key)
    assert orders(browser, 0)[2] == "descending"
    headings(browser, 0)[2].send_keys(key)
    assert orders(browser, 0)[2] == "ascending"
    assert browser.execute_script("return document.activeElement.textContent") == "Images/s"


def test_it_reads_without_scripts(browser, pages):
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        show(browser, pages["whole"])
        assert len(browser.find_elements("css selector", "table.sortable tbody tr")) == 18
    finally:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


def test_print_is_dark_on_white_and_loses_no_column(browser, pages):
    show(browser, pages["whole"], colours="dark")
    assert base64.b64decode(browser.execute_cdp_cmd("Page.printToPDF", {"preferCSSPageSize": True})["data"])[:5] == b"%PDF-"
    paper = {"width": 703, "height": 1000, "deviceScaleFactor": 1, "mobile": False}  # A4 within its margins, at 96 px an inch
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", paper)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    assert browser.execute_script("return getComputedStyle(document.body).color") == "rgb(0, 0, 0)"
    assert browser.execute_script("return document.scrollingElement.scrollWidth") <= 703
