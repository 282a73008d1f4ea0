"""Three pictures of the page for Cockpit, for docs/cockpit.md: `python -m tests.harness.containers.pictures [FOLDER]`.

As root, in containers with the newest Cockpit that there is, its Chromium, and the service on simulated hosts. They go
to docs/cockpit/, or to FOLDER. Look at what changed in them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.harness.containers.browser import PHONE
from tests.harness.containers.cockpit import Visit, browsing
from tests.harness.containers.container import Container
from tests.harness.containers.people import ADA, MAX
from tests.harness.containers.words import GPU, ctl, simulated
from tests.harness.debian.errors import HarnessError
from tests.harness.debian.fast_tests import say
from tests.harness.debian.tools import PROJECT

RELEASE, BUS = "forky", "dbus-broker"
CARD = f'[data-gpu="{GPU}"]'
WIDE = (1280, 900)
SCREEN = f'[[gpu]]\naddress = "{GPU}"\nname = "screen"\nallow_boot_display = true\n'


@contextmanager
def looking(user: str, scenario: str, *faults: str, config: str = "") -> Iterator[tuple[Container, Visit]]:
    """Somebody who has logged in on such a machine, and looks at the page."""
    files = simulated(*faults, scenario=scenario) | {"/etc/gpuswitch/config.toml": config}
    with browsing(RELEASE, BUS, files) as (machine, browser):
        browser.resize(*WIDE)
        visit = Visit(browser, user, administrator=user == ADA)
        visit.until(f"page.querySelector('{CARD}')")
        yield machine, visit


def take(folder: Path) -> None:
    """All three."""
    with looking(MAX, "laptop", "unbind@0000:01:00.1#3=15s") as (machine, visit):
        for way in ("to-vfio", "to-host"):
            ctl(machine, f"{way} {GPU}")
        visit.click(f"{CARD} [data-action=vfio]")
        visit.click("[data-action=confirm]")
        visit.until_text("unbind 0000:01:00.1", f"{CARD} .steps")
        visit.until("page.querySelectorAll('#history [data-entry]').length === 2")
        visit.browser.screenshot(folder / "steps.webp")
    with looking(ADA, "single", config=SCREEN) as (_machine, visit):
        visit.click(f"{CARD} [data-action=vfio]")
        visit.until("page.querySelector('dialog .pf-v6-c-alert')")
        visit.browser.screenshot(folder / "blockers.webp")
        visit.browser.press("Escape", 27)
        visit.browser.prefer("dark")
        visit.until("page.documentElement.classList.contains('pf-v6-theme-dark')")
        visit.browser.resize(*PHONE)
        visit.browser.screenshot(folder / "phone.webp")


def main() -> int:
    try:
        take(Path(sys.argv[1]) if sys.argv[1:] else PROJECT / "docs/cockpit")
    except HarnessError as error:
        say(str(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
