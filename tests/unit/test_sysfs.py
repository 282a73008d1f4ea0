"""A look at a host, over a fake sysfs; tests/real_kernel looks at real ones."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from gpuswitch.host.linux.framebuffers import BOOT_DRIVERS
from gpuswitch.host.linux.reading import first_line
from gpuswitch.host.linux.sysfs import Sysfs
from gpuswitch.model.address import PciAddress
from gpuswitch.model.facts import BootFramebuffer, Driver, HostFacts, Module, PciFunction
from gpuswitch.model.gpu import discover
from tests.harness.sysfs_tree import Tree, big_host

GPU = "0000:01:00.0"
AUDIO = "0000:01:00.1"
PORT = "0000:00:01.0"


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


def seen(tree: Tree, address: str = GPU) -> PciFunction:
    return Sysfs(tree.roots).look().functions[PciAddress.parse(address)]


def two_functions(tree: Tree) -> None:
    """A graphics card with its sound, behind a root port, as on most desktops."""
    tree.driver("nvidia", "nvidia")
    tree.driver("snd_hda_intel", "snd_hda_intel")
    tree.driver("pcieport", "pcieportdrv", built_in=True)
    tree.function(PORT, ids="8086:a70d", class_code="060400", driver="pcieport", group=2)
    tree.function(GPU, driver="nvidia", group=15, under=[PORT])
    tree.function(AUDIO, ids="10de:228b", class_code="040300", driver="snd_hda_intel", group=15, under=[PORT])


def test_what_a_card_is_told_by_wherever_it_is(tree: Tree) -> None:
    two_functions(tree)
    serial = tree.path(GPU) / "serial_number"
    serial.write_text("00-80-EE-00-00-00-41-80\n")
    for name, address in {"2": "0000:01:00", "3": "0000:05:00"}.items():
        (tree.sys / "bus/pci/slots" / name).mkdir(parents=True)
        (tree.sys / "bus/pci/slots" / name / "address").write_text(f"{address}\n")
    sysfs = Sysfs(tree.roots)
    facts = sysfs.look()
    assert facts.slots == {"2": "0000:01:00", "3": "0000:05:00"}
    card, sound = (facts.functions[PciAddress.parse(a)] for a in (GPU, AUDIO))
    assert (card.subsystem, card.serial, sound.serial) == ("1043:87c1", "00-80-ee-00-00-00-41-80", "")
    # It needs the device's power, and stays as it is.
    serial.unlink()
    assert sysfs.look().functions[PciAddress.parse(GPU)].serial == card.serial


def test_a_card_without_power_has_no_serial_number_yet(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    two_functions(tree)
    (tree.path(GPU) / "serial_number").write_text("00-80-ee-00-00-00-41-80\n")
    asleep = True

    def reads(path: str) -> str:
        if asleep and path.endswith("serial_number"):
            raise OSError(errno.EIO, os.strerror(errno.EIO), path)
        return first_line(path)

    monkeypatch.setattr("gpuswitch.host.linux.sysfs.first_line", reads)
    sysfs = Sysfs(tree.roots)
    card = sysfs.look().functions[PciAddress.parse(GPU)]
    assert (card.serial, card.serial_errno) == ("", errno.EIO)
    asleep = False
    card = sysfs.look().functions[PciAddress.parse(GPU)]
    assert (card.serial, card.serial_errno) == ("00-80-ee-00-00-00-41-80", 0)


def test_a_card_and_its_sound(tree: Tree) -> None:
    two_functions(tree)
    facts = Sysfs(tree.roots).look()
    assert list(facts.functions) == [PciAddress.parse(a) for a in (PORT, GPU, AUDIO)]
    card = facts.functions[PciAddress.parse(GPU)]
    assert (card.vendor, card.device, card.class_code) == (0x10DE, 0x2484, 0x030000)
    assert card.modalias == "pci:v000010DEd00002484sv00001043sd000087C1bc03sc00i00"
    assert card.driver == Driver("nvidia", "nvidia")
    assert (card.iommu_group, card.parent) == (15, PciAddress.parse(PORT))
    assert not card.asleep
    assert not card.boot_display
    assert facts.functions[PciAddress.parse(PORT)].parent is None
    assert [str(a) for gpu in discover(facts) for a in gpu.functions] == [GPU, AUDIO]
    assert facts.iommu
    assert facts.pci_drivers == {"nvidia": "nvidia", "snd_hda_intel": "snd_hda_intel", "pcieport": None}


def test_an_empty_machine(tmp_path: Path) -> None:
    """Without a PCI bus, without IOMMU, without /dev/vfio: nothing, and no error."""
    facts = Sysfs(Tree(tmp_path).roots).look()
    assert (dict(facts.functions), facts.iommu, facts.vfio_available, facts.vfio_nodes) == (
        {},
        False,
        False,
        frozenset({"vfio"}),
    )


def test_a_driver_that_is_built_in_has_no_module(tree: Tree) -> None:
    tree.driver("pcieport", "pcieportdrv", built_in=True)
    tree.function(PORT, class_code="060400", driver="pcieport")
    assert seen(tree, PORT).driver == Driver("pcieport", None)


def test_driver_and_module_names_differ(tree: Tree) -> None:
    tree.driver("bochs-drm", "bochs")
    tree.function(GPU, driver="bochs-drm")
    assert seen(tree).driver == Driver("bochs-drm", "bochs")


def test_a_parent_behind_a_volume_management_device(tree: Tree) -> None:
    """Behind Intel VMD the domain has five digits, and its root bus lies below another function."""
    tree.function("10000:e1:00.0", under=["0000:00:0e.0", "pci10000:e0", "10000:e0:06.0"])
    tree.function("10000:e0:06.0", under=["0000:00:0e.0", "pci10000:e0"], class_code="060400")
    assert seen(tree, "10000:e1:00.0").parent == PciAddress.parse("10000:e0:06.0")
    assert seen(tree, "10000:e0:06.0").parent is None


@pytest.mark.parametrize(
    ("status", "asleep"),
    [("active", False), ("suspended", True), ("suspending", True), ("resuming", False), ("unsupported", False)],
)
def test_sleep(tree: Tree, status: str, asleep: bool) -> None:
    tree.function(GPU, status=status)
    assert seen(tree).asleep is asleep


def test_the_boot_display(tree: Tree) -> None:
    (tree.function(GPU) / "boot_vga").write_text("1\n")
    assert seen(tree).boot_display


def test_virtual_functions(tree: Tree) -> None:
    physical = tree.function(GPU)
    os.mkfifo(physical / "sriov_numvfs")
    for index in range(2):
        virtual = tree.function(f"0000:01:00.{index + 4}")
        (virtual / "physfn").symlink_to(f"../{GPU}")
        (physical / f"virtfn{index}").symlink_to(f"../0000:01:00.{index + 4}")
    facts = Sysfs(tree.roots).look()
    assert facts.functions[PciAddress.parse(GPU)].virtual_functions == 2
    assert facts.functions[PciAddress.parse("0000:01:00.4")].physical_function == PciAddress.parse(GPU)


def test_mediated_devices_count_for_the_function_that_they_share(tree: Tree) -> None:
    card = tree.function(GPU, under=[PORT])
    tree.function(PORT, class_code="060400")
    devices = tree.sys / "bus/mdev/devices"
    devices.mkdir(parents=True)
    for name in ("83b8f4f2-509f-382f-3c1e-e6bfe0fa1001", "83b8f4f2-509f-382f-3c1e-e6bfe0fa1002"):
        (card / name).mkdir()
        (devices / name).symlink_to(os.path.relpath(card / name, devices))
    assert seen(tree).mediated_devices == 2
    assert seen(tree, PORT).mediated_devices == 0


@pytest.mark.parametrize("control", ["control", "io.systemd.Udev"])
def test_nodes_are_ready_when_udev_is_done_with_them(tree: Tree, control: str) -> None:
    """Since systemd 262 the control socket is a link to the one that speaks Varlink."""
    tree.function(GPU, driver="amdgpu")
    tree.class_device(GPU, "drm/card0", "226:0")
    (tree.path(GPU) / "drm/card0/card0-DP-1").mkdir()
    tree.class_device(GPU, "drm/renderD128", "226:128")
    tree.class_device(GPU, "graphics/fb0", "29:0")
    (tree.udev / control).touch()
    if control != "control":
        (tree.udev / "control").symlink_to(control)
    assert (seen(tree).nodes, seen(tree).nodes_pending) == ((), True)
    for node in ("dri/card0", "dri/renderD128", "fb0"):
        tree.node(node)
    assert (seen(tree).nodes, seen(tree).nodes_pending) == ((), True)
    tree.udev_entry("c226:0")
    tree.udev_entry("c29:0")
    assert (seen(tree).nodes, seen(tree).nodes_pending) == (("/dev/dri/card0", "/dev/fb0"), True)
    tree.udev_entry("c226:128")
    card = seen(tree)
    assert (card.nodes, card.nodes_pending) == (("/dev/dri/card0", "/dev/dri/renderD128", "/dev/fb0"), False)


def test_a_node_is_not_ready_by_what_udev_did_with_its_predecessor(tree: Tree) -> None:
    """A quick unbind and probe: the new card has the old one's number, and udev has seen neither."""
    tree.function(GPU, driver="amdgpu")
    tree.class_device(GPU, "drm/card0", "226:0")
    (tree.udev / "control").touch()
    tree.udev_entry("c226:0")
    tree.node("dri/card0")
    os.utime(tree.udev / "data/c226:0", ns=(0, 0))
    assert (seen(tree).nodes, seen(tree).nodes_pending) == ((), True)
    tree.udev_entry("c226:0")
    assert (seen(tree).nodes, seen(tree).nodes_pending) == (("/dev/dri/card0",), False)


def test_nodes_are_ready_at_once_where_no_udev_runs(tree: Tree) -> None:
    tree.function(AUDIO, class_code="040300", driver="snd_hda_intel")
    tree.class_device(AUDIO, "sound/card1/controlC1", "116:7")
    tree.class_device(AUDIO, "sound/card1/pcmC1D3p", "116:8")
    (tree.path(AUDIO) / "sound/card1/input9").mkdir()
    tree.node("snd/controlC1")
    assert (seen(tree, AUDIO).nodes, seen(tree, AUDIO).nodes_pending) == (("/dev/snd/controlC1",), True)
    tree.node("snd/pcmC1D3p")
    assert seen(tree, AUDIO).nodes == ("/dev/snd/controlC1", "/dev/snd/pcmC1D3p")
    assert not seen(tree, AUDIO).nodes_pending


def test_what_is_made_anew_is_not_what_it_was(tree: Tree) -> None:
    """The same names with other numbers, another module, another place: nothing that was remembered is true of them."""
    tree.function(AUDIO, class_code="040300", driver="snd_hda_intel")
    driver, cards = tree.driver("snd_hda_intel", "snd_hda_intel"), tree.path(AUDIO) / "sound"
    tree.class_device(AUDIO, "sound/card1/controlC1", "116:7")
    tree.node("snd/controlC1")
    (tree.udev / "control").touch()
    tree.udev_entry("c116:7")
    slot = tree.sys / "bus/pci/slots/2"
    slot.mkdir(parents=True)
    (slot / "address").write_text("0000:01:00\n")
    sysfs = Sysfs(tree.roots)
    before = sysfs.look()
    for number, folder in enumerate((driver, cards, slot)):
        folder.rename(tree.sys / f"gone{number}")
    assert (sysfs.look().slots, sysfs.look().pci_drivers) == ({}, {})
    tree.driver("snd_hda_intel")
    tree.class_device(AUDIO, "sound/card1/controlC1", "116:9")
    slot.mkdir()
    (slot / "address").write_text("0000:05:00\n")
    after = sysfs.look()
    assert [each.slots for each in (before, after)] == [{"2": "0000:01:00"}, {"2": "0000:05:00"}]
    assert [each.pci_drivers for each in (before, after)] == [
        {"snd_hda_intel": "snd_hda_intel"},
        {"snd_hda_intel": None},
    ]
    assert [each.functions[PciAddress.parse(AUDIO)].nodes_pending for each in (before, after)] == [False, True]
    # What comes a little later than the folder that it is in is not missed for that.
    tree.driver("snd_hda_intel", "snd_hda_intel")
    tree.udev_entry("c116:9")
    assert sysfs.look().pci_drivers == before.pci_drivers
    assert not sysfs.look().functions[PciAddress.parse(AUDIO)].nodes_pending


def test_names_from_the_hardware_database(tree: Tree) -> None:
    tree.function(GPU)
    sysfs = Sysfs(tree.roots)
    address = PciAddress.parse(GPU)
    assert (sysfs.look().functions[address].maker, sysfs.look().functions[address].model) == ("", "")
    tree.udev_entry(
        f"+pci:{GPU}",
        "E:ID_VENDOR_FROM_DATABASE=NVIDIA Corporation",
        "E:ID_MODEL_FROM_DATABASE=GA104 [GeForce RTX 3070] (a=b)",
    )
    card = sysfs.look().functions[address]
    assert (card.maker, card.model) == ("NVIDIA Corporation", "GA104 [GeForce RTX 3070] (a=b)")


@pytest.mark.parametrize(
    ("index", "text", "available"),
    [
        ("modules.dep", "kernel/drivers/vfio/pci/vfio-pci.ko.xz: kernel/drivers/vfio/vfio.ko.xz\n", True),
        ("modules.builtin", "kernel/drivers/vfio/pci/vfio-pci.ko\n", True),
        ("modules.dep", "kernel/drivers/vfio/pci/mlx5/mlx5-vfio-pci.ko:\nkernel/x/vfio-pci-core.ko:\n", False),
    ],
)
def test_vfio_is_installed_or_not(tree: Tree, index: str, text: str, available: bool) -> None:
    sysfs = Sysfs(tree.roots)
    assert not sysfs.look().vfio_available
    tree.installed(index, text)
    assert sysfs.look().vfio_available is available


def test_vfio_is_registered(tree: Tree) -> None:
    tree.driver("vfio-pci", "vfio_pci")
    assert Sysfs(tree.roots).look().vfio_available


def test_vfio_nodes_are_the_numbered_ones_and_vfio_stands_for_a_kernel_that_makes_them(tree: Tree) -> None:
    """/dev/vfio/vfio itself tells nothing: systemd makes it before vfio is loaded, and so do kernels without groups."""
    for name in ("vfio/vfio", "vfio/15", "vfio/2", "vfio/noiommu-0", "vfio/devices/vfio0"):
        tree.node(name)
    assert Sysfs(tree.roots).look().vfio_nodes == {"vfio", "2", "15"}
    (tree.sys / "class/vfio-dev").mkdir(parents=True)
    assert Sysfs(tree.roots).look().vfio_nodes == {"2", "15"}
    (tree.sys / "class/vfio").mkdir()
    assert Sysfs(tree.roots).look().vfio_nodes == {"vfio", "2", "15"}


def test_what_changes_is_seen_anew(tree: Tree) -> None:
    two_functions(tree)
    sysfs = Sysfs(tree.roots)
    address = PciAddress.parse(GPU)
    assert sysfs.look().functions[address].driver_name == "nvidia"
    tree.unbind(GPU)
    assert sysfs.look().functions[address].driver is None
    tree.driver("vfio-pci", "vfio_pci")
    tree.bind(GPU, "vfio-pci")
    assert sysfs.look().functions[address].on_vfio


def test_another_card_in_the_same_slot_is_another_card(tree: Tree) -> None:
    """Hotplug: what was remembered of the old one must not be said of the new one."""
    old = tree.function(GPU)
    tree.udev_entry(f"+pci:{GPU}", "E:ID_MODEL_FROM_DATABASE=the old one")
    sysfs = Sysfs(tree.roots)
    assert sysfs.look().functions[PciAddress.parse(GPU)].device == 0x2484
    (tree.sys / "bus/pci/devices" / GPU).unlink()
    old.rename(tree.sys / "gone")
    (tree.udev / "data" / f"+pci:{GPU}").unlink()
    assert sysfs.look().functions == {}
    tree.function(GPU, ids="1002:73bf")
    card = sysfs.look().functions[PciAddress.parse(GPU)]
    assert (card.vendor, card.device, card.model) == (0x1002, 0x73BF, "")


def test_a_function_that_leaves_in_the_middle_is_left_out(tree: Tree) -> None:
    """Its link is there, and nothing behind it."""
    tree.function(GPU)
    tree.function(AUDIO).rename(tree.sys / "gone")
    assert list(Sysfs(tree.roots).look().functions) == [PciAddress.parse(GPU)]


def test_modules_that_are_in_the_kernel(tree: Tree) -> None:
    """Those that a driver profile names, however they came into it; built-in ones have no count."""
    nvidia = tree.loaded("nvidia", 3, "nvidia_uvm", "nvidia_modeset")
    (nvidia / "version").write_text("580.105.08\n")
    parameters = tree.loaded("nvidia_drm", 0) / "parameters"
    parameters.mkdir()
    (parameters / "modeset").write_text("Y\n")
    tree.loaded("ext4", 2)
    (tree.sys / "module/xhci_pci").mkdir()
    assert Sysfs(tree.roots).look().modules == {
        "nvidia": Module(3, ("nvidia_modeset", "nvidia_uvm"), "580.105.08"),
        "nvidia_drm": Module(0, modeset=True),
        "xhci_pci": Module(built_in=True),
    }


def test_a_kernel_that_unloads_no_modules(tree: Tree) -> None:
    """Without CONFIG_MODULE_UNLOAD there is no `refcnt` (kernel/module/sysfs.c), and a module is as loaded as ever."""
    (tree.loaded("nvidia", 3) / "refcnt").unlink()
    assert Sysfs(tree.roots).look().modules == {"nvidia": Module(references=None, built_in=False)}


@pytest.mark.parametrize(("text", "on"), [("1", True), ("Y", True), ("N", False), ("0", False), ("-1", False)])
def test_a_modules_modeset_parameter(tree: Tree, text: str, on: bool) -> None:
    """Bool or number: nouveau's -1 leaves it to the driver."""
    parameters = tree.loaded("nouveau", 1) / "parameters"
    parameters.mkdir()
    (parameters / "modeset").write_text(f"{text}\n")
    assert Sysfs(tree.roots).look().modules["nouveau"].modeset is on


# As on 6.1, of the functions that matter here; and as somebody sees it who is not root.
IOMEM = """\
00001000-0009fbff : System RAM
c0000000-febfffff : PCI Bus 0000:00
  c0000000-d1ffffff : PCI Bus 0000:01
    c0000000-cfffffff : 0000:01:00.0
      c0000000-c02fffff : {memory}
    d0000000-d1ffffff : 0000:01:00.0
  febf0000-febf0fff : 0000:02:00.0
"""
HIDDEN = re.sub(r"[0-9a-f]{8}", "00000000", IOMEM)


def boot_framebuffers(tree: Tree) -> tuple[BootFramebuffer, ...]:
    return Sysfs(tree.roots).look().boot_framebuffers


@pytest.mark.parametrize(
    ("driver", "memory"),
    [(driver, memory) for driver, names in BOOT_DRIVERS.items() for memory in names],
)
def test_a_boot_frame_buffer_belongs_to_whose_memory_it_is_in(tree: Tree, driver: str, memory: str) -> None:
    device = tree.boot_framebuffer(driver)
    tree.iomem.write_text(IOMEM.format(memory=memory))
    assert boot_framebuffers(tree) == (BootFramebuffer(f"{driver}.0", driver, PciAddress.parse(GPU)),)
    (tree.sys / "bus/platform/drivers" / driver / device.name).unlink()
    assert boot_framebuffers(tree) == ()


@pytest.mark.parametrize("iomem", ["", HIDDEN.format(memory="efifb"), IOMEM.format(memory="bochs-drm")])
def test_a_boot_frame_buffer_that_nobody_can_place(tree: Tree, iomem: str) -> None:
    tree.boot_framebuffer("efi-framebuffer")
    tree.iomem.write_text(iomem)
    assert boot_framebuffers(tree) == ()


@pytest.mark.parametrize("driver", BOOT_DRIVERS)
def test_a_boot_frame_buffer_below_its_function(tree: Tree, driver: str) -> None:
    """Since 6.9; then nobody needs to know addresses."""
    tree.boot_framebuffer(driver, f"pci0000:00/{PORT}/{GPU}")
    [found] = boot_framebuffers(tree)
    assert found.function == PciAddress.parse(GPU)


def test_a_partial_look_sees_functions_only(tree: Tree) -> None:
    two_functions(tree)
    tree.loaded("nouveau", 1)
    tree.boot_framebuffer("simple-framebuffer", f"pci0000:00/{PORT}/{GPU}")
    facts = Sysfs(tree.roots).look([PciAddress.parse(GPU)])
    assert facts == HostFacts({PciAddress.parse(GPU): seen(tree)}, iommu=False, vfio_available=False)


@pytest.mark.parametrize(
    ("command_line", "found"),
    [
        ("quiet fbcon=map:1", {1}),
        ("fbcon=font:VGA8x8,map:0110 quiet", {0, 1}),
        ("fbcon=map:1 fbcon=map:2", {2}),
        # as the kernel reads it
        ("fbcon=map:a", {17}),
        ("fbcon=map: fbcon=nodefer", None),
        ("quiet map:1", None),
    ],
)
def test_the_map_of_the_command_line(tree: Tree, command_line: str, found: set[int] | None) -> None:
    (tree.sys.parent / "cmdline").write_text(f"{command_line}\n")
    assert Sysfs(replace(tree.roots, proc=str(tree.sys.parent))).look().console_map == found


LOOK = """
import json, sys
opened = []
sys.addaudithook(lambda event, details: opened.append(str(details[0])) if event == "open" else None)
from gpuswitch.host.linux.sysfs import Roots, Sysfs
sysfs = Sysfs(Roots(*sys.argv[1:]))
facts = sysfs.look()
sysfs.look()
print(json.dumps([len(facts.functions), [path for path in opened if path.startswith(sys.argv[1])]]))
"""
ALLOWED = {"serial_number", "modalias", "boot_vga", "boot_display", "resource", "data", "name", "type"}
ALLOWED |= {"reserved_regions", "runtime_status", "dev", "refcnt", "version", "modeset", "drivers_autoprobe"}


def test_a_big_host_is_looked_at_without_a_lock(tree: Tree) -> None:
    """Every file below sysfs that a look opens, in a process of its own, since an audit hook stays for ever."""
    big_host(tree)
    tree.booted_on(1 << 40, 0x1000)
    roots = tree.roots
    places = [roots.sysfs, roots.dev, roots.udev, roots.modules, roots.tools, roots.iomem]
    command = [sys.executable, "-c", LOOK, *places]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    count, opened = json.loads(run.stdout)
    assert count == 300
    assert len(opened) > count
    assert {path.rpartition("/")[2] for path in opened} == ALLOWED
