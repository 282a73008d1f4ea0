"""The Cockpit of a release, beside the service, and our page in it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.harness.containers.browser import PACKAGES as BROWSER
from tests.harness.containers.browser import Browser
from tests.harness.containers.container import Container
from tests.harness.containers.people import PASSWORD, move_in
from tests.harness.containers.system import System, find_system
from tests.harness.debian.cache import Cache, content_key, default_folder
from tests.harness.debian.fast_tests import say
from tests.harness.debian.releases import Release, find_release
from tests.harness.debian.tools import PROJECT, require_tools, run

PACKAGES = ("cockpit-ws", "cockpit-system", "sudo", *BROWSER)
SOURCES = PROJECT / "contrib/cockpit"
HOST = "localhost:9090"
PLACE = "usr/local/share/cockpit/gpuswitch"
"""Where `make install` puts the page."""

AXE = "srv/axe.min.js"
"""Where the layer has what looks for barriers: axe-core."""

FRAME = "cockpit1:localhost/gpuswitch"
PAGE = f"document.querySelector('iframe[name=\"{FRAME}\"]')?.contentDocument"
"""Its document, in Cockpit's shell."""


def find_cockpit(cache: Cache, release: Release, bus: str) -> System:
    """The system that has Cockpit and a browser, too. Raises HarnessError."""
    return find_system(cache, release, bus, PACKAGES, "cockpit")


def find_page(cache: Cache) -> Path:
    """A layer with the page, as it is built now. Raises HarnessError."""

    def build(folder: Path) -> None:
        require_tools("cockpit")
        run([SOURCES / "build.sh", folder / PLACE])
        (folder / AXE).parent.mkdir()
        shutil.copyfile(PROJECT / ".cache/cockpit/node_modules/axe-core/axe.min.js", folder / AXE)

    with cache.lock():
        return cache.make(
            "cockpit-page",
            content_key(SOURCES, PROJECT / "gpuswitch/cli/locale", PROJECT / "gpuswitch/__init__.py", Path(__file__)),
            build,
        )


@contextmanager
def browsing(release: str, bus: str, files: Mapping[str, str]) -> Iterator[tuple[Container, Browser]]:
    """A machine that has Cockpit with the page, people, and these files; and a browser in it. Raises HarnessError."""
    cache = Cache(default_folder(), say)
    cockpit = find_cockpit(cache, find_release(release), bus)
    machine = Container((find_page(cache), *cockpit.installed), files)
    try:
        machine.wait_until_up()
        move_in(machine)
        with Browser(machine) as browser:
            yield machine, browser
    finally:
        machine.kill()


class Visit:
    """Somebody who has logged in, and looks at our page."""

    def __init__(self, browser: Browser, user: str, *, administrator: bool = False) -> None:
        """`administrator`: Cockpit shall make them root with the password that they log in with."""
        self.browser = browser
        browser.open(f"http://{HOST}/")
        # The last thing that its form does when it has become ready: pkg/static/login.js, show_login.
        browser.until("document.activeElement?.id === 'login-user-input'")
        wish = "any" if administrator else "none"
        browser.run(f"localStorage.setItem('superuser:{user}', '{wish}')")
        for field, text in (("login-user-input", user), ("login-password-input", PASSWORD)):
            browser.run(f"document.getElementById('{field}').value = {json.dumps(text)}")
        browser.run("document.getElementById('login-button').click()")
        browser.until("document.querySelector('iframe[name^=\"cockpit1:\"]')")
        browser.open(f"http://{HOST}/gpuswitch")
        self.until("page.querySelector('h1')")
        # What was said before is Cockpit's own: that nobody was logged in, to begin with.
        browser.console.clear()

    def speak(self, language: str) -> None:
        """Choose it, such as `de-de`: Cockpit's own menu for that leaves this cookie, and loads all anew."""
        self.browser.run(f"document.cookie = 'CockpitLang={language}; path=/'")
        self.browser.call("Page.reload")

    def become_administrator(self) -> None:
        """In Cockpit's own dialog, with the password."""
        self.browser.click("#super-user-indicator button")
        self.browser.until("document.activeElement?.matches('[role=dialog] input[type=password]')")
        self.browser.type(PASSWORD)
        self.browser.press("Enter", 13)
        self.browser.until("!document.querySelector('[role=dialog]')")

    def run(self, script: str) -> Any:
        """The value of an expression in which `page` is the document of our page."""
        return self.browser.run(f"(page => ({script}))({PAGE})")

    def until(self, condition: str) -> Any:
        """Wait until it is true."""
        return self.browser.until(f"(page => page && ({condition}))({PAGE})")

    def until_text(self, words: str, where: str = "body") -> None:
        """Wait until somebody can read these words there."""
        self.until(f"page.querySelector({json.dumps(where)})?.innerText.includes({json.dumps(words)})")

    def text(self, where: str = "body") -> str:
        return str(self.run(f"page.querySelector({json.dumps(where)}).innerText"))

    def barriers(self, layer: Path) -> list[str]:
        """What axe-core finds that keeps people from using the page as it is now, a sentence each."""
        self.browser.run(f"{(layer / AXE).read_text()}; true", FRAME)
        found = self.browser.run("axe.run().then(({ violations }) => violations)", FRAME)
        return [f"{each['id']}: {node['html']} {node['failureSummary']}" for each in found for node in each["nodes"]]

    def click(self, where: str) -> None:
        """Click on it, once it is there and can be clicked on."""
        self.until(f"page.querySelector({json.dumps(where)})?.checkVisibility()")
        self.until(f"!page.querySelector({json.dumps(where)}).disabled")
        self.run(f"page.querySelector({json.dumps(where)}).click()")
