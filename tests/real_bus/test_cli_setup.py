"""`gpuswitchctl setup`: a person at a terminal, or options alone; a made machine, and the real service beside it."""

from __future__ import annotations

import json
import pickle
import socket
import subprocess
import sys
import tomllib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.harness.buses.private import PrivateBus
from tests.harness.json_schemas import check
from tests.harness.made_machine import CARD, INTEGRATED, MadeMachine
from tests.harness.promtool import RULES
from tests.harness.service.services import Service, environment
from tests.harness.service.terminal import END, INTERRUPT, Terminal
from tests.real_bus.conftest import Start

pytestmark = pytest.mark.timeout(120)
"""Each setup is a dozen short processes and a few of the service's own checks."""

QUIET = "[metrics]\nenabled = false\n"
SETS_UP = """
import pickle, sys
from functools import partial
from pathlib import Path
from gpuswitch.cli import main, prometheus, proxmox, setup
machine, configuration, state = pickle.loads(Path(sys.argv.pop(1)).read_bytes())
places = setup.Places(configuration, state)
setup.setup = partial(setup.setup, machine=machine, places=places)
setup.undo = partial(setup.undo, machine=machine, places=places)
proxmox.setup = partial(proxmox.setup, machine=machine, state=state)
prometheus.setup = partial(prometheus.setup, machine=machine)
sys.exit(main.main())
"""
"""The command, on another machine than this one, and with the files in other places."""
VIRSH = """
case "$*" in
*" list "*) printf 'win10\\nubuntu\\n' ;;
*"--inactive win10")
    echo "<domain><devices><hostdev type='pci'><source>"
    echo "<address domain='0x0000' bus='0x01' slot='0x00' function='0x0'/>"
    echo "</source></hostdev></devices></domain>" ;;
*) exit 1 ;;
esac
"""
LOGINCTL = """
case "$*" in
show-seat*) echo ActiveSession=2 ;;
*) printf 'Name=kim\\nType={type}\\nDesktop={desktop}\\nService={service}\\nClass=user\\n' ;;
esac
"""


@dataclass
class Desk:
    """A machine, its service, and somebody in front of it."""

    made: MadeMachine
    service: Service
    folder: Path
    environ: dict[str, str]

    @property
    def file(self) -> Path:
        return self.service.config / "conf.d/50-setup.toml"

    @property
    def state(self) -> Path:
        return self.folder / "lib/setup"

    def command(self, *words: str) -> list[str]:
        self.made.examined()  # writes what stands in for systemctl
        place = self.folder / "machine"
        place.write_bytes(pickle.dumps((self.made.machine, self.service.config, self.state)))
        return [sys.executable, "-c", SETS_UP, str(place), "setup", *words]

    def run(self, *words: str) -> tuple[int, str, str]:
        ended = self._ended(*words)
        return ended.returncode, ended.stdout, "".join(told(ended.stderr))

    def warned(self, *words: str) -> tuple[int, str]:
        """The exit status, and all of the error output."""
        ended = self._ended(*words)
        return ended.returncode, ended.stderr

    def _ended(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*words),
            env=self.environ,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )

    def json(self, *words: str) -> dict[str, Any]:
        status, out, said = self.run(*words, "--json")
        assert out, (status, said)
        check("setup", json.loads(out))
        return {"status": status, **json.loads(out)}

    def at_a_terminal(self, *words: str) -> Terminal:
        return Terminal(self.command(*words), self.environ)

    def tree(self) -> dict[str, tuple[int, bytes]]:
        """All of the configuration: each file and folder with its mode and content."""
        return {
            str(each.relative_to(self.service.config)): (
                each.stat().st_mode,
                each.read_bytes() if each.is_file() else b"",
            )
            for each in sorted(self.service.config.rglob("*"))
        }

    def gpu(self) -> dict[str, Any]:
        [gpu] = tomllib.loads(self.file.read_text())["gpu"]
        return dict(gpu)


def told(text: str) -> list[str]:
    """The lines, without what the machine of the test, which has other GPUs, has to say of the configuration."""
    return [line for line in text.splitlines(keepends=True) if not line.startswith("gpuswitchctl: warning: ")]


Sit = Callable[..., Awaitable[Desk]]


@pytest.fixture
def sit(start: Start, private_bus: PrivateBus, tmp_path: Path) -> Sit:
    async def sit(scenario: str = "laptop", config: str = QUIET) -> Desk:
        made = MadeMachine(tmp_path / "made")
        made.program("virsh", VIRSH)
        made.program("loginctl", LOGINCTL.format(type="wayland", desktop="GNOME", service="gdm-password"))
        made.unit("display-manager.service", Id="lightdm.service")
        service = await start(scenario, config=config)
        environ = environment(GPUSWITCH_BUS=private_bus.address, TERM="xterm", NO_COLOR="1", COLUMNS="200")
        return Desk(made, service, tmp_path, environ)

    return sit


async def test_options_alone_set_up_two_gpus_once_and_undo_puts_back_every_byte(sit: Sit) -> None:
    desk = await sit()
    before = desk.tree()
    options = ("--gpu", "01:00.0", "--screens", "two", "--at-boot", "vfio", "--vm", "win10", "--yes")

    dry = desk.json(*options, "--dry-run")
    assert (dry["status"], dry["changed"], dry["dry_run"], desk.tree(), desk.state.exists()) == (
        0,
        False,
        True,
        before,
        False,
    )

    first = desk.json(*options)
    assert (first["status"], first["changed"], first["text"]) == (0, True, dry["text"])
    assert desk.gpu() == {
        "address": CARD,
        "match": {"vendor": "10de", "device": "2484"},
        "name": "rtx3070",
        "at_boot": "vfio",
    }
    assert await desk.service.ask("GetGpu", "s", "rtx3070")
    assert '  gpu[0000:01:00.0].name = "rtx3070" (before: "")' in first["service"]
    assert [line.partition(" | ")[2] for line in first["commands"]] == [
        "virsh attach-device win10 /dev/stdin --config"
    ] * 3
    assert "function='0x1'" in first["commands"][0]

    again = desk.json(*options)
    assert (again["changed"], again["service"], again["text"]) == (False, [], first["text"])
    assert "says all of this already" in desk.run(*options)[1]

    written = desk.tree()
    for words in (("--dry-run", "undo"), ("undo", "--dry-run")):
        shown = desk.json(*words)
        assert (shown["files"], shown["dry_run"], shown["service"], desk.tree()) == (
            [{"path": str(desk.file), "result": "removed", "kept": ""}],
            True,
            [],
            written,
        )
    status, out, _said = desk.run("undo", "--dry-run")
    assert (status, desk.tree(), desk.state.exists()) == (0, written, True)
    assert out.startswith(f"{desk.file} would be removed, as it was not there before\n--- {desk.file}\n+++ /dev/null\n")
    assert '-name = "rtx3070"\n' in out
    assert out.endswith("nothing is changed: this was a dry run\n")

    undone = desk.json("undo")
    assert undone["files"] == [{"path": str(desk.file), "result": "removed", "kept": ""}]
    assert (desk.tree(), desk.state.exists()) == (before, False)
    assert desk.run("undo")[1] == "there is nothing to undo: setup has written nothing\n"


async def test_one_screen_finds_what_draws_on_it(sit: Sit) -> None:
    desk = await sit("single")
    desk.made.booted_on(CARD)
    status, out, said = desk.run("--yes")
    assert (status, said) == (0, "")
    assert desk.gpu() | {"match": 0} == {
        "address": CARD,
        "match": 0,
        "name": "rtx3070",
        "allow_boot_display": True,
        "stop_units": ["display-manager.service"],
    }
    assert "# lightdm.service" in desk.file.read_text()
    assert "to try it: gpuswitchctl trial rtx3070 --seconds 60" in out
    assert "the hook is installed, and libvirt runs it" in out
    assert "display manager: lightdm.service; it ends before" in out
    assert "session 2 of kim: wayland GNOME\n" in out

    desk.made.program("loginctl", LOGINCTL.format(type="x11", desktop="KDE", service="sddm"))
    assert desk.run("--yes")[0] == 0
    assert desk.gpu()["end_sessions"] is True

    desk.made.units.pop("display-manager.service")
    desk.made.program("loginctl", LOGINCTL.format(type="tty", desktop="", service="login"))
    assert "no display manager brings the desktop back" in desk.run("--yes")[1]
    assert (desk.gpu().get("stop_units"), desk.gpu()["end_sessions"]) == (None, True)
    # The first one is what undo goes back to.
    assert desk.run("undo")[0] == 0
    assert not desk.file.exists()


async def test_what_is_configured_elsewhere_stays(sit: Sit) -> None:
    own = f'{QUIET}[[gpu]]\naddress = "{CARD}"\nname = "mine"\nmatch = {{ vendor = "10de" }}\n'
    own += 'stop_units = ["ollama.service"]\n'
    desk = await sit("single", own)
    desk.made.unit("ollama.service")
    assert desk.run("--yes")[0] == 0
    assert desk.gpu() == {
        "address": CARD,
        "name": "mine",
        "allow_boot_display": True,
        "stop_units": ["ollama.service", "display-manager.service"],
    }


async def test_a_table_that_tells_it_by_what_it_is_gets_no_second_one(sit: Sit) -> None:
    own = f'{QUIET}[[gpu]]\nname = "mine"\nmatch = {{ vendor = "10de" }}\n'
    desk = await sit("single", own)
    before = desk.tree()
    status, _out, said = desk.run("--yes")
    assert (status, desk.tree()) == (2, before)
    assert "cannot set up mine (0000:01:00.0): it has a table already that does not name it by this address" in said
    assert f"{desk.service.config}/config.toml" in said


async def test_a_person_is_asked_and_shown_and_offered_a_trial(sit: Sit) -> None:
    desk = await sit("plain")
    person = desk.at_a_terminal()
    person.until("(the machine boots on it)")
    person.until("Which GPU is to go to virtual machines (a number, or several)? [2] ")
    person.press("9\n")
    person.until("no GPU is named '9'")
    person.until("? [2] ")
    person.press("\n")
    person.until("or on another one (2)? [2] ")
    person.press("n\n")
    person.until("type one of these, then Enter: 1, 2")
    person.until("or on another one (2)? [2] ")
    person.press("\n")
    person.until("What is it to be called? [rtx3070] ")
    person.press("my gpu\n")
    person.until("'my gpu' is not a name; use at most 32 of")
    person.press("Geforce\n")
    person.until("on the host (h)? [k] ")
    person.press("y\n")
    person.until("type one of these, then Enter: k, v, h")
    person.until("on the host (h)? [k] ")
    person.press("v\n")
    person.until("(a number; nothing: later)? ")
    person.press("win10\n")
    person.until('+name = "geforce"')
    person.until("Write this? [y/N] ")
    assert not desk.file.exists()
    person.press("y\n")
    person.until("50-setup.toml is written; to take it back: gpuswitchctl setup undo")
    person.until("win10 does not have all of it yet")
    person.until("Try it now: to vfio, and home by itself after 60 s? [y/N] ")
    person.press("y\n")
    person.until("press h for back now")
    person.press("h")
    person.until("geforce (0000:01:00.0) is on the host now")
    assert person.ended() == 0


async def test_before_a_trial_it_is_told_what_that_ends(sit: Sit) -> None:
    desk = await sit("single")
    desk.made.booted_on(CARD)
    person = desk.at_a_terminal("--name", "card", "--vm", "win10")
    person.until("Write this? [y/N] ")
    person.press("y\n")
    person.until("a trial ends the desktop, and the screen is dark for 60 s: save your work first")
    person.until(f"to move card ({CARD}) to vfio ends what runs on this screen:")
    person.until("stopped until it is home: display-manager.service")
    person.until("Try it now: to vfio, and home by itself after 60 s? [y/N] ")
    person.press("n\n")
    person.until("to try it: gpuswitchctl trial card --seconds 60")
    assert person.ended() == 0


@pytest.mark.parametrize(
    ("keys", "status", "said"),
    [
        (INTERRUPT, 130, "interrupted; nothing is changed"),
        (END, 1, "cannot go on without an answer; nothing is changed"),
        ("n\n", 1, "cannot go on: you said no; nothing was changed"),
    ],
)
async def test_whoever_does_not_agree_has_changed_nothing(sit: Sit, keys: str, status: int, said: str) -> None:
    desk = await sit("single")
    before = desk.tree()
    person = desk.at_a_terminal("--name", "card", "--vm", "win10")
    person.until("Write this? [y/N] ")
    person.press(keys)
    person.until(said)
    assert (person.ended(), desk.tree(), desk.state.exists()) == (status, before, False)


async def test_bad_answers_are_one_sentence_and_change_nothing(sit: Sit) -> None:
    desk = await sit()
    before = desk.tree()
    for words, status, said in (
        ([], 2, "cannot ask: this is no terminal; give the answers as options"),
        (["--yes", "--gpu", "09:00.0"], 2, "no GPU is named '09:00.0'; this host has 0000:00:02.0, 0000:01:00.0"),
        (
            ["--yes", "--gpu", CARD, "--name", "a b"],
            2,
            "gpuswitchctl: cannot set up GPUs for virtual machines: 'a b' is not a name; use at most 32 of: letters, ",
        ),
        (["--yes", "--gpu", CARD, "--screens", "one", "--at-boot", "vfio"], 2, "would start without a picture"),
        (["--yes", "--gpu", CARD, "--gpu", INTEGRATED, "--name", "x"], 2, "cannot give one name to several GPUs"),
        (["--yes", "--gpu", CARD, "--vm", "win11"], 2, "no virtual machine is named win11; there are: ubuntu, win10"),
        (["--yes", "--gpu", INTEGRATED], 2, "cannot tell where the desktop draws: say --screens one"),
    ):
        ended = desk.run(*words)
        assert ended[2].count("\n") == 1, ended
        assert (ended[0], said in ended[2], desk.tree(), desk.state.exists()) == (status, True, before, False), ended
    desk.made.program("virsh", "exit 1")
    assert "no answer from virsh" in desk.run("--yes", "--gpu", CARD, "--vm", "win10")[2]
    (desk.made.root / "usr/bin/virsh").unlink()
    assert desk.run("--yes", "--gpu", CARD, "--vm", "win10")[2] == (
        "gpuswitchctl: cannot ask libvirt for its virtual machines: virsh is not installed; to install it: apt-get "
        "install libvirt-clients\n"
    )
    desk.made.as_root = False
    assert desk.run("--yes")[2] == (
        "gpuswitchctl: cannot write the configuration: it takes root: sudo gpuswitchctl setup\n"
    )
    assert "it takes root: sudo gpuswitchctl setup undo" in desk.run("undo")[2]
    assert (desk.tree(), desk.state.exists()) == (before, False)


async def test_all_that_nobody_can_tell_is_asked_for_at_once_and_why_nobody_can(sit: Sit) -> None:
    desk = await sit("plx")
    before = desk.tree()
    status, err = desk.warned("--dry-run")
    warning, said = err.splitlines()
    assert (
        "of what may be in the way: no GPU is named '0000:27:00.0'; this host has 0000:00:02.0, 0000:01:00.0" in warning
    )
    assert (status, desk.tree()) == (2, before)
    assert said == (
        "gpuswitchctl: cannot tell which GPU is meant, and where the desktop draws: say --gpu, one of 0000:27:00.0, "
        "0000:28:00.0, and --screens one (on that GPU), or --screens two (on another)"
    )
    assert desk.run("--dry-run", "--gpu", "27:00.0", "--screens", "two")[0] == 0


async def test_problems_come_first_and_no_trial_is_offered_before_they_are_mended(sit: Sit) -> None:
    desk = await sit()
    desk.made.command_line("intel_iommu=on module_blacklist=vfio_pci")
    status, out, _said = desk.run("--yes", "--gpu", CARD)
    assert status == 0
    assert out.index("the kernel command line keeps vfio_pci from being loaded") < out.index("+[[gpu]]")
    assert "setup goes on all the same" in out
    assert "there are problems above: mend them first" in out
    assert "gpuswitchctl trial" not in out


async def test_a_service_that_is_not_there_is_one_sentence(sit: Sit) -> None:
    desk = await sit()
    await desk.service.end(15)
    status, out, said = desk.run("--yes")
    assert (status, out) == (5, "")
    assert said.startswith("gpuswitchctl: cannot set up GPUs for virtual machines: the gpuswitch service")
    assert not desk.file.exists()


async def test_what_somebody_has_changed_since_is_not_overwritten(sit: Sit) -> None:
    desk = await sit()
    assert desk.run("--yes", "--gpu", CARD)[0] == 0
    desk.file.write_text(desk.file.read_text() + "# mine\n")
    before = desk.tree()
    status, _out, said = desk.run("--yes", "--gpu", CARD, "--name", "other")
    assert (status, "somebody has changed it since setup wrote it" in said, desk.tree()) == (1, True, before)
    status, _out, said = desk.run("undo")
    assert (status, "gpuswitchctl setup undo --force" in said, desk.tree()) == (1, True, before)
    forced = desk.json("undo", "--force")
    assert [Path(each["kept"]).name for each in forced["files"]] == [desk.file.name]
    assert desk.state.with_name("setup-kept").joinpath(desk.file.name).read_bytes().endswith(b"# mine\n")
    assert not desk.file.exists()


async def test_machines_of_proxmox_ask_for_the_gpu_that_was_set_up_and_undo_takes_back_both(sit: Sit) -> None:
    desk = await sit()
    desk.made.proxmox(f"name: win11\nhostpci0: {CARD},pcie=1\n", script="", vmid="101")
    status, _out, said = desk.run("proxmox", "--yes")
    assert status != 0
    assert "no GPU is managed, so no machine needs a hookscript; first: gpuswitchctl setup\n" in said
    assert desk.run("--gpu", "01:00.0", "--screens", "two", "--yes")[0] == 0
    for answer, status in (("n\r", 1), ("y\r", 0)):
        with desk.at_a_terminal("proxmox") as terminal:
            terminal.until("Do this? [y/N]")
            terminal.press(answer)
            assert terminal.ended() == status
    done = desk.json("proxmox", "--yes")
    assert (done["changed"], done["machines"][0]["gpus"], done["machines"][0]["sets"]) == (False, [CARD], False)
    undone = desk.json("undo")
    assert undone["commands"] == ["qm set 101 --delete hookscript"]
    assert {each["result"] for each in undone["files"]} == {"removed"}
    assert len(undone["files"]) == 2


async def test_prometheus_asks_the_service_where_it_serves_once_somebody_agrees(sit: Sit) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    desk = await sit(config=f"[metrics]\nport = {port}\n")
    file = desk.made.write("etc/prometheus/prometheus.yml", "scrape_configs:\n")
    desk.made.write("usr/share/gpuswitch/prometheus/gpuswitch.rules.yml", RULES.read_text())
    desk.made.program("promtool")
    for answer, status, there in (("n\r", 1, False), (INTERRUPT, 130, False), ("y\r", 0, True)):
        with desk.at_a_terminal("prometheus") as terminal:
            terminal.until("Write this? [y/N]")
            terminal.press(answer)
            assert (terminal.ended(), f"127.0.0.1:{port}" in file.read_text()) == (status, there)
    assert [each["path"] for each in desk.json("undo")["files"]] == [str(file)]
    assert file.read_text() == "scrape_configs:\n"
