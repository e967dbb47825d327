"""How soon the report opens: python benchmarks/report_page.py --images 1000

Writes a report of that many images (a dozen phantoms again and again, with scores at random) into a temporary folder,
opens it from disk in headless Chromium three times, and scrolls through it. Prints seconds to load, the milliseconds
of a frame while scrolling (median, 95th percentile, longest), and the size of the page and of the pictures of an image.
Needs chromium and chromedriver on the path.
"""

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from selenium import webdriver
from selenium.webdriver.chrome.service import Service

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from test_report import entry, found_of

from checks import UsageError
from phantoms.phantom import draw_phantom
from reporting.layers import FOLDER, Layers, save_layers
from reporting.report import REPORT, write_report
from runtime import run_script

PICTURES = 12  # that are drawn; the others are copies
SIZE = 256, 512
SCROLL = """
const done = arguments[0], times = [], end = document.body.scrollHeight;
let last = performance.now(), y = 0;
function step() {
    const now = performance.now();
    times.push(now - last); last = now; y += 120; scrollTo(0, y);
    if (y < end && times.length < 600) requestAnimationFrame(step);
    else { times.sort((a, b) => a - b); done([0.5, 0.95, 1].map(q => times[Math.floor(q * (times.length - 1))])); }
}
requestAnimationFrame(step);
"""


def main() -> None:
    """Make the report, open it, look at the clock."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1_000)
    options = parser.parse_args()
    driver = shutil.which("chromedriver")
    if not driver:
        raise UsageError("there is no chromedriver here: install chromium and its driver")
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), options.images)
        look(Path(folder), options.images, driver)


def write(folder: Path, count: int) -> None:
    """report.html of so many images, with its pictures."""
    random, entries = np.random.default_rng(0), []
    for number in range(count):
        if number < PICTURES:
            image = 2 * draw_phantom(0, number, height=SIZE[0], width=SIZE[1]).image - 1
            layers = Layers(image, image, random.random(SIZE, np.float32), None, SIZE)
            save_layers(folder / FOLDER, number, layers, 1.0)
        else:
            for path in (folder / FOLDER).glob(f"{number % PICTURES:03d}_*"):
                shutil.copy(path, path.with_name(f"{number:03d}_{path.name.partition('_')[2]}"))
        label = number % 2
        entries.append(entry(number, float(random.normal()), label, ("normal", "cyst")[label], shape=SIZE))
    write_report(folder, found_of(entries))


def look(folder: Path, count: int, driver: str) -> None:
    """Open and scroll."""
    options = webdriver.ChromeOptions()
    for word in ("--headless=new", "--no-sandbox", "--window-size=1280,800"):
        options.add_argument(word)
    browser, seconds = webdriver.Chrome(options=options, service=Service(driver)), []
    try:
        for _ in range(3):
            began = time.perf_counter()
            browser.get((folder / REPORT).as_uri())
            seconds.append(time.perf_counter() - began)
        frames = browser.execute_async_script(SCROLL)
    finally:
        browser.quit()
    page = (folder / REPORT).stat().st_size / 2**20
    pictures = sum(path.stat().st_size for path in (folder / FOLDER).iterdir()) / count / 2**20
    print(f"{count} images: loaded in {', '.join(f'{each:.2f}' for each in seconds)} s")
    print(
        f"a frame while scrolling: {', '.join(f'{each:.0f}' for each in frames)} ms (median, 95th percentile, longest)"
    )
    print(f"the page {page:.2f} MiB, pictures {pictures:.2f} MiB an image of {SIZE[0]} x {SIZE[1]} (the map is noise)")


if __name__ == "__main__":
    run_script(main)
