"""The doctor, on machines that are made of files: one where all is well, and for each check some where it is not."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from gpuswitch.doctor import remedies
from gpuswitch.doctor.findings import Severity
from gpuswitch.doctor.seen import Service, System, Told
from gpuswitch.doctor.table import CHECKS
from gpuswitch.errors import NoSuchGpu
from gpuswitch.model.holders import Holder, Process, Unit
from gpuswitch.sentence import Sentence
from tests.harness.incus import instance, profile
from tests.harness.made_machine import CARD, HOOK, INTEGRATED, PORT, SOUND, MadeMachine
from tests.harness.promtool import RULES
from tests.harness.proxmox import VOLUME
from tests.unit.test_house import ROOT

SLOT = "0000:02:00.0"
OK, WARNING, PROBLEM = Severity.OK, Severity.WARNING, Severity.PROBLEM
Change = Callable[[MadeMachine], object]


@pytest.fixture
def made(tmp_path: Path) -> MadeMachine:
    return MadeMachine(tmp_path)


def test_a_good_machine(made: MadeMachine) -> None:
    """The managed card alone is judged; the screen of the other one is no matter."""
    found = made.examined()
    assert [f"{each.kind}: {each.reason}" for each in found.findings if each.severity is not OK] == []
    assert (found.severity, found.unseen, found.gpus, found.passed_over) == (OK, (), (CARD,), (INTEGRATED,))
    said = {each.kind: str(each.reason) for each in found.findings}
    assert said["kernel"] == "Debian GNU/Linux 12 (bookworm), Linux 6.1.0-30-amd64"
    assert said["iommu"] == "the IOMMU is on: 3 groups"
    assert said["vfio"] == "vfio-pci is installed, and loaded when it is needed"
    assert said["groups"] == "alone in IOMMU group 15"
    assert said["driver"] == "on nvidia 580.142"
    assert said["managed"] == "managed, by the name of geforce"
    assert said["holders"] == "nobody has it open"
    assert said["libvirt"] == "libvirt 9.0, virtqemud.service runs"
    assert said["hook"] == "the hook is installed, and libvirt runs it"
    assert said["other_tools"] == "no other tool was found that moves these cards"
    assert {each.severity for each in found.findings if each.commands} == set()


def without_iommu(*, table: bool = True, words: str = "quiet") -> Change:
    def change(made: MadeMachine) -> None:
        made.command_line(words)
        for group in (made.tree.sys / "kernel/iommu_groups").iterdir():
            for link in (group / "devices").iterdir():
                (link.resolve() / "iommu_group").unlink()
                link.unlink()
            (group / "devices").rmdir()
            for file in group.iterdir():
                file.unlink()
            group.rmdir()
        if not table:
            made.remove("sys/firmware/acpi/tables/DMAR")

    return change


def neighbour(made: MadeMachine) -> None:
    made.tree.driver("r8169", "r8169")
    made.tree.function(SLOT, ids="10ec:8168", class_code="020000", driver="r8169", group=15)


def unloading_is_impossible(made: MadeMachine) -> None:
    (made.tree.sys / "module/nvidia/refcnt").unlink()


def version(text: str) -> Change:
    return lambda made: (made.tree.sys / "module/nvidia/version").write_text(f"{text}\n")


def without_driver(made: MadeMachine) -> str:
    made.tree.unbind(CARD)
    return CARD


def half_way(made: MadeMachine) -> None:
    made.service = Service()
    made.as_root = False
    made.tree.driver("vfio-pci", "vfio_pci")
    made.tree.unbind(SOUND)
    made.tree.bind(SOUND, "vfio-pci")


def old_radeon(made: MadeMachine) -> Path:
    made.tree.driver("amdgpu", "amdgpu")
    made.tree.function(SLOT, ids="1002:67df", driver="amdgpu", group=16)
    made.write("sys/kernel/iommu_groups/16/reserved_regions", "")
    return made.write("etc/gpuswitch/config.toml", f'[[gpu]]\naddress = "{SLOT}"\n')


def shared_out(made: MadeMachine) -> None:
    (made.tree.path(CARD) / "sriov_numvfs").touch()
    (made.tree.path(CARD) / "virtfn0").symlink_to("../x")


def holder(command: str, node: str, unit: str = "", session: str = "") -> Holder:
    return Holder(Process(1234, 1), command, 1000, "kim", Unit(unit) if unit else None, session, (node,))


GAME = holder("game", "/dev/nvidia0", session="2")
PIPEWIRE = holder("wireplumber", "/dev/snd/controlC1")
IDS = "options vfio-pci ids=10de:2484,10de:228b\n"
APPEND = r"""printf '\n%s\n' 'GRUB_CMDLINE_LINUX="$GRUB_CMDLINE_LINUX intel_iommu=on"' >> /etc/default/grub"""
PUT_HOOK = "/usr/lib/gpuswitch/maintain after-installation"
SWITCH_ON = (
    r"""sed -i 's/\(^\|[[:space:]"'\''=]\)intel_iommu=off\($\|[[:space:]"'\'']\)/\1intel_iommu=on\2/g' """
    "/etc/default/grub"
)
MAINTAIN = "usr/lib/gpuswitch/maintain"
FOREIGN = "#!/bin/sh\nvirsh nodedev-detach pci_0000_01_00_0\n"


def packaged(then: Change) -> Change:
    return lambda made: (made.write(MAINTAIN, ""), then(made))


def incus_by_number(made: MadeMachine) -> None:
    made.write("sys/class/drm/card1/device/uevent", f"DRIVER=nvidia\nPCI_SLOT_NAME={CARD}\n")
    made.incus(instance("win11", {"one": {"type": "gpu", "id": "1"}}))


def watched(text: str, rules: str = "groups: []\n") -> Change:
    """By a Prometheus with this configuration, which runs, and a file of rules beside it."""

    def change(made: MadeMachine) -> None:
        made.write("etc/prometheus/prometheus.yml", text)
        made.write("etc/prometheus/rules/all.yml", rules)
        made.unit("prometheus.service")

    return change


CASES: list[tuple[str, Change, str, Severity, str, str]] = [
    # name, change, kind, severity, words of it, one of the commands ("": none)
    (
        "old-kernel",
        lambda m: m.write("proc/sys/kernel/osrelease", "5.10.0-9\n"),
        "kernel",
        PROBLEM,
        "may stop this kernel",
        'apt-get install "linux-image-$(dpkg --print-architecture)"',
    ),
    (
        "untried-kernel",
        lambda m: m.write("proc/sys/kernel/osrelease", "5.19.4\n"),
        "kernel",
        WARNING,
        "older than any",
        "",
    ),
    (
        "iommu-in-firmware",
        without_iommu(table=False),
        "iommu",
        PROBLEM,
        "off in the firmware, which has no DMAR",
        APPEND,
    ),
    ("iommu-in-kernel", without_iommu(), "iommu", PROBLEM, "off in the kernel; the firmware has it", APPEND),
    (
        "iommu-off",
        without_iommu(words="intel_iommu=off"),
        "iommu",
        PROBLEM,
        "has intel_iommu=off",
        SWITCH_ON,
    ),
    (
        "igfx-off",
        lambda m: m.command_line("intel_iommu=on,igfx_off"),
        "iommu",
        WARNING,
        "no IOMMU group",
        "update-grub",
    ),
    (
        "guest",
        lambda m: (m.write("proc/cpuinfo", "vendor_id : GenuineIntel\nflags : fpu hypervisor\n"), without_iommu()(m)),
        "iommu",
        PROBLEM,
        "the IOMMU is off",
        "",
    ),
    (
        "no-modules",
        lambda m: m.tree.installed("modules.dep", ""),
        "vfio",
        PROBLEM,
        "vfio-pci is not installed",
        'apt-get install --reinstall "linux-image-$(uname -r)"',
    ),
    (
        "barred",
        lambda m: m.command_line("module_blacklist=vfio_pci"),
        "vfio",
        PROBLEM,
        "keeps vfio_pci from",
        "update-grub",
    ),
    (
        "no-group-nodes",
        lambda m: (m.tree.driver("vfio-pci", "vfio_pci"), m.folder("sys/class/vfio-dev")),
        "vfio",
        PROBLEM,
        "no VFIO groups",
        "",
    ),
    (
        "no-autoprobe",
        lambda m: m.write("sys/bus/pci/drivers_autoprobe", "0\n"),
        "autoprobe",
        WARNING,
        "is 0",
        "echo 1 > /sys/bus/pci/drivers_autoprobe",
    ),
    (
        "locked-down",
        lambda m: m.write("sys/kernel/security/lockdown", "none [integrity] confidentiality\n"),
        "secure_boot",
        OK,
        "locked down (integrity)",
        "",
    ),
    (
        "locked-out",
        lambda m: (m.write("sys/kernel/security/lockdown", "none [integrity] confidentiality\n"), without_driver(m)),
        "secure_boot",
        WARNING,
        "not signed",
        "mokutil --import /var/lib/dkms/mok.pub",
    ),
    (
        "service-down",
        lambda m: m.is_served(Service()),
        "service",
        WARNING,
        "does not run",
        "systemctl enable --now gpuswitchd.service",
    ),
    (
        "service-mute",
        lambda m: m.is_served(Service(why="nobody")),
        "service",
        PROBLEM,
        "does not answer: nobody",
        "journalctl -u gpuswitchd.service -b -n 50",
    ),
    (
        "service-missing",
        lambda m: (m.is_served(Service()), m.units.pop("gpuswitchd.service")),
        "service",
        PROBLEM,
        "not installed",
        "make install",
    ),
    (
        "service-missing-of-package",
        packaged(lambda m: (m.is_served(Service()), m.units.pop("gpuswitchd.service"))),
        "service",
        PROBLEM,
        "not installed",
        "apt-get install --reinstall ./gpuswitch_*.deb",
    ),
    (
        "service-older",
        lambda m: m.is_served(Service(running=True, version="0.0")),
        "service",
        WARNING,
        "of version 0.0",
        "systemctl restart gpuswitchd.service",
    ),
    (
        "service-disabled",
        lambda m: m.unit("gpuswitchd.service", UnitFileState="disabled"),
        "service",
        WARNING,
        "not started when",
        "systemctl enable gpuswitchd.service",
    ),
    (
        "prometheus-without-us",
        watched("scrape_configs:\n- job_name: node\n"),
        "prometheus",
        WARNING,
        "has no job gpuswitch",
        "gpuswitchctl setup prometheus",
    ),
    (
        "prometheus-without-alerts",
        watched("scrape_configs:\n  - job_name: 'gpuswitch' # ours\nrule_files:\n- rules/*\n"),
        "prometheus",
        WARNING,
        "has none of the alerts",
        "gpuswitchctl setup prometheus",
    ),
    (
        "prometheus",
        watched("scrape_configs:\n  -\n    job_name: gpuswitch\nrule_files: [rules/*]\n", RULES.read_text()),
        "prometheus",
        OK,
        "asks for the metrics, and has the alerts",
        "",
    ),
    ("dbus-broker", lambda m: m.unit("dbus.service", Id="dbus-broker.service"), "broker", OK, "dbus-broker", ""),
    (
        "no-bus-policy",
        lambda m: m.remove("etc/dbus-1/system.d/org.gpuswitch1.conf"),
        "broker",
        PROBLEM,
        "org.gpuswitch1.conf",
        "make install",
    ),
    (
        "no-bus-policy-of-package",
        packaged(lambda m: m.remove("etc/dbus-1/system.d/org.gpuswitch1.conf")),
        "broker",
        PROBLEM,
        "org.gpuswitch1.conf",
        "apt-get install --reinstall ./gpuswitch_*.deb",
    ),
    (
        "no-polkit",
        lambda m: m.units.pop("polkit.service"),
        "polkit",
        WARNING,
        "only root may switch",
        "apt-get install polkitd",
    ),
    (
        "no-actions",
        lambda m: m.remove("usr/share/polkit-1/actions/org.gpuswitch1.policy"),
        "polkit",
        WARNING,
        "org.gpuswitch1.policy",
        "make install",
    ),
    (
        "no-actions-of-package",
        packaged(lambda m: m.remove("usr/share/polkit-1/actions/org.gpuswitch1.policy")),
        "polkit",
        WARNING,
        "org.gpuswitch1.policy",
        "apt-get install --reinstall ./gpuswitch_*.deb",
    ),
    (
        "told-by-match",
        lambda m: m.write("etc/gpuswitch/config.toml", '[[gpu]]\nmatch = { vendor = "10de" }\n'),
        "configuration",
        OK,
        f"it is about {CARD}",
        "",
    ),
    (
        "bad-configuration",
        lambda m: m.write("etc/gpuswitch/config.toml", "[defaults]\nbusyy = 1\n"),
        "configuration",
        PROBLEM,
        "busyy",
        "gpuswitchctl config edit",
    ),
    (
        "about-nothing",
        lambda m: m.write("etc/gpuswitch/config.toml", '[[gpu]]\naddress = "0a:00.0"\n'),
        "configuration",
        WARNING,
        "is about no GPU",
        "gpuswitchctl config edit",
    ),
    (
        "no-such-driver",
        lambda m: m.write("etc/gpuswitch/config.toml", f'[[gpu]]\naddress = "{CARD}"\nhost_driver = "nvidai"\n'),
        "configuration",
        WARNING,
        "nothing brings that",
        "gpuswitchctl config edit",
    ),
    (
        "not-reloaded",
        lambda m: m.is_served(Service(running=True, settings={"defaults.busy": '"wait"'})),
        "configuration",
        WARNING,
        "said before",
        "systemctl reload gpuswitchd.service",
    ),
    (
        "failed",
        lambda m: m.says("failed", reason="the unbind failed"),
        "state",
        PROBLEM,
        "it is failed: the unbind failed",
        f"gpuswitchctl recover {CARD}",
    ),
    ("wedged", lambda m: m.says("wedged"), "state", PROBLEM, "is wedged", ""),
    ("half-way", half_way, "state", PROBLEM, "neither on the host nor on vfio", f"gpuswitchctl recover {CARD}"),
    (
        "stays-out",
        lambda m: m.says("vfio", stays_out=True, reason="no reset"),
        "state",
        WARNING,
        "did not come home",
        f"gpuswitchctl to-host {CARD}",
    ),
    ("owned", lambda m: m.says("vfio", owner="win10"), "state", OK, "and it belongs to win10", ""),
    (
        "missing-member",
        lambda m: m.write("etc/gpuswitch/config.toml", f'[[gpu]]\naddress = "{CARD}"\nmembers = ["0a:00.0"]\n'),
        "members",
        PROBLEM,
        "is not on the PCI bus",
        "",
    ),
    ("neighbour", neighbour, "groups", PROBLEM, "r8169: put one of the two into another slot; or unbind it", ""),
    (
        "claimed",
        lambda m: m.write("sys/kernel/iommu_groups/15/reserved_regions", "0xbd000000 0xbdffffff direct\n"),
        "reserved_region",
        PROBLEM,
        "firmware claims",
        "",
    ),
    (
        "booted-on-it",
        lambda m: m.booted_on(CARD),
        "boot_display",
        PROBLEM,
        "allow_boot_display = true",
        "",
    ),
    (
        "no-variant",
        lambda m: m.write(
            "etc/gpuswitch/config.toml", f'[[gpu]]\naddress = "{CARD}"\nvfio_driver = "nvgrace-gpu-vfio-pci"\n'
        ),
        "vfio_driver",
        PROBLEM,
        "is not available",
        "",
    ),
    ("new-driver", version("595.45.04"), "driver", WARNING, "waits for ever", ""),
    ("no-driver", without_driver, "driver", WARNING, "has no driver", ""),
    ("no-unload", unloading_is_impossible, "driver", PROBLEM, "unloads no modules", ""),
    ("persistenced", lambda m: m.unit("nvidia-persistenced.service"), "persistence", OK, "a switch stops it", ""),
    ("busy", lambda m: m.held_by(GAME), "holders", WARNING, "game (pid 1234, session 2 of kim)", ""),
    ("sound", lambda m: m.held_by(PIPEWIRE), "holders", OK, "goes by itself", ""),
    (
        "waits",
        lambda m: (
            m.held_by(GAME),
            m.write("etc/gpuswitch/config.toml", f'[[gpu]]\naddress = "{CARD}"\nbusy = "wait"\n'),
        ),
        "holders",
        OK,
        "wait is what becomes of them",
        "",
    ),
    (
        "no-unit",
        lambda m: m.write("etc/gpuswitch/config.toml", f'[[gpu]]\naddress = "{CARD}"\nstop_units = ["gmd.service"]\n'),
        "stop_units",
        PROBLEM,
        "there is no gmd.service",
        "",
    ),
    (
        "shared-out",
        shared_out,
        "shared_out",
        PROBLEM,
        "sriov_numvfs",
        "",
    ),
    ("polaris", old_radeon, "reset", WARNING, "vendor-reset", "modprobe vendor-reset"),
    ("polaris-helped", lambda m: (old_radeon(m), m.tree.loaded("vendor_reset", 0)), "reset", OK, "is loaded", ""),
    ("rebar", lambda m: m.tree.memory(CARD, (1 << 40, (1 << 40) + (16 << 30) - 1)), "rebar", OK, "16 GiB", ""),
    (
        "old-libvirt",
        lambda m: (
            m.remove("usr/lib/x86_64-linux-gnu/libvirt.so.0.9000.0"),
            m.write("usr/lib64/libvirt.so.0.6000.0", ""),
        ),
        "libvirt",
        PROBLEM,
        "libvirt 6.0",
        "",
    ),
    (
        "no-libvirt",
        lambda m: m.remove("usr/lib/x86_64-linux-gnu/libvirt.so.0.9000.0"),
        "libvirt",
        OK,
        "not installed",
        "",
    ),
    ("no-hook", lambda m: m.remove(HOOK), "hook", PROBLEM, "the hook is missing", "make install"),
    ("hook-mode", lambda m: (m.root / HOOK).chmod(0o644), "hook", PROBLEM, "not executable", f"chmod 0755 /{HOOK}"),
    ("hook-broken", lambda m: m.remove("usr/lib/hook.py"), "hook", PROBLEM, "needs /usr/lib/hook.py", "make install"),
    ("no-hook-of-package", packaged(lambda m: m.remove(HOOK)), "hook", PROBLEM, "is missing", PUT_HOOK),
    (
        "hook-of-package-broken",
        packaged(lambda m: m.remove("usr/lib/hook.py")),
        "hook",
        PROBLEM,
        "needs /usr/lib/hook.py",
        "apt-get install --reinstall ./gpuswitch_*.deb",
    ),
    ("foreign-hook", lambda m: m.hook(HOOK, FOREIGN), "hook", PROBLEM, "is not the hook of gpuswitch", "make install"),
    (
        "foreign-hook-and-package",
        packaged(lambda m: m.hook(HOOK, FOREIGN)),
        "hook",
        PROBLEM,
        "is not the hook of gpuswitch",
        PUT_HOOK,
    ),
    ("foreign-hook-moves", lambda m: m.hook(HOOK, FOREIGN), "old_hooks", WARNING, f"/{HOOK} moves devices", ""),
    (
        "selinux",
        lambda m: (
            m.write("sys/fs/selinux/enforce", "1"),
            m.write("sys/fs/selinux/booleans/virt_hooks_unconfined", "0 0"),
        ),
        "mandatory_access",
        WARNING,
        "virt_hooks_unconfined",
        "setsebool -P virt_hooks_unconfined on",
    ),
    (
        "selinux-without-that-boolean",
        lambda m: m.write("sys/fs/selinux/enforce", "1"),
        "mandatory_access",
        WARNING,
        "libvirt may not be allowed to run ours",
        "ausearch -m avc,user_avc -ts boot",
    ),
    (
        "selinux-and-hooks-run",
        lambda m: (
            m.write("sys/fs/selinux/enforce", "1"),
            m.write("sys/fs/selinux/booleans/virt_hooks_unconfined", "1 1"),
        ),
        "mandatory_access",
        OK,
        "lets hooks run",
        "",
    ),
    (
        "apparmor",
        lambda m: m.write("sys/module/apparmor/parameters/enabled", "Y\n"),
        "mandatory_access",
        OK,
        "AppArmor",
        "",
    ),
    (
        "apparmor-elsewhere",
        lambda m: (
            m.write("sys/module/apparmor/parameters/enabled", "Y\n"),
            m.write("opt/hook.py", ""),
            m.hook(HOOK, "hook='/opt/hook.py'\n"),
        ),
        "mandatory_access",
        WARNING,
        "may keep the hook from /opt/hook.py",
        "make install PREFIX=/usr/local",
    ),
    (
        "apparmor-elsewhere-and-package",
        packaged(
            lambda m: (
                m.write("sys/module/apparmor/parameters/enabled", "Y\n"),
                m.write("opt/hook.py", ""),
                m.hook(HOOK, "hook='/opt/hook.py'\n"),
            )
        ),
        "mandatory_access",
        WARNING,
        "may keep the hook from /opt/hook.py",
        PUT_HOOK,
    ),
    (
        "driverctl",
        lambda m: m.write(f"etc/driverctl.d/pci-{SOUND}", "vfio-pci\n"),
        "driverctl",
        WARNING,
        SOUND,
        f"rm /etc/driverctl.d/pci-{SOUND}",
    ),
    (
        "ids",
        lambda m: m.write("etc/modprobe.d/vfio.conf", IDS),
        "modprobe",
        WARNING,
        f"gives {CARD}, {SOUND} to vfio-pci",
        "update-initramfs -u -k all",
    ),
    (
        "ids-at-boot",
        lambda m: m.command_line("intel_iommu=on vfio-pci.ids=10de:2484"),
        "modprobe",
        WARNING,
        "vfio-pci.ids=10de:2484",
        "update-grub",
    ),
    (
        "blacklist",
        lambda m: m.write("etc/modprobe.d/x.conf", "blacklist nvidia\n"),
        "modprobe",
        WARNING,
        "keeps nvidia from",
        r"sed -i 's/^[[:space:]]*blacklist[[:space:]]\+nvidia[[:space:]]*\(#.*\)\?$/# &/' /etc/modprobe.d/x.conf",
    ),
    (
        "blacklist-at-boot",
        lambda m: m.command_line("modprobe.blacklist=nvidia,foo"),
        "modprobe",
        WARNING,
        "nvidia",
        "update-grub",
    ),
    (
        "softdep",
        lambda m: m.write("etc/modprobe.d/x.conf", "softdep nvidia pre: vfio-pci\n"),
        "modprobe",
        WARNING,
        "loaded before nvidia",
        "update-initramfs -u -k all",
    ),
    (
        "install-nothing",
        lambda m: m.write("etc/modprobe.d/x.conf", "install nvidia-drm /bin/false\n"),
        "modprobe",
        WARNING,
        "keeps nvidia-drm from being loaded: /bin/false is run instead",
        "update-initramfs -u -k all",
    ),
    (
        "install-no-vfio",
        lambda m: m.write("etc/modprobe.d/x.conf", "install vfio-pci /bin/true\n"),
        "modprobe",
        WARNING,
        "keeps vfio-pci from being loaded",
        "update-initramfs -u -k all",
    ),
    (
        "over-two-lines",
        lambda m: m.write("etc/modprobe.d/x.conf", "blacklist \\\n nvidia\n"),
        "modprobe",
        WARNING,
        "keeps nvidia from",
        "update-initramfs -u -k all",
    ),
    (
        "supergfxd",
        lambda m: m.unit("supergfxd.service"),
        "switchers",
        WARNING,
        "supergfxd.service moves or hides",
        "systemctl disable --now supergfxd.service",
    ),
    ("cardwire", lambda m: m.unit("cardwired.service", ActiveState="inactive"), "switchers", WARNING, "cardwired", ""),
    (
        "old-hook",
        lambda m: m.hook("etc/libvirt/hooks/qemu", "#!/bin/sh\nvirsh nodedev-detach pci_0000_01_00_0\n"),
        "old_hooks",
        WARNING,
        "/etc/libvirt/hooks/qemu moves devices",
        "",
    ),
    (
        "hook-helper",
        lambda m: m.hook("etc/libvirt/hooks/qemu.d/win10/prepare/begin/start.sh", "modprobe -r nvidia_drm nvidia\n"),
        "old_hooks",
        WARNING,
        "win10/prepare/begin/start.sh",
        "chmod a-x /etc/libvirt/hooks/qemu.d/win10/prepare/begin/start.sh",
    ),
    (
        "proxmox",
        lambda m: m.write("etc/pve/qemu-server/100.conf", "hostpci0: 0000:01:00,pcie=1,x-vga=1\n"),
        "proxmox",
        WARNING,
        f"gives {CARD} to VM 100",
        "gpuswitchctl setup proxmox 100",
    ),
    (
        "proxmox-mapping",
        lambda m: m.proxmox("name: win11\nhostpci0: mapping=gpu\nhookscript: local:snippets/mine\n"),
        "proxmox",
        WARNING,
        "the hookscript of win11 (100), local:snippets/mine, does not ask for",
        "",
    ),
    (
        "proxmox-outdated",
        lambda m: m.proxmox(f"hostpci0: 01:00.1\nhookscript: {VOLUME}\n", "#!/bin/sh\n# of old\n"),
        "proxmox",
        WARNING,
        f"the hookscript of VM 100, {VOLUME}, is not that of this version",
        "gpuswitchctl setup proxmox 100",
    ),
    (
        "proxmox-ours",
        lambda m: m.proxmox(f"hostpci0: 01:00\nhookscript: {VOLUME}\n"),
        "proxmox",
        OK,
        f"Proxmox has VM 100 ask for {CARD} before it starts",
        "",
    ),
    (
        "incus",
        lambda m: m.incus(instance("win11", {"card": {"type": "gpu", "pci": "01:00.0"}}, project="games")),
        "incus",
        WARNING,
        f"Incus gives {CARD} to win11 (project games), by its device card, and takes it from its driver",
        "",
    ),
    (
        "incus-all",
        lambda m: m.incus(instance("win11", {"any": {"type": "gpu", "gputype": "physical", "vendorid": "10de"}})),
        "incus",
        WARNING,
        f"Incus gives {CARD} to win11, by its device any",
        "",
    ),
    (
        "incus-id",
        incus_by_number,
        "incus",
        WARNING,
        f"Incus gives {CARD} to win11, by its device one",
        "",
    ),
    (
        "incus-profile",
        lambda m: m.incus(profiles=[profile("gpus", {"g": {"type": "gpu"}})]),
        "incus",
        WARNING,
        f"the device g of Incus' profile gpus gives {CARD} to whoever uses that",
        "",
    ),
    (
        "incus-pci",
        lambda m: m.incus(
            instance("win11", {"b": {"type": "pci", "address": SOUND}, "a": {"type": "pci", "address": "01:00.0"}})
        ),
        "incus",
        OK,
        f"Incus gives {CARD}, {SOUND} to win11, and leaves on vfio what is there before: start gpuswitch-vfio@{CARD}",
        "",
    ),
]


@pytest.mark.parametrize(
    ("change", "kind", "severity", "words", "command"), [c[1:] for c in CASES], ids=[c[0] for c in CASES]
)
def test_a_machine(made: MadeMachine, change: Change, kind: str, severity: Severity, words: str, command: str) -> None:
    change(made)
    found = made.found(kind)
    assert severity in {each.severity for each in found}
    told = next((each for each in found if words in each.reason), None)
    assert told is not None, [str(each.reason) for each in found]
    assert told.severity is severity
    assert not command or command in told.commands


HARMLESS: list[tuple[str, Change, str]] = [
    (
        "a hook that moves nothing",
        lambda m: m.hook("etc/libvirt/hooks/qemu", "#!/bin/sh\n# nodedev-detach\nexit 0\n"),
        "old_hooks",
    ),
    (
        "a hook that is not executed",
        lambda m: m.hook("etc/libvirt/hooks/qemu", "nodedev-detach\n", executable=False),
        "old_hooks",
    ),
    ("another card's ids", lambda m: m.write("etc/modprobe.d/x.conf", "options vfio-pci ids=1002:67df\n"), "modprobe"),
    ("a comment", lambda m: m.write("etc/modprobe.d/x.conf", f"# {IDS}"), "modprobe"),
    (
        "a wrapper of Debian's",
        lambda m: m.write("etc/modprobe.d/x.conf", "install nvidia modprobe -i nvidia-current $CMDLINE_OPTS\n"),
        "modprobe",
    ),
    ("nouveau is kept out", lambda m: m.write("etc/modprobe.d/x.conf", "blacklist nouveau\n"), "modprobe"),
    ("another's override", lambda m: m.write("etc/driverctl.d/pci-0000:09:00.0", "vfio-pci\n"), "driverctl"),
    ("prometheus that does not run", lambda m: m.write("etc/prometheus/prometheus.yml", ""), "prometheus"),
    (
        "metrics by way of node_exporter",
        lambda m: (
            watched("")(m),
            m.write("etc/gpuswitch/conf.d/a.toml", '[metrics]\ntextfile_directory = "/var/lib/node"\n'),
        ),
        "prometheus",
    ),
    (
        "another's machine",
        lambda m: m.write("etc/pve/qemu-server/100.conf", "hostpci0: 09:00.0\n[old]\nhostpci0: 01:00\n"),
        "proxmox",
    ),
    (
        "what Incus gives to others, and to containers",
        lambda m: m.incus(
            instance("c1", {"all": {"type": "gpu"}}, kind="container"),
            instance("win11", {"other": {"type": "gpu", "pci": "0000:41:00.0"}, "none": {"type": "gpu", "id": "7"}}),
            instance(
                "vf",
                {"m": {"type": "gpu", "gputype": "mdev", "pci": "01:00.0"}, "amd": {"type": "gpu", "vendorid": "1002"}},
            ),
            profiles=[profile("used", {"g": {"type": "gpu"}}, used_by=["/1.0/instances/c1"])],
            looks=2,
        ),
        "incus",
    ),
]


@pytest.mark.parametrize(("change", "kind"), [case[1:] for case in HARMLESS], ids=[case[0] for case in HARMLESS])
def test_what_is_harmless_is_not_told(made: MadeMachine, change: Change, kind: str) -> None:
    change(made)
    assert made.found(kind) == []
    assert made.examined().severity is OK


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda m: m.write("var/lib/incus/unix.socket", ""), "Connection refused"),
        (lambda m: m.incus({"name": "x"}), "'expanded_devices'"),
    ],
    ids=["nobody listens", "something else"],
)
def test_an_incus_that_does_not_answer_is_told(made: MadeMachine, change: Change, why: str) -> None:
    made.unit("incus.service")
    change(made)
    [unseen] = [each for each in made.examined().unseen if each.what == "Incus"]
    assert str(unseen.why).startswith("its daemon does not answer: ")
    assert why in str(unseen.why)
    assert not unseen.for_root


def test_an_incus_that_does_not_run_is_not_started_by_a_look(made: MadeMachine) -> None:
    """Systemd has its socket, and starts it for whoever connects."""
    made.incus(instance("win11", {"card": {"type": "gpu"}}))
    made.unit("incus.service", ActiveState="inactive")
    assert (made.found("incus"), made.examined().unseen) == ([], ())


def test_what_incus_has_is_for_root(made: MadeMachine) -> None:
    made.incus(instance("win11", {"card": {"type": "gpu"}}))
    made.as_root = False
    [unseen] = [each for each in made.examined().unseen if each.what == "Incus"]
    assert unseen.for_root


def test_every_check_has_a_machine_on_which_it_finds_something() -> None:
    """Those of the initrd are in test_setup_boot.py, beside what writes it."""
    without = {check.kind for check in CHECKS} - {kind for _, _, kind, *_ in CASES}
    assert without == {"managed", "other_tools", "early"}


def test_every_guard_has_its_check() -> None:
    """What refuses a switch by facts is told here, too: by the kinds in the source of the guards."""
    planning = ROOT / "gpuswitch/switch/planning"
    source = "".join((planning / f"{name}.py").read_text() for name in ("guards", "requirements", "survey"))
    # "unknown": an answer that did not come, of which there is none here.
    assert set(re.findall(r'Blocker\(\s*"(\w+)"', source)) - {"unknown"} == frozenset().union(
        *(c.guards for c in CHECKS)
    )


# Which GPUs are judged ----------------------------------------------------------------------------------------------


def test_a_gpu_that_is_named_is_judged_though_it_is_not_managed(made: MadeMachine) -> None:
    found = made.examined("00:02.0")
    assert (found.gpus, found.passed_over) == ((INTEGRATED,), (CARD,))
    assert [each.severity for each in made.found("boot_display", INTEGRATED)] == [PROBLEM]
    assert made.examined("GeForce").gpus == made.examined(SOUND).gpus == (CARD,)


def test_without_a_configuration_all_are_judged_and_nothing_is_a_problem_yet(made: MadeMachine) -> None:
    made.remove("etc/gpuswitch/config.toml")
    found = made.examined()
    assert found.gpus == (INTEGRATED, CARD)
    assert [(each.kind, each.subject) for each in found.findings if each.severity is WARNING] == [
        ("boot_display", INTEGRATED)
    ]


@pytest.mark.parametrize("name", ["0a:00.0", "radeon", "x" * 300])
def test_a_name_that_is_none(made: MadeMachine, name: str) -> None:
    with pytest.raises(NoSuchGpu, match=f"this host has {INTEGRATED}, {CARD}"):
        made.examined(name)


@pytest.mark.parametrize(
    ("kinds", "remedy", "commands"),
    [
        (["recover"], "put right what is named here, then bring it home", 1),
        (
            ["recover", "reboot"],
            "put right what is named here, then bring it home; if that does not help: reboot it",
            1,
        ),
        (
            ["reset_on_failure", "reboot"],
            "it has failed again at the same step, and once more alone does not help: reset_on_failure it; reboot it",
            0,
        ),
    ],
)
def test_what_to_do_about_a_failed_one_is_what_the_service_says(
    made: MadeMachine, kinds: list[str], remedy: str, commands: int
) -> None:
    told = {kind: Sentence("{what} it", what=kind) for kind in kinds}
    made.says("failed", reason="the unbind failed", remedies=told)
    [found] = made.found("state")
    assert str(found.remedy) == remedy
    assert list(found.commands) == [f"gpuswitchctl recover {CARD}"] * commands


# What cannot be seen ------------------------------------------------------------------------------------------------


def test_without_the_service_only_root_knows_who_has_it_open(made: MadeMachine) -> None:
    made.service, made.as_root = Service(), False
    found = made.examined()
    assert [(each.what, each.for_root) for each in found.unseen] == [("holders", True)]
    assert [each.kind for each in found.findings if each.severity is not OK] == ["service"]
    assert found.severity is WARNING


def test_without_systemd(made: MadeMachine) -> None:
    """Nothing is said of units, and that is said."""
    made.examined()
    made.program("systemctl", "echo 'Failed to connect to bus' >&2; exit 1")
    made._write_units = lambda: None  # type: ignore[method-assign]  # else it would answer
    found = made.examined()
    assert [each.what for each in found.unseen] == ["systemctl"]
    assert {each.kind for each in found.findings}.isdisjoint({"broker", "polkit"})
    assert found.severity is WARNING


def test_a_folder_that_cannot_be_read_fails_the_look_and_no_other(made: MadeMachine) -> None:
    path = made.tree.sys / "bus/pci/drivers_autoprobe"
    path.mkdir()
    found = made.examined()
    assert [each.what for each in found.unseen] == ["host"]
    assert (found.gpus, found.host_seen) == ((), False)
    assert {"kernel", "other_tools"} & {each.kind for each in found.findings} == {"kernel"}
    assert found.severity is WARNING


def test_a_fifo_is_not_waited_for(made: MadeMachine) -> None:
    """Whoever opens one that nobody writes to waits for ever."""
    (made.root / "etc/modprobe.d").mkdir()
    os.mkfifo(made.root / "etc/modprobe.d/x.conf")
    assert made.examined().severity is OK


# The hook is seen ---------------------------------------------------------------------------------------------------


def test_a_hook_that_came_after_libvirt_is_not_seen_until_libvirt_is_reloaded(made: MadeMachine) -> None:
    now = int(time.time())
    made.unit("virtqemud.service", StateChangeTimestamp=f"@{now - 3600}")
    [found] = made.found("hook")
    assert (found.severity, found.commands) == (WARNING, ("systemctl reload virtqemud.service",))
    made.unit("virtqemud.service", StateChangeTimestamp=f"@{now + 3600}")
    assert made.found("hook")[0].severity is OK


# Remedies of other distributions ------------------------------------------------------------------------------------


def by_loader(files: dict[str, str], *programs: str, family: str, like: str = "") -> Change:
    def change(made: MadeMachine) -> None:
        without_iommu()(made)
        started_by(files, *programs, family=family, like=like)(made)

    return change


def started_by(files: dict[str, str], *programs: str, family: str, like: str = "") -> Change:
    def change(made: MadeMachine) -> None:
        made.distribution(family, like)
        for place in ("etc/default/grub", "usr/bin/update-grub", "usr/bin/update-initramfs"):
            made.remove(place)
        for place, text in files.items():
            made.write(place, text)
        for program in programs:
            made.program(program)

    return change


BOOTED = "sys/firmware/efi/efivars/LoaderInfo-4a67b082-0a4c-41cf-b6c7-440b29bb8c4f"
SYSTEMD_BOOT = {BOOTED: "\x06\0\0\0s\0y\0s\0t\0e\0m\0d\0-\0b\0o\0o\0t\0 \0002\0005\0007\0\0\0"}
GRUB = {"etc/default/grub": ""}
CMDLINE = {"etc/kernel/cmdline": "root=/dev/sda1\n"}
UUIDS = {"etc/kernel/proxmox-boot-uuids": "ABCD-1234\n"}
SED = "sed -i '1s/$/ intel_iommu=on/' /etc/kernel/cmdline"
LOADERS: list[tuple[str, Change, list[str]]] = [
    ("arch-grub", by_loader(GRUB, family="arch"), [APPEND, "grub-mkconfig -o /boot/grub/grub.cfg"]),
    (
        "arch-systemd-boot",
        by_loader(SYSTEMD_BOOT, family="arch"),
        ["sed -i '/^options/ s/$/ intel_iommu=on/' \"$(bootctl --print-boot-path)\"/loader/entries/*.conf"],
    ),
    (
        "arch-unified",
        by_loader(SYSTEMD_BOOT | CMDLINE, "mkinitcpio", family="endeavouros", like="arch"),
        [SED, "mkinitcpio -P"],
    ),
    ("fedora", by_loader(GRUB, "grubby", family="fedora"), ["grubby --update-kernel=ALL --args=intel_iommu=on"]),
    (
        "rhel",
        by_loader(GRUB, "grubby", family="rocky", like="rhel centos fedora"),
        ["grubby --update-kernel=ALL --args=intel_iommu=on"],
    ),
    (
        "bazzite",
        by_loader(GRUB | {"run/ostree-booted": ""}, "grubby", "rpm-ostree", family="bazzite", like="fedora"),
        ["rpm-ostree kargs --append-if-missing=intel_iommu=on"],
    ),
    (
        "suse",
        by_loader(GRUB, family="opensuse-tumbleweed", like="opensuse suse"),
        [APPEND, "grub2-mkconfig -o /boot/grub2/grub.cfg"],
    ),
    (
        "pop",
        by_loader(SYSTEMD_BOOT, "kernelstub", family="pop", like="ubuntu debian"),
        ["kernelstub --add-options intel_iommu=on"],
    ),
    (
        "debian-systemd-boot",
        by_loader(SYSTEMD_BOOT | CMDLINE, family="debian"),
        [SED, 'kernel-install add "$(uname -r)" "/boot/vmlinuz-$(uname -r)"'],
    ),
    (
        "proxmox-systemd-boot",
        by_loader(SYSTEMD_BOOT | CMDLINE | UUIDS, "pveversion", family="debian"),
        [SED, "proxmox-boot-tool refresh"],
    ),
    ("proxmox-grub", by_loader(GRUB, "pveversion", family="debian"), [APPEND, "update-grub"]),
    (
        "nixos",
        by_loader({}, family="nixos"),
        ['# in /etc/nixos/configuration.nix: boot.kernelParams = [ "intel_iommu=on" ];', "nixos-rebuild boot"],
    ),
]


def test_nixos_has_nothing_of_make_install(made: MadeMachine) -> None:
    """What is there comes from its configuration, and nothing else can put it back."""
    made.distribution("nixos")
    made.remove(HOOK)
    [hook] = [each for each in made.found("hook") if each.severity is PROBLEM]
    assert list(hook.commands) == ["nixos-rebuild switch"]
    made.write("sys/module/apparmor/parameters/enabled", "Y\n")
    made.write("opt/hook.py", "")
    made.hook(HOOK, "hook='/opt/hook.py'\n")
    [access] = made.found("mandatory_access")
    assert list(access.commands) == ["nixos-rebuild switch"]


@pytest.mark.parametrize(("change", "commands"), [case[1:] for case in LOADERS], ids=[case[0] for case in LOADERS])
def test_the_command_line_is_changed_as_this_system_does_it(
    made: MadeMachine, change: Change, commands: list[str]
) -> None:
    change(made)
    [found] = made.found("iommu")
    assert list(found.commands) == [*commands, "systemctl reboot"]


def test_an_unknown_loader_has_words_and_no_commands(made: MadeMachine) -> None:
    by_loader({}, family="slackware")(made)
    [found] = made.found("iommu")
    assert (str(found.remedy), found.commands) == ("add intel_iommu=on to the kernel command line", ())


@pytest.mark.parametrize(
    ("program", "command"),
    [
        ("dracut", "dracut --force --regenerate-all"),
        ("mkinitcpio", "mkinitcpio -P"),
        # Debian's, which names the image as the boot loader has it
        ("update-initramfs", "update-initramfs -u -k all"),
    ],
)
def test_the_initramfs_is_made_anew_as_this_system_does_it(made: MadeMachine, program: str, command: str) -> None:
    made.remove("usr/bin/update-initramfs")
    made.program(program)
    made.write("etc/modprobe.d/vfio.conf", IDS)
    [found] = made.found("modprobe")
    assert found.commands[-1] == command


def test_debians_command_may_be_one_of_dracut(made: MadeMachine) -> None:
    """As its package has it in Debian 14, where no initramfs-tools are."""
    assert made.examined().system.initramfs == "initramfs-tools"
    made.program("update-initramfs", 'dracut --force "/boot/initrd.img-$version" "$version"')
    made.program("dracut")
    assert made.examined().system.initramfs == "dracut"


def words_of_grub(made: MadeMachine) -> str:
    """What grub-mkconfig makes of its files: it reads them as a shell does."""
    files = [made.root / "etc/default/grub", *sorted((made.root / "etc/default/grub.d").glob("*.cfg"))]
    script = "".join(f". '{file}'; " for file in files) + "echo $GRUB_CMDLINE_LINUX $GRUB_CMDLINE_LINUX_DEFAULT"
    return subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True).stdout.strip()


def words_of_entries(made: MadeMachine) -> str:
    [line] = re.findall(r"^options\s+(.*)$", (made.root / "boot/loader/entries/debian.conf").read_text(), re.MULTILINE)
    return " ".join(line.split())


def words_of_kernel_cmdline(made: MadeMachine) -> str:
    """One line, as kernel-install and proxmox-boot-tool read it."""
    [line] = (made.root / "etc/kernel/cmdline").read_text().splitlines()
    return " ".join(line.split())


def carried_out(made: MadeMachine, commands: Iterable[str]) -> None:
    """Commands as they are copied, by a shell, on the files of that machine; what makes no file anew does nothing."""
    for name in ("update-grub", "update-initramfs", "proxmox-boot-tool", "systemctl", "kernel-install"):
        made.program(name)
    made.program("bootctl", f"echo '{made.root}/boot'")
    path = f"{made.root}/usr/bin:{os.defpath}"
    for command in commands:
        there = re.sub(r"(?<![\w/.\\])/(etc|usr/lib|lib)/", lambda found: f"{made.root}/{found[1]}/", command)
        subprocess.run(["sh", "-c", there], check=True, env={"PATH": path})


def with_grub(text: str, place: str = "etc/default/grub") -> Callable[[MadeMachine, str], None]:
    def write(made: MadeMachine, words: str) -> None:
        made.write(place, text.format(words))

    return write


def with_entries(made: MadeMachine, words: str) -> None:
    started_by(SYSTEMD_BOOT, family="arch")(made)
    made.write("boot/loader/entries/debian.conf", f"title Debian\noptions\t{words}\n")


def with_kernel_cmdline(made: MadeMachine, words: str) -> None:
    started_by(SYSTEMD_BOOT | UUIDS, "pveversion", family="debian")(made)
    made.write("etc/kernel/cmdline", words)  # without an end of the line


PLACES: list[tuple[str, Callable[[MadeMachine, str], None], Callable[[MadeMachine], str]]] = [
    ("grub", with_grub('GRUB_CMDLINE_LINUX="{}"\n'), words_of_grub),
    ("grub-default", with_grub('GRUB_CMDLINE_LINUX=""\nGRUB_CMDLINE_LINUX_DEFAULT="{}"'), words_of_grub),
    ("grub-single", with_grub("GRUB_CMDLINE_LINUX='{}'"), words_of_grub),
    (
        "grub-folder",  # as docs/tutorials/one-gpu.md has it
        with_grub('GRUB_CMDLINE_LINUX="$GRUB_CMDLINE_LINUX {}"\n', "etc/default/grub.d/iommu.cfg"),
        words_of_grub,
    ),
    ("entries", with_entries, words_of_entries),
    ("kernel-cmdline", with_kernel_cmdline, words_of_kernel_cmdline),
]
BOOTED_WITH: list[tuple[str, Change, str, str, str]] = [
    # name, what else is so, kind, what the kernel was started with, what it is to be started with
    ("igfx-off", lambda _: None, "iommu", "quiet intel_iommu=on,igfx_off", "quiet intel_iommu=on"),
    ("igfx-off-alone", lambda _: None, "iommu", "intel_iommu=igfx_off quiet", "intel_iommu=on quiet"),
    ("igfx-off-and-more", lambda _: None, "iommu", "intel_iommu=igfx_off,sm_on", "intel_iommu=on,sm_on"),
    ("off", without_iommu(), "iommu", "quiet intel_iommu=off", "quiet intel_iommu=on"),
    ("off-everywhere", without_iommu(), "iommu", "iommu=off intel_iommu=off quiet", "intel_iommu=on quiet"),
    ("off-for-all", without_iommu(), "iommu", "iommu=off quiet", "quiet intel_iommu=on"),
    ("off-though-on", without_iommu(), "iommu", "intel_iommu=on iommu=off", "intel_iommu=on"),
    ("not-on", without_iommu(), "iommu", "quiet", "quiet intel_iommu=on"),
    (
        "a-list",
        lambda _: None,
        "modprobe",
        "modprobe.blacklist=nouveau,nvidia,pcspkr quiet",
        "modprobe.blacklist=nouveau,pcspkr quiet",
    ),
    ("one-alone", lambda _: None, "modprobe", "quiet modprobe.blacklist=nvidia,nvidia-drm", "quiet"),
    (
        "two-lists",
        lambda _: None,
        "modprobe",
        "modprobe.blacklist=nvidia modprobe.blacklist=nouveau",
        "modprobe.blacklist=nouveau",
    ),
    ("barred", lambda _: None, "modprobe", "module_blacklist=pcspkr,nvidia", "module_blacklist=pcspkr"),
    ("no-vfio", lambda _: None, "vfio", "module_blacklist=nouveau,vfio_pci", "module_blacklist=nouveau"),
    ("ids", lambda _: None, "modprobe", "vfio-pci.ids=10de:2484,10de:228b quiet", "quiet"),
    ("others-ids", lambda _: None, "modprobe", "vfio_pci.ids=10de:2484,8086:1533", "vfio_pci.ids=8086:1533"),
]


# Every line in one place; in each of the other places a word that is changed, one in a list, and two at once.
EVERYWHERE = {"igfx-off", "a-list", "off-for-all"}
STARTS = [(place, case) for place in PLACES for case in BOOTED_WITH if place is PLACES[0] or case[0] in EVERYWHERE]


@pytest.mark.parametrize(
    ("write", "words_of", "change", "kind", "before", "after"),
    [(*place[1:], *case[1:]) for place, case in STARTS],
    ids=[f"{case[0]}-{place[0]}" for place, case in STARTS],
)
def test_what_the_kernel_is_started_with_after_the_remedy(
    made: MadeMachine,
    write: Callable[[MadeMachine, str], None],
    words_of: Callable[[MadeMachine], str],
    change: Change,
    kind: str,
    before: str,
    after: str,
) -> None:
    write(made, before)
    change(made)
    made.command_line(before)
    told = [each for each in made.found(kind) if each.severity is not OK]
    carried_out(made, [command for each in told for command in each.commands])
    assert sorted(words_of(made).split()) == sorted(after.split())  # grub has two variables, one after the other
    made.command_line(after)
    assert [str(each.reason) for each in made.found(kind) if "command line" in each.reason] == []


def test_a_word_of_grubs_that_stands_without_quotes(made: MadeMachine) -> None:
    made.write("etc/default/grub", "GRUB_CMDLINE_LINUX=intel_iommu=on,igfx_off\n")
    carried_out(made, remedies.remove_option(System(family="debian", loader="grub"), "intel_iommu=on"))
    assert words_of_grub(made) == "intel_iommu=on,igfx_off"  # one that begins alike is not meant
    carried_out(made, remedies.remove_option(System(family="debian", loader="grub"), "intel_iommu=on,igfx_off"))
    assert words_of_grub(made) == ""


CHANGED_BY_TOOLS: list[tuple[str, System, list[str]]] = [
    (
        "grubby",
        System(family="fedora", loader="grubby"),
        ["grubby --update-kernel=ALL --remove-args=a=1,2", "grubby --update-kernel=ALL --args=a=1"],
    ),
    (
        "rpm-ostree",
        System(family="ostree", loader="rpm-ostree"),
        ["rpm-ostree kargs --delete-if-present=a=1,2", "rpm-ostree kargs --append-if-missing=a=1"],
    ),
    (
        "kernelstub",
        System(family="ubuntu", loader="kernelstub"),
        ["kernelstub --delete-options a=1,2", "kernelstub --add-options a=1"],
    ),
    (
        "nixos",
        System(family="nixos", loader="nixos"),
        ['# in /etc/nixos/configuration.nix, in boot.kernelParams: "a=1" instead of "a=1,2"', "nixos-rebuild boot"],
    ),
]


@pytest.mark.parametrize(
    ("system", "commands"), [case[1:] for case in CHANGED_BY_TOOLS], ids=[case[0] for case in CHANGED_BY_TOOLS]
)
def test_a_word_is_changed_by_the_tool_of_this_system(system: System, commands: list[str]) -> None:
    assert remedies.change_options(system, {"a=1,2": "a=1"}) == (*commands, "systemctl reboot")


CARDS = "options vfio-pci ids=10de:2484,10de:228b"
MODPROBE: list[tuple[str, str, str]] = [
    # name, a file of modprobe's, what the remedy makes of it
    ("ids", f"  {CARDS}\noptions nvidia x=1\n", f"#   {CARDS}\noptions nvidia x=1\n"),
    ("no-end", f"{CARDS} # mine", f"# {CARDS} # mine"),
    ("ids-and-more", f"{CARDS} disable_vga=1\n", f"# {CARDS} disable_vga=1\noptions vfio-pci disable_vga=1\n"),
    ("others-ids", f"{CARDS},8086:1533\n", f"# {CARDS},8086:1533\noptions vfio-pci ids=8086:1533\n"),
    ("blacklist", "blacklist nvidia\noptions nvidia x=1\n", "# blacklist nvidia\noptions nvidia x=1\n"),
    ("two", "blacklist nvidia\nblacklist nvidia-drm\n", "# blacklist nvidia\n# blacklist nvidia-drm\n"),
    ("install", "install nvidia /bin/false\n", "# install nvidia /bin/false\n"),
    ("softdep", "softdep nvidia pre: vfio-pci\n", "# softdep nvidia pre: vfio-pci\n"),
    (
        "softdep-and-more",
        "softdep nvidia pre: i2c vfio-pci post: uvc\n",
        "# softdep nvidia pre: i2c vfio-pci post: uvc\nsoftdep nvidia pre: i2c post: uvc\n",
    ),
]


@pytest.mark.parametrize("folder", ["etc", "usr/lib"])
@pytest.mark.parametrize(("before", "after"), [case[1:] for case in MODPROBE], ids=[case[0] for case in MODPROBE])
def test_what_modprobe_reads_after_the_remedy(made: MadeMachine, folder: str, before: str, after: str) -> None:
    """A package's file stays, and one of the same name in /etc is read instead: with all else that it said."""
    file = made.write(f"{folder}/modprobe.d/a b.conf", before)
    carried_out(made, [command for each in made.found("modprobe") for command in each.commands])
    assert (made.root / "etc/modprobe.d/a b.conf").read_text() == after
    assert folder == "etc" or file.read_text() == before
    assert made.found("modprobe") == []


def test_a_line_that_goes_on_in_the_next_is_for_an_editor(made: MadeMachine) -> None:
    """A command that finds nothing would say nothing."""
    made.write("etc/modprobe.d/x.conf", "blacklist \\\n nvidia\n")
    [found] = made.found("modprobe")
    assert found.commands == ("update-initramfs -u -k all",)
    assert str(found.remedy) == "take that line out, and make the initramfs anew: blacklist nvidia"


def test_an_override_of_driverctls_is_gone_after_the_remedy(made: MadeMachine) -> None:
    """Its file alone: `driverctl unset-override` would unbind the card at once, under whoever has it open."""
    made.write(f"etc/driverctl.d/pci-{CARD}", "vfio-pci\n")
    made.write("etc/driverctl.d/usb-1-1", "none\n")
    [found] = made.found("driverctl")
    carried_out(made, found.commands)
    assert made.found("driverctl") == []
    assert [each.name for each in (made.root / "etc/driverctl.d").iterdir()] == ["usb-1-1"]


def test_a_foreign_hook_gets_another_name(made: MadeMachine) -> None:
    made.hook(HOOK, FOREIGN)
    [found] = made.found("hook")
    carried_out(made, found.commands[:1])
    assert (made.root / HOOK).with_name("60-other").read_text() == FOREIGN
    assert [str(each.reason)[:19] for each in made.found("hook")] == ["the hook is missing"]


def test_a_hook_that_only_root_may_read_is_not_called_missing(
    made: MadeMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fedora's /etc/libvirt is root's alone."""

    def refuse(path: str, *args: object, **more: object) -> os.stat_result:
        if str(path).endswith("50-gpuswitch"):
            raise PermissionError(13, "Permission denied", path)
        return real(path, *args, **more)  # type: ignore[arg-type]  # handed on

    real = os.stat
    monkeypatch.setattr("gpuswitch.doctor.machine.os.stat", refuse)
    assert made.found("hook") == []
    assert [(each.what, each.for_root) for each in made.examined().unseen] == [(f"/{HOOK}", True)]


def test_a_gpu_told_by_what_it_is_is_no_missing_one_where_the_host_cannot_be_looked_at(made: MadeMachine) -> None:
    made.write("etc/gpuswitch/config.toml", '[[gpu]]\nmatch = { vendor = "10de" }\n')
    made.folder("sys/bus/pci/drivers_autoprobe")
    assert [str(each.reason) for each in made.found("configuration")] == ["the configuration can be used"]


def test_names_are_quoted() -> None:
    evil = System(family="fedora", loader="grubby")
    assert remedies.remove_option(evil, "x=$(id)")[0] == "grubby --update-kernel=ALL --remove-args='x=$(id)'"


def test_a_gpu_behind_no_bridge_is_no_neighbour_of_its_port(made: MadeMachine) -> None:
    """A bridge in the group is in nobody's way, and not named."""
    made.tree.function("0000:00:1c.0", ids="8086:7ab8", class_code="060400", driver="pcieport", group=15)
    assert PORT not in str(made.found("groups")[0].reason)
    assert made.found("groups")[0].severity is OK


def test_what_the_service_says_of_a_gpu_counts_for_more_than_its_drivers(made: MadeMachine) -> None:
    made.service = Service(running=True, gpus={CARD: Told("recovering")})
    assert str(made.found("state")[0].reason) == "on recovering"


def test_the_page_is_current(tmp_path: Path) -> None:
    fresh = tmp_path / "doctor.md"
    subprocess.run([sys.executable, "docs/generate_doctor.py", fresh], cwd=ROOT, check=True)
    assert (ROOT / "docs/doctor.md").read_text() == fresh.read_text(), "run `make docs`"
