"""The report in a real browser, as a researcher uses it: headless Chromium, driven by Selenium, from disk."""

import json
import shutil
from io import BytesIO

import numpy as np
import pytest
from PIL import Image
from test_report import MARKUP, NASTY, entry, found_of

from reporting.layers import FOLDER, Layers, save_layers
from reporting.report import write_report

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
Service = pytest.importorskip("selenium.webdriver.chrome.service").Service
Keys = pytest.importorskip("selenium.webdriver.common.keys").Keys
Wait = pytest.importorskip("selenium.webdriver.support.ui").WebDriverWait

NAMES = ("chromium", "chromium-browser", "google-chrome")
ORIGINAL, NORMAL, LESION = 64, 191, (252, 253, 191)  # grey levels of the pictures below, and the last colour of the map
SIZES = {"1280": (1280, 800), "laptop": (1366, 768), "small": (800, 700)}


@pytest.fixture(scope="module")
def browser():
    """Chromium without a window, which writes down what it was asked for and what its console said."""
    program, driver = next(filter(None, map(shutil.which, NAMES)), None), shutil.which("chromedriver")
    if not program or not driver:
        pytest.skip("no browser: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--force-device-scale-factor=1"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SE_OFFLINE", "true")  # Selenium looks for no driver of its own
        opened = webdriver.Chrome(options=options, service=Service(executable_path=driver))
    yield opened
    opened.quit()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A report of eight images with uniform pictures: on each a lesion in a corner, which the map covers wholly."""
    folder = tmp_path_factory.mktemp("results")
    size = (64, 128)
    original, normal = np.full(size, ORIGINAL / 127.5 - 1), np.full(size, NORMAL / 127.5 - 1)
    lesion = np.zeros(size, bool)
    lesion[8:24, 16:48] = True
    kinds = [("normal", 0), ("cyst", 1), (MARKUP, 1), ("caries", 1), ("", ""), ("normal", 0), ("cyst", 1), ("cyst", 1)]
    entries = []
    for index, (kind, label) in enumerate(kinds):
        score = (index * 5 % 8) / 8  # 0, 5, 2, 7, 4, 1, 6, 3 eighths; flagged above 0.55: 1, 3, 6
        name, remark = (NASTY if index == 2 else None), ("unlike the normals" if index == 4 else "")
        known = entry(index, score, label, kind, remark, name)
        layers = Layers(original, normal, lesion.astype(float), lesion if label == 1 else None, size)
        save_layers(folder / FOLDER, index, layers, end=1.0)
        entries.append(known | {"report": layers.told()})
    write_report(folder, found_of(entries))
    return folder


class Page:
    """A report in the browser, and what people do with it."""

    def __init__(self, browser, folder, size=SIZES["1280"]):
        self.browser = browser
        metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        for log in ("browser", "performance"):
            browser.get_log(log)  # of the page before
        browser.get((folder / "report.html").resolve().as_uri())

    def run(self, script, *given):
        return self.browser.execute_script(script, *given)

    def find(self, selector):
        return self.browser.find_elements("css selector", selector)

    def one(self, selector):
        (found,) = self.find(selector)
        return found

    def order(self):
        """The indices of the images in the grid."""
        return [
            int(text[:3])
            for text in self.run(
                "return [...document.querySelectorAll('.card .kind:nth-of-type(3)')].map((line) => line.textContent)"
            )
        ]

    def choose(self, identifier, words):
        (option,) = [option for option in self.find(f"#{identifier} option") if option.text == words]
        option.click()

    def search(self, words):
        self.one("#search").send_keys(Keys.CONTROL, "a", Keys.NULL, Keys.DELETE, words)

    def open(self, place=0):
        self.find(".card")[place].click()
        self.settle()

    def settle(self):
        """Wait until the pictures of the viewer are there and drawn."""
        script = "return !document.getElementById('stage').classList.contains('loading')"
        Wait(self.browser, 10).until(lambda _: self.run(script))
        self.browser.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")

    def press(self, key):
        self.browser.switch_to.active_element.send_keys(key)
        self.settle()

    def title(self):
        return self.one("#title").text

    def slide(self, identifier, value):
        self.run(
            "const slider = document.getElementById(arguments[0]); slider.value = arguments[1];"
            "slider.dispatchEvent(new Event('input'))",
            identifier,
            value,
        )
        self.settle()

    def frame(self, selector):
        """Where an element is on the screen, in pixels."""
        script = "const r = document.querySelector(arguments[0]).getBoundingClientRect(); return r.toJSON()"
        return self.run(script, selector)

    def pixel(self, down, across):
        """The colour that the screen shows at this place of the stage, shares of its height and width."""
        frame = self.frame("#stage")
        screen = Image.open(BytesIO(self.browser.get_screenshot_as_png())).convert("RGB")
        place = frame["x"] + across * frame["width"], frame["y"] + down * frame["height"]
        return np.array(screen.getpixel(tuple(map(int, place))))


@pytest.fixture
def page(browser, folder):
    return Page(browser, folder)


def near(colour, *expected):
    return bool(np.abs(colour - np.array(expected if len(expected) == 3 else expected * 3)).max() <= 3)


LESION_AT, ELSEWHERE, RIGHT = (0.25, 0.25), (0.8, 0.25), (0.8, 0.9)


# ---------------------------------------------------------------- the grid


def test_images_stand_by_score_the_highest_first_and_can_be_turned_round(page):
    assert page.order() == [3, 6, 1, 4, 7, 2, 5, 0]
    page.choose("order", "lowest score first")
    assert page.order() == [0, 5, 2, 7, 4, 1, 6, 3]
    page.choose("order", "as given")
    assert page.order() == list(range(8))


@pytest.mark.parametrize(
    ("identifier", "words", "left"),
    [
        ("verdict", "flagged", [3, 6, 1]),
        ("verdict", "not flagged", [4, 7, 2, 5, 0]),
        ("kind", "cyst", [6, 1, 7]),
        ("kind", "(no kind)", [4]),
        ("kind", MARKUP, [2]),
        ("label", "normal", [5, 0]),
        ("label", "unknown", [4]),
    ],
)
def test_a_filter_leaves_what_it_says(identifier, words, left, page):
    page.choose(identifier, words)
    assert page.order() == left and page.one("#count").text == f"{len(left)} of 8 images"
    page.choose(identifier, "all")
    assert len(page.order()) == 8


def test_filters_and_search_hold_together_and_search_knows_names_kinds_and_remarks(page):
    for words, left in (
        ("cyst", [6, 1, 2, 7]),
        ("CYST image-", [6, 1, 7]),
        ("unlike", [4]),
        ("alert(1)", [2]),
        ("zz", []),
    ):
        page.search(words)
        assert sorted(page.order()) == sorted(left), words
    page.search("cyst")
    page.choose("verdict", "flagged")
    assert page.order() == [6, 1]


def test_thumbnails_are_seen_and_load_when_they_come_near(page):
    assert page.run("return [...document.querySelectorAll('.card img')].every((img) => img.loading === 'lazy')")
    page.run("document.getElementById('images').scrollIntoView()")
    seen = "return [...document.querySelectorAll('.card img')].every((img) => img.complete && img.naturalWidth === 240)"
    Wait(page.browser, 10).until(lambda _: page.run(seen))


def test_markup_in_names_and_kinds_is_read_as_text(page):
    texts = page.run("return [...document.querySelectorAll('.card')].map((card) => card.textContent)")
    assert any(NASTY in text and MARKUP in text for text in texts)
    assert any(MARKUP in cell.text for cell in page.find("tbody th"))
    page.choose("kind", MARKUP)
    page.open()
    assert NASTY in page.title() and MARKUP in page.one("#facts").text
    assert page.run("return document.scripts.length") == 2 and len(page.find("img[src='x']")) == 0


# ---------------------------------------------------------------- one image


def test_an_opened_image_tells_its_numbers(page):
    page.open()
    facts = page.one("#facts").text.split("\n")
    told = dict(zip(facts[::2], facts[1::2], strict=True))
    assert told == {"score": "0.8750", "threshold": "0.5500", "verdict": "flagged", "p-value": "0.2000"} | {
        "label": "abnormal",
        "kind": "caries",
    }
    assert page.title().startswith("003") and page.one("#place").text == "1 of 8"


def test_arrows_turn_to_the_neighbours_of_the_order_shown_and_escape_closes(page):
    page.choose("verdict", "flagged")
    page.open()
    seen = [page.title()[:3]]
    for key in (Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_LEFT):  # the third finds no more
        page.press(key)
        seen.append(page.title()[:3])
    assert seen == ["003", "006", "001", "001", "006"]
    page.press(Keys.ESCAPE)
    assert not page.one("#viewer").is_displayed()
    focused = page.browser.switch_to.active_element
    assert "006" in focused.text and focused.get_attribute("class") == "card"
    focused.send_keys(Keys.ENTER)
    assert page.one("#viewer").is_displayed() and page.title()[:3] == "006"


def test_an_arrow_on_a_slider_moves_the_slider_and_not_the_image(page):
    page.open(1)
    before, slider = page.title(), page.one("#opacity")
    slider.send_keys(Keys.ARROW_LEFT)
    assert slider.get_attribute("value") == "69" and page.title() == before


def test_the_slider_lays_the_map_over_the_original(page):
    page.open()
    page.slide("opacity", 0)
    assert near(page.pixel(*LESION_AT), ORIGINAL) and near(page.pixel(*ELSEWHERE), ORIGINAL)
    page.slide("opacity", 100)
    assert near(page.pixel(*LESION_AT), *LESION) and near(page.pixel(*ELSEWHERE), ORIGINAL)
    page.slide("opacity", 50)
    assert near(page.pixel(*LESION_AT), *((ORIGINAL + np.array(LESION)) / 2))


def test_the_swipe_shows_the_original_to_its_left_and_g_to_its_right(page):
    page.open()
    assert near(page.pixel(*RIGHT), ORIGINAL)
    page.slide("swipe", 50)
    assert near(page.pixel(*ELSEWHERE), ORIGINAL) and near(page.pixel(*RIGHT), NORMAL)
    page.slide("swipe", 0)
    assert near(page.pixel(*ELSEWHERE), NORMAL)


def test_a_drag_over_the_picture_swipes(page):
    page.open()
    stage = page.one("#stage")
    width = stage.rect["width"]
    drag = webdriver.ActionChains(page.browser).move_to_element_with_offset(stage, round(0.4 * width), 0)
    drag.click_and_hold().move_by_offset(-round(0.8 * width), 0).release().perform()
    page.settle()
    assert page.one("#swipe").get_attribute("value") == "10" and near(page.pixel(0.8, 0.2), NORMAL)


def test_an_outline_lies_on_the_lesion_where_there_is_a_mask_and_can_be_taken_off(page):
    page.open()
    page.slide("opacity", 0)
    edge = (0.25, 48 / 128)  # the right side of the lesion
    assert near(page.pixel(*edge), 0, 229, 255)
    page.one("#outlined").click()
    page.settle()
    assert near(page.pixel(*edge), ORIGINAL)
    page.press(Keys.ESCAPE)
    page.choose("label", "normal")
    page.open()
    assert not page.one("#outline-choice").is_displayed() and not page.one("#outline").is_displayed()


def test_a_picture_that_is_missing_is_said(browser, folder, tmp_path):
    moved = shutil.copytree(folder, tmp_path / "moved")
    (moved / FOLDER / "006_map.png").unlink()
    page = Page(browser, moved)
    page.open()
    assert not page.one("#missing").is_displayed()
    page.press(Keys.ARROW_RIGHT)
    assert page.one("#missing").is_displayed() and "missing" in page.one("#missing").text


# ---------------------------------------------------------------- manners


def use_everything(page):
    page.choose("verdict", "flagged")
    page.one("#search").send_keys("cyst")
    page.open()
    page.press(Keys.ARROW_RIGHT)
    page.slide("swipe", 30)
    page.press(Keys.ESCAPE)
    page.run("document.querySelector('details').open = true; scrollTo(0, document.body.scrollHeight)")


def test_the_console_is_empty_and_nothing_but_files_is_asked_for(page, folder):
    use_everything(page)
    assert page.browser.get_log("browser") == []
    messages = [json.loads(line["message"])["message"] for line in page.browser.get_log("performance")]
    asked = [
        message["params"]["request"]["url"] for message in messages if message["method"] == "Network.requestWillBeSent"
    ]
    assert len(asked) > 10 and all(url.startswith(folder.resolve().as_uri() + "/") for url in asked)


CONTRAST = """
const parse = (colour) => (colour.match(/[\\d.]+/g) || []).map(Number);
const luminance = (rgb) => rgb.slice(0, 3).map((v) => v / 255)
  .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
  .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
const groundOf = (node) => {
  for (let at = node; at; at = at.parentElement) {
    const colour = parse(getComputedStyle(at).backgroundColor);
    if (colour.length === 3 || colour[3] > 0) return colour;
  }
};
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
const found = [];
while (walker.nextNode()) {
  const node = walker.currentNode.parentElement;
  if (!walker.currentNode.textContent.trim() || !node.checkVisibility() || node.closest("script, style")) continue;
  const style = getComputedStyle(node);
  const shades = [parse(node.closest("svg") ? style.fill : style.color), groundOf(node)].map(luminance);
  found.push([(Math.max(...shades) + 0.05) / (Math.min(...shades) + 0.05), walker.currentNode.textContent.trim()]);
}
return found.sort((a, b) => a[0] - b[0]);
"""


@pytest.mark.parametrize("opened", [False, True])
def test_text_stands_out_from_its_ground(opened, page):
    """WCAG 2.2, 1.4.3: a contrast of 4.5 to 1."""
    if opened:
        page.open(2)
    found = page.run(CONTRAST)
    assert len(found) > 60 and found[0][0] >= 4.5, found[:3]


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_nothing_is_cut_off_and_nothing_overlaps(size, browser, folder):
    page = Page(browser, folder, size)
    assert page.run("return document.documentElement.scrollWidth <= innerWidth")
    boxes = page.run(
        "return [...document.querySelectorAll('header, section, .chart, #grid > li')].map((e) => {"
        "const r = e.getBoundingClientRect(); return [e.tagName, r.left, r.top, r.right, r.bottom]; })"
    )
    for group in ({"HEADER", "SECTION"}, {"FIGURE"}, {"LI"}):
        same = [box[1:] for box in boxes if box[0] in group]
        for place, a in enumerate(same):
            apart = [a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1] for b in same[place + 1 :]]
            assert all(apart), (size, group)
    page.open()
    stage, aside = (page.frame(selector) for selector in ("#stage", "aside"))
    beside, below = stage["x"] + stage["width"] <= aside["x"], stage["y"] + stage["height"] <= aside["y"]
    assert (beside or below) and stage["width"] / stage["height"] == pytest.approx(2, abs=0.02)
    assert stage["width"] > 0.5 * size[0] and stage["y"] >= 0 and stage["y"] + stage["height"] <= size[1]


def test_everything_that_is_operated_has_a_name_and_can_be_reached(page):
    script = (
        "return [...document.querySelectorAll('input, select, button')].filter((e) => !(e.labels && e.labels.length)"
        " && !e.textContent.trim() && !e.ariaLabel).length"
    )
    assert page.run(script) == 0 and page.run("return document.documentElement.lang") == "en"
    assert page.run("return [...document.querySelectorAll('svg[role=img]')].every((e) => e.ariaLabel.length > 20)")
    page.one("#search").click()
    reached = set()
    for _ in range(12):
        page.browser.switch_to.active_element.send_keys(Keys.TAB)
        reached.add(page.run("return document.activeElement.id || document.activeElement.className"))
    assert {"verdict", "kind", "label", "order", "card"} <= reached
