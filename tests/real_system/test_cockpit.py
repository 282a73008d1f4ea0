"""Our page in the release's own Cockpit, as people use it with a browser: Chromium, without a window.

pytestmark = pytest.mark.beside

Each test leaves pictures of what was seen in dist/screenshots.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gpuswitch import __version__
from gpuswitch.api.encoders import sentence_values
from gpuswitch.cli.translate import read, recognized, reworded, speak, step_title
from gpuswitch.sentence import Sentence, fields, filled
from tests.harness.containers.browser import PHONE, Browser
from tests.harness.containers.cockpit import Visit, find_cockpit, find_page
from tests.harness.containers.container import Container
from tests.harness.containers.people import ADA, KIM, MAX, move_in
from tests.harness.containers.system import System
from tests.harness.containers.words import GPU, ctl, history, prop, simulated, until
from tests.harness.debian.cache import Cache, default_folder
from tests.harness.debian.progress import progress
from tests.harness.debian.releases import find_release
from tests.harness.debian.tools import PROJECT, require_tools
from tests.real_system.conftest import BUS, RELEASE, Boot

SCREENSHOTS = PROJECT / "dist/screenshots"
SOUND = "0000:01:00.1"
CARD = f'[data-gpu="{GPU}"]'
HERE = ("http://localhost:9090/", "ws://localhost:9090/", "data:", "blob:")
SINGLE = f'[[gpu]]\naddress = "{GPU}"\nname = "screen"\nallow_boot_display = true\n'
INSTALLED = "$(echo /usr/local/lib/gpuswitch/current/lib/python*/site-packages)"
GENTLE = "[defaults]\nreset_on_failure = false\nrescan_on_failure = false\n"

Start = Callable[..., Container]
"""`start(*faults, config=..., scenario=...)`: a machine with Cockpit, people, and the service on a simulated host."""


@pytest.fixture(scope="session")
def cockpit(request: pytest.FixtureRequest) -> System:
    return find_cockpit(Cache(default_folder(), progress(request.config)), find_release(RELEASE), BUS)


@pytest.fixture(scope="session")
def page(request: pytest.FixtureRequest) -> Path:
    return find_page(Cache(default_folder(), progress(request.config)))


@pytest.fixture
def start(boot: Boot, cockpit: System, page: Path) -> Start:
    def start(*faults: str, config: str = "", scenario: str = "laptop") -> Container:
        files = simulated(*faults, scenario=scenario) | {"/etc/gpuswitch/config.toml": config}
        machine = boot((page, *cockpit.installed), files)
        move_in(machine)
        return machine

    return start


def picture(browser: Browser, name: str) -> None:
    browser.screenshot(SCREENSHOTS / f"{RELEASE}-{name}.png")


def ask(visit: Visit, action: str) -> None:
    """Press a button of the GPU's card, and wait until the question can be read."""
    visit.click(f"{CARD} [data-action={action}]")
    visit.until("page.querySelector('dialog summary, dialog .pf-v6-c-alert, dialog p:not([role=status])')")


def agree(visit: Visit) -> None:
    visit.click("[data-action=confirm]")
    visit.until("!page.querySelector('dialog')")


def close(visit: Visit) -> None:
    """With the key for that."""
    visit.browser.press("Escape", 27)
    visit.until("!page.querySelector('dialog')")


def until_card(visit: Visit, state: str) -> None:
    visit.until(f"page.querySelector('{CARD}[data-state={state}]')")


def press(visit: Visit, where: str, key: str, code: int) -> None:
    """A key for whatever is there, once that has the focus."""
    visit.run(f"page.querySelector({json.dumps(where)}).focus()")
    visit.browser.press(key, code)


def focused(visit: Visit) -> str:
    """The value of the choice that has the focus."""
    return str(visit.run("page.activeElement.value"))


def last_day(visit: Visit) -> str:
    """Where the GPU was, as who cannot see the timeline is told of it."""
    return str(visit.run(f"page.querySelector('{CARD} .timeline').getAttribute('aria-label')"))


def places(told: str) -> str:
    """The same without the times."""
    return re.sub(r" for [0-9.]+ (s|min|h)\b", "", told)


def nothing_is_wrong(browser: Browser) -> None:
    """Nothing was said on our page's console, no policy was broken, and nothing but Cockpit was asked for anything.

    Cockpit's own pages, around ours, say what they like.
    """
    assert [text for text, address in browser.console if "/gpuswitch/" in address or not address] == []
    assert [each for each in browser.requests if not each.startswith(HERE) and each != "about:blank"] == []


def test_a_gpu_is_moved_and_what_happens_is_followed(start: Start, page: Path) -> None:
    """By a member of the group gpuswitch: without a password, and without being root in Cockpit."""
    machine = start(f"unbind@{SOUND}#1=4s")
    with Browser(machine) as browser:
        visit = Visit(browser, MAX)
        visit.until_text("on the host", CARD)
        card = visit.text(CARD)
        assert all(words in card for words in ("GeForce RTX 3070", f"{SOUND} audio, snd_hda_intel", "IOMMU groups\n13"))
        # no hours: the service has been there for a few seconds
        assert re.fullmatch(r"on the host for [0-9.]+ s", last_day(visit))
        visit.click(f"{CARD} summary")
        visit.until_text("nvidia-persistenced (", f"{CARD} details")
        assert "unit nvidia-persistenced.service" in visit.text(f"{CARD} details")
        picture(browser, "cards")
        assert visit.barriers(page) == []

        ask(visit, "vfio")
        asked = visit.text("dialog")
        assert "It stops meanwhile: nvidia-persistenced.service" in asked
        assert "bind 0000:01:00.0 to vfio-pci (within 30 s)" in asked
        picture(browser, "plan")
        assert visit.barriers(page) == []
        agree(visit)
        visit.until_text("running", f"{CARD} .steps")
        visit.until_text(f"unbind {SOUND} from snd_hda_intel", f"{CARD} .steps")
        picture(browser, "steps")
        assert visit.barriers(page) == []
        until_card(visit, "vfio")
        assert prop(machine, "State") == "vfio"

        # its story, with a bar for each step
        visit.click("#history [data-entry]")
        visit.until("page.querySelectorAll('#history .steps .bars').length === 18")
        assert "cockpit-bridge" in visit.text("#history")
        picture(browser, "story")
        assert visit.barriers(page) == []

        # somebody else's switch is followed as well
        ctl(machine, f"to-host {GPU}")
        until_card(visit, "host")
        visit.until("page.querySelectorAll('#history [data-entry]').length === 2")

        assert history(machine) == [("host", "done"), ("vfio", "done")]
        assert places(last_day(visit)) == "on the host, on vfio, on the host"

        # Who stops it finds it stopped, whatever people ask for then.
        ask(visit, "vfio")
        machine.sh("systemctl stop gpuswitchd")
        visit.until_text("The service gpuswitchd has stopped.")
        visit.click("[data-action=confirm]")
        visit.until_text("does not run; start it first", "dialog")
        close(visit)
        assert visit.run(f"page.querySelector('{CARD} [data-action=vfio]').disabled")
        assert visit.run("[...page.querySelectorAll('#history [aria-expanded=false]')].every(each => each.disabled)")
        visit.click(f"{CARD} summary")
        visit.click(f"{CARD} summary")
        visit.until_text("nvidia-persistenced (", f"{CARD} details")
        picture(browser, "stopped")
        assert visit.barriers(page) == []
        assert machine.sh("systemctl is-active gpuswitchd", check=False).stdout == "inactive\n"

        # started anew, it knows what was; its machine in memory begins anew
        machine.sh("systemctl start gpuswitchd")
        visit.until("!page.body.innerText.includes('has stopped')")
        ask(visit, "vfio")
        agree(visit)
        until_card(visit, "vfio")
        visit.until("page.querySelectorAll('#history [data-entry]').length === 3")
        nothing_is_wrong(browser)


def test_a_switch_waits_for_a_desktop_and_is_cancelled(start: Start, page: Path) -> None:
    """Chosen with the keyboard, which stays where it is while all around is looked at anew."""
    machine = start(config=SINGLE, scenario="single")
    with Browser(machine) as browser:
        visit = Visit(browser, MAX)
        ask(visit, "vfio")
        press(visit, "dialog input[value='']", "ArrowDown", 40)
        visit.until("page.querySelector('dialog input[value=wait]').checked && page.querySelector('dialog summary')")
        assert focused(visit) == "wait"
        for chosen in ("true", "false"):
            press(visit, "dialog input[type=checkbox]", " ", 32)
            visit.until(f"page.querySelector('dialog input[type=checkbox]').checked === {chosen}")
            visit.until("page.querySelector('dialog h3')")
            assert focused(visit) == "display-manager.service"
        agree(visit)
        visit.until_text("It waits for: ", CARD)
        picture(browser, "waits")
        assert visit.barriers(page) == []
        ask(visit, "cancel")
        agree(visit)
        visit.until_text("cancelled", "#history")
        until_card(visit, "host")
        visit.until_text("cancelled by cockpit-bridge", CARD)
        picture(browser, "cancelled")
        nothing_is_wrong(browser)
    assert history(machine) == [("vfio", "cancelled")]


def test_a_refusal_names_who_is_in_the_way_and_a_stranger_may_only_look(start: Start, page: Path) -> None:
    machine = start(config=SINGLE, scenario="single")
    with Browser(machine) as browser:
        visit = Visit(browser, ADA, administrator=True)
        visit.until_text("screen", CARD)
        ask(visit, "vfio")
        refused = visit.text("dialog")
        assert "This is in the way:" in refused
        assert "kwin_x11" in refused
        assert "session 2" in refused
        assert visit.run("page.querySelector('[data-action=confirm]').disabled")
        picture(browser, "refusal")
        assert visit.barriers(page) == []
        # what ends a desktop is asked for in so many words
        visit.click("dialog input[value=terminate]")
        visit.until_text(
            "This ends what runs on the screen: display-manager.service (Xorg), kwin_x11 in session 2", "dialog"
        )
        picture(browser, "desktop")
        close(visit)

        visit.click("[data-action=doctor]")
        visit.until_text("things are well", "#doctor")
        assert "the IOMMU is off" in visit.text("#doctor")
        assert visit.barriers(page) == []
        browser.download_to("/srv/downloads")
        visit.click("[data-action=report]")
        visit.until_text("is downloaded", "#doctor")
        [name] = re.findall(r"gpuswitch-report-\S+\.md", visit.text("#doctor"))
        until(machine, f"[ -s /srv/downloads/{name} ]")
        assert "kwin_x11" in machine.sh(f"cat /srv/downloads/{name}").stdout
        picture(browser, "doctor")
        browser.prefer("dark")
        visit.until("page.documentElement.classList.contains('pf-v6-theme-dark')")
        browser.resize(*PHONE)
        picture(browser, "phone")
        # nothing is wider than the screen
        assert visit.run("page.documentElement.scrollWidth <= page.documentElement.clientWidth")
        assert visit.barriers(page) == []
        nothing_is_wrong(browser)
    with Browser(machine) as browser:
        visit = Visit(browser, KIM)
        ask(visit, "vfio")
        visit.click("dialog input[value=terminate]")
        visit.until("page.querySelector('dialog summary')")
        visit.click("[data-action=confirm]")
        visit.until_text('turn on "Administrative access"', "dialog")
        picture(browser, "stranger")
        assert visit.barriers(page) == []
        close(visit)
        nothing_is_wrong(browser)
    assert prop(machine, "State") == "host"


def test_a_failure_is_told_and_a_service_that_is_not_there(start: Start, page: Path) -> None:
    machine = start(*(f"probe@{SOUND}#{nth}=EINVAL" for nth in (1, 2, 3)), config=GENTLE)
    with Browser(machine) as browser:
        visit = Visit(browser, ADA)
        until_card(visit, "host")
        ask(visit, "vfio")
        visit.click("[data-action=confirm]")
        visit.until_text('turn on "Administrative access"', "dialog")
        close(visit)
        visit.become_administrator()
        ask(visit, "vfio")
        agree(visit)
        until_card(visit, "failed")
        assert "may not" not in visit.text(CARD)
        reason = prop(machine, "Reason").splitlines()[0]
        visit.until(f"page.querySelector('{CARD} [role=alert]').innerText.includes({reason!r})")
        visit.until_text("What may help:\n", f"{CARD} [role=alert]")
        assert "the last way is to restart the machine: systemctl reboot" in visit.text(f"{CARD} [role=alert]")
        visit.click("#history [data-entry]")
        visit.until("page.querySelector('#history [data-status=failed]')")
        picture(browser, "failure")
        assert visit.barriers(page) == []
        ask(visit, "recover")
        agree(visit)
        until_card(visit, "host")
        visit.until("page.querySelectorAll('#history [data-entry]').length === 2")
        assert places(last_day(visit)) == "on the host, failed, on the host"

        machine.sh("systemctl mask --runtime --now gpuswitchd")
        browser.call("Page.reload")
        visit.until_text("The service gpuswitchd is not there.")
        picture(browser, "absent")
        assert visit.barriers(page) == []
        # It comes back as another version.
        machine.sh(f"sed -i 's/^__version__ = .*/__version__ = \"99.1\"/' {INSTALLED}/gpuswitch/__init__.py")
        machine.sh("systemctl unmask --runtime gpuswitchd; systemctl start gpuswitchd")
        until_card(visit, "host")
        visit.until_text(f"The service is version 99.1, and this page was made for {__version__}.")
        picture(browser, "version")
        assert visit.barriers(page) == []
        nothing_is_wrong(browser)


def test_a_trial_is_begun_counted_down_and_kept(start: Start, page: Path) -> None:
    machine = start()
    with Browser(machine) as browser:
        visit = Visit(browser, MAX)
        ask(visit, "trial")
        visit.click("dialog input[value='1800']")
        picture(browser, "try")
        assert visit.barriers(page) == []
        agree(visit)
        until_card(visit, "vfio")
        visit.until_text("A trial: it goes home by itself in ", CARD)
        assert visit.run(f"page.querySelector('{CARD} [data-action=trial]').hidden")
        picture(browser, "trial")
        assert visit.barriers(page) == []

        press(visit, f"{CARD} [data-action=keep]", "Enter", 13)
        visit.until(f"page.querySelector('{CARD} [data-action=keep]').hidden")
        # who has no mouse is at the next button then
        assert visit.run("page.activeElement.dataset.action") == "host"
        assert "A trial" not in visit.text(CARD)
        assert (prop(machine, "State"), prop(machine, "TrialEnds")) == ("vfio", 0)

        # A trial of somebody else is counted down as well, and brought home before it is over.
        ctl(machine, f"to-host {GPU}")
        ctl(machine, f"trial {GPU} --seconds 600 --yes")
        visit.until_text("A trial: it goes home by itself in ", CARD)
        with Browser(machine) as another:
            stranger = Visit(another, KIM)
            stranger.click(f"{CARD} [data-action=keep]")
            stranger.until_text('turn on "Administrative access"', CARD)
            assert prop(machine, "TrialEnds") > 0
            nothing_is_wrong(another)
        press(visit, f"{CARD} [data-action=host]", "Enter", 13)
        visit.until("page.querySelector('dialog summary')")
        agree(visit)
        until_card(visit, "host")
        assert "A trial" not in visit.text(CARD)
        visit.until("page.activeElement.dataset.action === 'vfio'")
        nothing_is_wrong(browser)


def test_the_page_speaks_the_language_of_who_is_logged_in(start: Start, page: Path) -> None:
    """And says what the service tells in English in that language, too."""
    machine = start(config=SINGLE, scenario="single")
    with Browser(machine) as browser:
        visit = Visit(browser, ADA, administrator=True)
        visit.speak("de-de")
        visit.until_text("auf dem Host", CARD)
        ask(visit, "vfio")
        asked = visit.text("dialog")
        assert "Das ist im Weg:" in asked
        assert "Benutzer " in asked
        assert "has it open" not in asked
        picture(browser, "german")
        assert visit.barriers(page) == []
        close(visit)
        visit.click("[data-action=doctor]")
        visit.until_text("In Ordnung: ", "#doctor")
        assert "die IOMMU ist aus" in visit.text("#doctor")
        assert visit.run("page.documentElement.lang").startswith("de")
        for language, words in (("zh-cn", "在主机上"), ("fr-fr", "sur l'hôte"), ("it-it", "on the host")):
            visit.speak(language)
            visit.until_text(words, CARD)
        # its name in the menu of Cockpit
        visit.speak("zh-cn")
        browser.until("document.querySelector('a[href=\"/gpuswitch\"]')?.innerText.trim() === 'GPU'")
        nothing_is_wrong(browser)


def entry(target: str, result: str, started: int, finished: int) -> dict[str, Any]:
    return {"target": target, "result": result, "started": started, "finished": finished}


LAST_DAYS: dict[str, tuple[str, int, list[dict[str, Any]], list[str]]] = {
    "just started": ("host", 80, [], ["host 80-100"]),
    "since before": ("vfio", -9, [], ["vfio 0-100"]),
    "nothing known": ("absent", 80, [], []),
    "in a first switch": ("detaching", 80, [], ["host 10-100"]),
    "a first switch": ("vfio", 40, [entry("vfio", "done", 30, 40)], ["host 10-40", "vfio 40-100"]),
    "cancelled": ("host", 40, [entry("vfio", "cancelled", 30, 40)], ["host 10-100"]),
    "started anew where it was left": ("vfio", 70, [entry("vfio", "done", -30, -20)], ["vfio 0-100"]),
    "found elsewhere when started anew": (
        "host",
        70,
        [entry("vfio", "done", 30, 40)],
        ["host 10-40", "host 70-100"],
    ),
    "a recovery that ends on vfio": (
        "vfio",
        70,
        [entry("host", "failed", 30, 40), entry("host", "reverted", 60, 70)],
        ["vfio 10-40", "failed 40-70", "vfio 70-100"],
    ),
    "stuck until it comes back": (
        "host",
        70,
        [entry("vfio", "wedged", 30, 40)],
        ["host 10-40", "failed 40-70", "host 70-100"],
    ),
    "moved by somebody else": (
        "host",
        55,
        [entry("vfio", "done", 10, 20), entry("host", "drifted", 55, 55)],
        ["host 10-20", "vfio 20-55", "host 55-100"],
    ),
}
"""State and its time, the history from the oldest on, and what is drawn."""


def test_a_timeline_draws_what_is_known() -> None:
    """Of the time from 0 to 100, on a machine that was started at 10."""
    require_tools("cockpit")
    asked = {
        name: [{"State": state, "StateSince": since}, history[::-1]]
        for name, (state, since, history, _) in LAST_DAYS.items()
    }
    script = f"""
        import {{ timeline }} from "{PROJECT}/contrib/cockpit/gpuswitch/timeline.js";
        const drawn = Object.entries({json.dumps(asked)}).map(([name, [gpu, history]]) =>
            [name, timeline(gpu, history, {{ begin: 0, booted: 10, now: 100 }})
                .map(({{ start, end, word }}) => `${{word}} ${{start}}-${{end}}`)]);
        console.log(JSON.stringify(Object.fromEntries(drawn)));
    """
    assert in_node(script) == {name: parts for name, (*_, parts) in LAST_DAYS.items()}


def in_node(script: str) -> Any:
    """What this module of JavaScript says, in JSON."""
    node = ["node", "--input-type=module"]
    return json.loads(subprocess.run(node, input=script, check=True, capture_output=True, text=True).stdout)


def test_time_goes_by_the_clock_of_the_machine() -> None:
    """Whatever the browser's says: here that it is 1970."""
    require_tools("cockpit")
    script = f"""
        import {{ now, readClock }} from "{PROJECT}/contrib/cockpit/gpuswitch/clock.js";
        Date.now = () => 7000;
        globalThis.cockpit = {{ spawn: async () => "cpu 1 2\\nbtime 1000\\nprocesses 9\\n5.50 3.00\\n" }};
        console.log(JSON.stringify([now(), await readClock(), now()]));
    """
    assert in_node(script) == [7, 1000, 1005.5]


RECOGNIZED = [
    "",
    "the card is hot",
    "no GPU is named 'radeon'; this host has geforce (0000:01:00.0)",
    "this host has no GPU\nthis host has 2 GPUs; name one of a, b",
    "cannot unload nvidia: bad\nthe way back failed too: cannot load nvidia: bad",
    "cannot cancel switch 5f: it is over already (reverted)",
    "the kernel has not returned from 'bind 0000:01:00.1' within 2 s (process 7 is in state D)",
    "cannot unbind 0000:01:00.0 from nvidia: Invalid argument; cannot look for holders: bad",
    # A unit may be called as a result is.
    "cannot {purpose}: failed",
]


@pytest.fixture
def spoken() -> Iterator[None]:
    """Any language may be spoken, and English again afterwards."""
    yield
    speak("en")


@pytest.mark.usefixtures("spoken")
def test_what_the_service_says_is_worded_as_the_command_does() -> None:
    """All that it may say, once as it is made, once as it is recognized."""
    require_tools("cockpit")
    speak("de")
    catalogue = PROJECT / "gpuswitch/cli/locale/de/gpuswitch.po"
    said = [
        filled(template, dict.fromkeys(fields(template), GPU))
        for entry in catalogue.read_text(encoding="utf-8").split("\n\n")
        if re.search("^#: .*gpuswitch/(?!cli/|log/)", entry, re.MULTILINE)
        for template in read(entry)
    ]
    assert len(said) > 300
    said += RECOGNIZED
    off = Sentence("the IOMMU is off: {remedy}", remedy=Sentence("enable AMD-Vi (often called IOMMU) in the firmware"))
    made = [
        Sentence("{gpu} is {state}: {off}", gpu="failed", state="wedged", off=off),
        Sentence("no such setting; write {names}", names=Sentence.joined(" or ", ["A", "B", "C"])),
        Sentence("the {thing} is on fire", thing="card"),
        Sentence("cannot {operation} {subject}: {message}", operation="look for", subject="holders", message="bad"),
        Sentence(
            "at_boot is {target}, and {gpu} stays {place}: {why}", target="host", gpu=GPU, place="on vfio-pci", why=off
        ),
        off,
        Sentence.of("what {somebody} said"),
    ]
    told = [{"text": text, **sentence_values(text)} for text in made]
    script = f"""
        import {{ readFileSync }} from "node:fs";
        import {{ readCatalogue, scriptOfPage }} from "{PROJECT}/contrib/cockpit/catalogue.js";
        const command = readFileSync("{catalogue}", "utf8");
        globalThis.cockpit = {{ locale: () => null }};
        (0, eval)(scriptOfPage("de", [], readCatalogue(command)));
        const {{ recognized, sentence, stepTitle }} = await import("{PROJECT}/contrib/cockpit/gpuswitch/sentences.js");
        const said = {json.dumps(said)};
        console.log(JSON.stringify([said.map(recognized), said.map(stepTitle), {json.dumps(told)}.map(sentence)]));
    """
    found = in_node(script)
    assert found[2] == [reworded(text, [words]) for text, words in zip(made, told, strict=True)]
    assert dict(zip(said, found[1], strict=True)) == {text: step_title(text) for text in said}
    assert dict(zip(said, found[0], strict=True)) == {text: recognized(text) for text in said}
