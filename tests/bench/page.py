"""`python -m tests.bench.page [RELEASE]`: the page for Cockpit in a browser, of one GPU and of many. As root.

In a container with that release's Cockpit, its Chromium without a window, and the service on a simulated server.
Measured is what Chromium says itself: of paint (`performance`), and of its work (the DevTools protocol, Performance).
"""

from __future__ import annotations

import itertools
import os
import statistics
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from tests.bench.many import MANY
from tests.bench.table import Row, show, text
from tests.harness.containers.browser import Browser
from tests.harness.containers.cockpit import FRAME, HOST, PLACE, Visit, browsing, find_page
from tests.harness.containers.container import Container
from tests.harness.containers.people import MAX
from tests.harness.containers.words import INSIDE, NAME, PYTHON, simulated
from tests.harness.debian.cache import Cache, default_folder
from tests.harness.debian.errors import HarnessError
from tests.harness.debian.fast_tests import say

LOADS, SETTLE_SECONDS, REST_SECONDS = 7, 5, 20
ALONE = f"http://{HOST}/cockpit/@localhost/gpuswitch/index.html"
STEP, STEPS = 160, 100
"""Of scrolling: pixels, and how often."""

_PAINT = "performance.getEntriesByName('first-contentful-paint')[0]?.startTime"
_SCROLL = """new Promise(done => {
    const where = document.scrollingElement, times = [];
    const step = now => {
        times.push(now);
        where.scrollBy(0, %d);
        times.length > %d ? done(times) : requestAnimationFrame(step);
    };
    where.scrollTo(0, 0);
    requestAnimationFrame(step);
})"""


def measure(release: str, gpus: int) -> Iterator[Row]:
    with visited(release, gpus) as (box, visit):
        browser = visit.browser
        paints, cards = zip(*(load(visit, gpus) for _ in range(LOADS)), strict=True)
        yield Row("first paint, best; median", f"{text(min(paints))}; {text(statistics.median(paints))}", "300 ms")
        yield Row("all cards are there, best; median", f"{text(min(cards))}; {text(statistics.median(cards))}")

        before = work(browser)
        times = browser.run(_SCROLL % (STEP, STEPS), FRAME)
        after = work(browser)
        frames = [(later - earlier) / 1000 for earlier, later in itertools.pairwise(times)]
        yield Row(f"a frame while scrolling by {STEP} pixels, median", text(statistics.median(frames)), "16.7 ms")
        yield Row("the same, of 100 the fifth longest", text(statistics.quantiles(frames, n=20)[-1]))
        yield Row("work of the page in a frame", text((after["TaskDuration"] - before["TaskDuration"]) / len(frames)))

        before = work(browser)
        box.sh(f"busctl call {NAME} /org/gpuswitch1/gpu/0001_01_00_0 {NAME}.Gpu ToVfio 'a{{sv}}' 0")
        visit.until("page.querySelector('[data-state=vfio]') && page.querySelector('#history [data-entry]')")
        yield Row("a switch is followed: scripts", text(work(browser)["ScriptDuration"] - before["ScriptDuration"]))

        # without Cockpit's own pages around it, which do something all the time
        browser.open(ALONE)
        browser.until(f"document.querySelectorAll('article').length === {gpus}")
        rest(browser, SETTLE_SECONDS)
        before = work(browser)
        rest(browser, REST_SECONDS)
        after = work(browser)
        for name in ("ScriptDuration", "TaskDuration"):
            yield Row(f"alone, at rest for {REST_SECONDS} s: {name}", text(after[name] - before[name]), "0")
        for name in ("LayoutCount", "RecalcStyleCount"):
            yield Row(f"alone, at rest for {REST_SECONDS} s: {name}", f"{after[name] - before[name]:.0f}", "0")


def load(visit: Visit, gpus: int) -> tuple[float, float]:
    """Seconds from the load of our page until it has painted, and until all cards are there."""
    visit.run("window.former = true")
    visit.browser.call("Page.reload")
    cards = f"page.querySelectorAll('article').length === {gpus}"
    shown = visit.until(f"!window.former && {cards} && page.defaultView.performance.now()")
    return visit.until(f"page.defaultView.{_PAINT}") / 1000, shown / 1000


def rest(browser: Browser, seconds: float) -> None:
    """As long as that by the browser's own clock; nothing is asked of it meanwhile."""
    browser.run(f"new Promise(done => setTimeout(done, {seconds * 1000}))")


def work(browser: Browser) -> dict[str, float]:
    """Seconds of work and counts since the page was opened: `Performance.getMetrics`."""
    return {each["name"]: each["value"] for each in browser.call("Performance.getMetrics")["metrics"]}


@contextmanager
def visited(release: str, gpus: int) -> Iterator[tuple[Container, Visit]]:
    """A machine with so many GPUs, and somebody who looks at its page."""
    program = "/srv/server.py"
    files = {program: (INSIDE / "server.py").read_text()}
    files |= simulated(scenario="server", program=f"{PYTHON} {program} {gpus}")
    with browsing(release, "dbus-daemon", files) as (box, browser):
        browser.call("Performance.enable")
        visit = Visit(browser, MAX)
        visit.until(f"page.querySelectorAll('article').length === {gpus}")
        yield box, visit


def sizes(release: str) -> Iterator[Row]:
    """What is fetched for the page, compressed."""
    folder = find_page(Cache(default_folder(), say)) / PLACE
    bytes_of = {path.name: path.stat().st_size for path in folder.iterdir()}
    english = sum(bytes_of[name] for name in ("index.html", "index.js.gz", "index.css.gz"))
    yield Row("over the wire, English", f"{english / 1000:.0f} kB", "150 kB")
    most = max(size for name, size in bytes_of.items() if name.startswith("po.") and "manifest" not in name)
    yield Row("over the wire, another language", f"{(english + most) / 1000:.0f} kB", "150 kB")


def main() -> int:
    release = sys.argv[1] if sys.argv[1:] else "bookworm"
    try:
        show("Size of the page", ("measured", "target"), sizes(release))
        for gpus in (1, MANY):
            around = f"{os.cpu_count()} processors, load {os.getloadavg()[0]:.1f}"
            title = f"The page for Cockpit of {release}, GPUs: {gpus} ({around})"
            show(title, ("measured", "target"), measure(release, gpus))
    except HarnessError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
