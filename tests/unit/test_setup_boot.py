"""`setup boot`: what the initrd is told to do, what that does on a machine of files, and that all of it goes again."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from gpuswitch.cli.early_binding import TOOLS, Bound, Function, files_of
from gpuswitch.cli.failures import CtlError
from gpuswitch.cli.making_initrd import MakingError, make_initrd
from gpuswitch.cli.setup_boot import UNDO, boot, undo
from gpuswitch.doctor.checks.early import AGAIN
from gpuswitch.doctor.findings import Severity
from gpuswitch.doctor.looks.early import PENDING, SCRIPTS
from tests.harness.json_schemas import check
from tests.harness.made_machine import CARD, INTEGRATED, PORT, SOUND, MadeMachine

PLACES = {address: f"pci0000:00/{PORT}/{address}" for address in (CARD, SOUND)}
NAMED = Bound(
    CARD,
    [
        Function(CARD, PLACES[CARD], "0x10de", "0x2484", dark=True),
        Function(SOUND, PLACES[SOUND], "0x10de", "0x228b", dark=False),
    ],
)
SHELLS = [each for each in ("dash", "bash", "busybox") if shutil.which(each)]
MODPROBE = """\
#!/bin/sh
for device in {root}/sys/devices/*/*/*; do
    [ "$(cat "$device/driver_override")" = vfio-pci ] || continue
    ln -s "{root}/sys/bus/pci/drivers/vfio-pci" "$device/driver"
    ln -s "$device" "{root}/sys/bus/pci/drivers/vfio-pci/${{device##*/}}"
done
"""
"""Loads the driver: it takes what is aimed at it, as driver_attach() in drivers/base/dd.c has it."""


class Initrd:
    """What the script finds when the initrd runs it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "sys/bus/pci/drivers/vfio-pci").mkdir(parents=True)
        (root / "sys/bus/pci/drivers/nvidia").mkdir(parents=True)
        (root / "kmsg").write_text("")
        self.options("quiet")
        for address, ids in ((CARD, ("0x10de", "0x2484")), (SOUND, ("0x10de", "0x228b"))):
            folder = self.device(address)
            folder.mkdir(parents=True)
            self.write(address, vendor=ids[0], device=ids[1], driver_override="(null)")
        self.write(CARD, boot_vga="0")
        (root / "bin").mkdir()
        (root / "bin/modprobe").write_text(MODPROBE.format(root=root))
        (root / "bin/modprobe").chmod(0o755)

    def device(self, address: str) -> Path:
        return self.root / "sys/devices" / PLACES[address]

    def write(self, address: str, **attributes: str) -> None:
        for name, value in attributes.items():
            (self.device(address) / name).write_text(f"{value}\n")

    def options(self, words: str) -> None:
        (self.root / "cmdline").write_text(f"root=/dev/sda1 {words}\n")

    def runs(self, shell: str, text: str) -> None:
        places = {"/sys/": "sys/", "/dev/kmsg": "kmsg", "/proc/cmdline": "cmdline", "/usr/lib/gpuswitch/": "bin/"}
        for place, here in places.items():
            text = text.replace(place, f"{self.root}/{here}")
        script = self.root / "script"
        script.write_text(text.replace(">" + str(self.root / "kmsg"), ">>" + str(self.root / "kmsg")))
        words = [shell, *(["sh"] if shell == "busybox" else []), str(script)]
        ended = subprocess.run(
            words, env={"PATH": f"{self.root}/bin:{os.defpath}"}, capture_output=True, text=True, check=True
        )
        assert ended.stderr == ""

    @property
    def overrides(self) -> list[str]:
        return [(self.device(each) / "driver_override").read_text().strip() for each in (CARD, SOUND)]

    @property
    def said(self) -> list[str]:
        return [line.removeprefix("<5>gpuswitch: ") for line in (self.root / "kmsg").read_text().splitlines()]


@pytest.fixture
def initrd(tmp_path: Path) -> Initrd:
    return Initrd(tmp_path)


def script(tool: str = "dracut") -> str:
    return files_of(tool, [NAMED])[SCRIPTS[tool]]


@pytest.mark.parametrize("shell", SHELLS)
def test_all_of_the_gpu_is_on_vfio_before_udev(initrd: Initrd, shell: str) -> None:
    initrd.runs(shell, script())
    assert initrd.overrides == ["vfio-pci", "vfio-pci"]
    assert initrd.said == [f"{CARD} is on vfio-pci", f"{SOUND} is on vfio-pci"]


def another_card(initrd: Initrd) -> str:
    initrd.write(CARD, device="0x2204")
    return f"at {PLACES[CARD]} is 0x10de 0x2204, and not 0x10de 0x2484"


def another_sound(initrd: Initrd) -> str:
    initrd.write(SOUND, vendor="0x1002")
    return f"at {PLACES[SOUND]} is 0x1002 0x228b, and not 0x10de 0x228b"


def nothing_there(initrd: Initrd) -> str:
    """The buses have other numbers: the very same card is behind another port."""
    shutil.move(initrd.device(CARD).parent, initrd.root / "sys/devices/pci0000:00/0000:00:06.0")
    return f"at {PLACES[CARD]} is no device, and not 0x10de 0x2484"


def a_driver_has_it(initrd: Initrd) -> str:
    (initrd.device(CARD) / "driver").symlink_to(initrd.root / "sys/bus/pci/drivers/nvidia")
    return f"{CARD} has the driver nvidia already"


def booted_on_it(initrd: Initrd) -> str:
    initrd.write(CARD, boot_vga="1")
    return f"{CARD} is the display that this machine booted on"


@pytest.mark.parametrize(
    "change",
    [another_card, another_sound, nothing_there, a_driver_has_it, booted_on_it],
    ids=lambda each: each.__name__,
)
def test_a_gpu_that_is_not_as_it_was_is_left_to_the_host(initrd: Initrd, change: Callable[[Initrd], str]) -> None:
    """All of it, and the kernel's log says why. `dash` is Debian's shell; busybox has another one."""
    why = change(initrd)
    initrd.runs(SHELLS[0], script())
    assert initrd.said == [why, f"{CARD} is left to its host drivers; to set it up anew: gpuswitchctl setup boot"]
    assert list((initrd.root / "sys/bus/pci/drivers/vfio-pci").iterdir()) == []
    left = [each for each in initrd.root.glob("sys/devices/*/*/*/driver_override") if each.read_text() != "(null)\n"]
    assert left == []


def test_a_word_at_the_boot_loader_keeps_it_from_working(initrd: Initrd) -> None:
    initrd.options("quiet gpuswitch.early=off splash")
    initrd.runs(SHELLS[0], script())
    assert (initrd.said, initrd.overrides) == (["nothing is bound: gpuswitch.early=off"], ["(null)", "(null)"])


def test_what_does_not_load_is_said_and_no_host_driver_may_have_it(initrd: Initrd) -> None:
    (initrd.root / "bin/modprobe").write_text("#!/bin/sh\nexit 1\n")
    initrd.runs(SHELLS[0], script())
    said = "could not be bound to vfio-pci, and has no driver"
    assert initrd.said == ["cannot load vfio-pci", f"{CARD} {said}", f"{SOUND} {said}"]
    assert initrd.overrides == ["vfio-pci", "vfio-pci"]


@pytest.mark.parametrize("tool", sorted(TOOLS))
def test_what_is_asked_for_its_order_does_nothing(initrd: Initrd, tool: str) -> None:
    """initramfs-tools asks each script so when it makes the initrd (initramfs-tools(7))."""
    text = files_of(tool, [NAMED])[SCRIPTS[tool]]
    place = initrd.root / "script"
    place.write_text(text)
    assert subprocess.run(["sh", place, "prereqs"], capture_output=True, check=True).stdout == b""
    for name, each in files_of(tool, [NAMED]).items():
        shell = "sh" if "#!/bin/sh" in each or "/hooks/" in name else "bash"
        subprocess.run([shell, "-n"], input=each.encode(), check=True)


# The command ---------------------------------------------------------------------------------------------------------

KERNEL = "6.1.0-30-amd64"
IMAGE = f"boot/initrd.img-{KERNEL}"
UPDATE = """
for file in {root}/etc/initramfs-tools/scripts/init-top/*; do
    [ ! -e "$file" ] || echo "scripts/init-top/${{file##*/}}"
done >"{image}.new"
{then}
mv "{image}.new" "{image}"
echo made >>{root}/made
"""


class Boots:
    """A machine whose initrd is a list of the scripts in it."""

    def __init__(self, root: Path) -> None:
        self.made = MadeMachine(root)
        self.made.write(IMAGE, "")
        self.made.program("lsinitramfs", 'cat "$1"')
        self.updates()

    def updates(self, then: str = "") -> None:
        root = self.made.root
        self.made.program("update-initramfs", UPDATE.format(root=root, image=root / IMAGE, then=then))

    def boot(self, *gpus: str, **options: bool) -> int:
        return boot(self.arguments(gpus=list(gpus), **options), self.made.machine)

    def undo(self, **options: bool) -> int:
        return undo(self.arguments(**options), self.made.machine)

    def arguments(self, **given: object) -> Namespace:
        usual: Mapping[str, object] = {"gpus": [], "yes": True, "dry_run": False, "json": False, "force": False}
        self.made.examined()
        return Namespace(**{**usual, **given}, bus=f"unix:path={self.made.root}/no-bus")

    @property
    def image(self) -> str:
        return (self.made.root / IMAGE).read_text()

    @property
    def script(self) -> Path:
        return self.made.root / SCRIPTS["initramfs-tools"][1:]

    @property
    def pending(self) -> bool:
        return (self.made.root / PENDING[1:]).exists()

    def tree(self) -> dict[str, bytes]:
        """All that is ours to write, and nothing else."""
        places = ("etc", "usr/lib/dracut", "var")
        found = [each for place in places for each in (self.made.root / place).rglob("*")]
        return {str(each): each.read_bytes() if each.is_file() else b"" for each in found}


@pytest.fixture
def machine(tmp_path: Path) -> Boots:
    return Boots(tmp_path)


def test_there_and_back_again(machine: Boots, capsys: pytest.CaptureFixture[str]) -> None:
    machine.undo()
    assert capsys.readouterr().out == "there is nothing to undo: setup boot has written nothing\n"
    before = machine.tree()
    machine.boot(dry_run=True)
    assert (machine.tree(), machine.image) == (before, "")
    assert "+            take " in capsys.readouterr().out

    machine.boot()
    assert machine.image == "scripts/init-top/gpuswitch\n"
    assert machine.script.stat().st_mode & 0o111 == 0o111
    assert f"/{IMAGE} was made anew, and has it" in capsys.readouterr().out
    [found] = machine.made.found("early")
    assert (found.severity, str(found.reason)) == (
        Severity.OK,
        f"the initrd gives {CARD}, {SOUND} to vfio-pci, before any host driver",
    )
    assert machine.made.found("modprobe") == []
    machine.boot()
    assert "nothing is to be written" in capsys.readouterr().out
    assert (machine.made.root / "made").read_text() == "made\n"

    machine.undo()
    assert (machine.image, machine.pending, machine.made.found("early")) == ("", False, [])
    assert {name for name in machine.tree() if "var" not in name} == {name for name in before if "var" not in name}
    assert "is removed, as it was not there before" in capsys.readouterr().out


def test_programs_are_told_the_same(machine: Boots, capsys: pytest.CaptureFixture[str]) -> None:
    machine.boot(json=True)
    told = json.loads(capsys.readouterr().out)
    check("setup", told)
    assert (told["tool"], told["changed"], told["commands"]) == (
        "initramfs-tools",
        True,
        ["update-initramfs -u -k all"],
    )
    assert [each["place"] for each in told["gpus"][0]["functions"]] == [PLACES[CARD], PLACES[SOUND]]
    machine.undo(json=True)
    told = json.loads(capsys.readouterr().out)
    check("setup", told)
    assert [each["result"] for each in told["files"]] == ["removed", "removed"]


@pytest.mark.parametrize("then", ["echo no room on /boot; exit 1", "exit 0"], ids=["fails", "makes-nothing"])
def test_where_the_initrd_is_not_made_all_is_put_back(machine: Boots, then: str) -> None:
    before = machine.tree()
    root = machine.made.root
    machine.updates(f"[ ! -e {machine.script} ] || {{ {then}; }}")
    with pytest.raises(CtlError, match="all is as it was before") as error:
        machine.boot()
    assert ("no room on /boot" in str(error.value)) is ("no room" in then)
    assert ("was made without it" in str(error.value)) is ("no room" not in then)
    assert (machine.image, machine.pending) == ("", False)
    assert {name for name in machine.tree() if "/var" not in name} == {name for name in before if "/var" not in name}
    assert (root / "made").read_text() == "made\n"


def test_where_it_cannot_be_made_at_all_the_doctor_knows_and_another_undo_ends_it(machine: Boots) -> None:
    machine.updates("exit 3")
    with pytest.raises(CtlError, match=r"status 3\n.*the initrd may still bind the GPU.*gpuswitch.early=off"):
        machine.boot()
    assert (machine.script.exists(), machine.pending) == (False, True)
    [found] = machine.made.found("early")
    assert (found.severity, found.commands) == (Severity.WARNING, (AGAIN, UNDO))
    with pytest.raises(CtlError, match="gpuswitchctl setup boot undo"):
        machine.undo()
    machine.updates()
    machine.undo()
    assert (machine.pending, machine.made.found("early")) == (False, [])


def test_what_was_written_before_is_there_again_where_the_next_cannot_be_made(machine: Boots) -> None:
    machine.boot()
    before = machine.script.read_text()
    machine.made.write("etc/gpuswitch/config.toml", f'[[gpu]]\naddress = "{CARD}"\nallow_boot_display = true\n')
    machine.updates(f"grep -q 'is_dark pci' {machine.script} || exit 1")
    with pytest.raises(CtlError, match="all is as it was before"):
        machine.boot()
    assert (machine.script.read_text(), machine.script.stat().st_mode & 0o111) == (before, 0o111)
    assert machine.image == "scripts/init-top/gpuswitch\n"


def test_one_that_never_ends_is_ended(machine: Boots) -> None:
    machine.updates(f"[ ! -e {machine.script} ] || exec sleep infinity")
    with pytest.raises(CtlError, match=r"not done within .* s\nall is as it was before"):
        boot(machine.arguments(), machine.made.machine, seconds=0.5)
    assert not machine.script.exists()


def test_a_program_that_is_not_there_is_named() -> None:
    with pytest.raises(MakingError, match="/no/such --force: No such file or directory"):
        make_initrd(["/no/such --force"])


def test_a_gpu_that_the_initrd_has_bound_can_be_set_up_again(
    machine: Boots, capsys: pytest.CaptureFixture[str]
) -> None:
    machine.boot()
    machine.made.tree.driver("vfio-pci", "vfio_pci")
    for each in (CARD, SOUND):
        machine.made.tree.unbind(each)
        machine.made.tree.bind(each, "vfio-pci")
    machine.made.says("vfio")
    capsys.readouterr()
    machine.boot()
    assert "nothing is to be written" in capsys.readouterr().out
    machine.made.booted_on(CARD)
    with pytest.raises(CtlError, match="the display that this machine booted on"):
        machine.boot()


# What is refused -----------------------------------------------------------------------------------------------------


def no_tool(machine: Boots) -> None:
    for name in ("update-initramfs", "lsinitramfs"):
        machine.made.remove(f"usr/bin/{name}")


def on_nixos(machine: Boots) -> None:
    machine.made.distribution("nixos")


def somebodys_script(machine: Boots) -> None:
    machine.made.write(SCRIPTS["initramfs-tools"][1:], "#!/bin/sh\n")


def changed_since(machine: Boots) -> None:
    machine.boot()
    machine.script.write_text("#!/bin/sh\n# mine\n")


def at_boot_host(machine: Boots) -> None:
    machine.made.write("etc/gpuswitch/config.toml", f'[[gpu]]\naddress = "{CARD}"\nat_boot = "host"\n')


def boots_on_it(machine: Boots) -> None:
    machine.made.booted_on(CARD)


def two_gpus(machine: Boots) -> None:
    machine.made.write("etc/gpuswitch/config.toml", "")


def not_root(machine: Boots) -> None:
    machine.made.as_root = False


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (no_tool, 'none of dracut, initramfs-tools, mkinitcpio; at_boot = "vfio"'),
        (on_nixos, "cannot tell what makes the initrd here"),
        (somebodys_script, "scripts/init-top/gpuswitch: there is one that is not ours; give it another name"),
        (changed_since, "scripts/init-top/gpuswitch: there is one that is not ours; give it another name"),
        (at_boot_host, "the service would bring 0000:01:00.0 to its host driver when the machine has started"),
        (boots_on_it, "is the display that this machine booted on, so its screen would go dark"),
        (two_gpus, f"cannot tell which GPU is meant: say --gpu, one of {INTEGRATED}, {CARD}"),
        (not_root, "it takes root: sudo gpuswitchctl setup boot"),
    ],
    ids=lambda each: getattr(each, "__name__", ""),
)
def test_what_makes_no_sense_is_said_and_changes_nothing(
    machine: Boots, change: Callable[[Boots], None], said: str
) -> None:
    change(machine)
    before = machine.tree()
    with pytest.raises(CtlError) as error:
        machine.boot()
    assert said in str(error.value)
    assert machine.tree() == before


def test_the_undo_leaves_what_somebody_has_changed_unless_it_is_forced(machine: Boots) -> None:
    changed_since(machine)
    with pytest.raises(CtlError, match="setup boot undo --force"):
        machine.undo()
    assert (machine.script.exists(), machine.pending) == (True, False)
    machine.undo(force=True)
    assert (machine.script.exists(), machine.image) == (False, "")


# What the doctor says ------------------------------------------------------------------------------------------------


def test_the_doctor_sees_that_another_device_is_there(machine: Boots) -> None:
    machine.boot()
    (machine.made.tree.path(CARD) / "device").write_text("0x2204\n")
    [found] = machine.made.found("early")
    assert str(found.reason) == (
        f"the initrd leaves {PLACES[CARD]} to its host driver: there was 10de:2484, and now there is 10de:2204"
    )
    assert found.commands == ("gpuswitchctl setup boot", "gpuswitchctl setup boot undo")


def test_the_doctor_sees_an_initrd_that_is_older(machine: Boots) -> None:
    machine.boot()
    os.utime(machine.made.root / IMAGE, (1, 1))
    [found] = machine.made.found("early")
    assert f"/{IMAGE} is older than /etc/initramfs-tools/scripts/init-top/gpuswitch" in str(found.reason)


def test_the_doctor_sees_that_the_command_line_keeps_it_from_working(machine: Boots) -> None:
    machine.boot()
    machine.made.command_line("gpuswitch.early=off")
    [found] = machine.made.found("early")
    assert (found.severity, str(found.remedy)) == (Severity.WARNING, "take it off the kernel command line")
