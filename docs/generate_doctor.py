"""Write docs/doctor.md from gpuswitch/doctor/: `python docs/generate_doctor.py [FILE]`."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from gpuswitch.doctor import remedies
from gpuswitch.doctor.findings import Area, Check
from gpuswitch.doctor.seen import System
from gpuswitch.doctor.table import CHECKS

_INTRODUCTION = """\
# Doctor

<!-- Made by docs/generate_doctor.py from gpuswitch/doctor/; change those, then run `make docs`. -->

`gpuswitchctl doctor [GPU...]` says what keeps this machine from giving its GPUs away, or may surprise you one day, and
what to do about it. It works without the service and without root, and says what it could not see then. It changes
nothing: it reads files, and asks `systemctl show` and the bus; it opens no device, and reads nothing that takes a
device's lock or wakes one. A look that takes longer than half a minute is left alone, and said.

| severity | | exit status |
|---|---|---|
| ok | as it should be | 0 |
| warning | may keep a switch from working, or surprise somebody; or a look did not come back | 1 |
| problem | a switch is refused for it, or breaks | 2 |

The exit status is that of the worst; it is 2 as well where the command was called wrongly, as for every verb (`--json`
tells them apart: there is an `error` then). What only root may see, and was not seen, does not count.

You may name the GPUs that it is to judge. If you name none, it judges those with a `[[gpu]]` table in the
configuration; if there is no such table, it judges all of them, and what would refuse a switch is a warning only. What
refuses a switch is found by the same code as in a switch.
"""
_AREAS = {
    Area.MACHINE: "The machine",
    Area.SERVICE: "gpuswitch",
    Area.GPU: "Each GPU",
    Area.LIBVIRT: "libvirt",
    Area.OTHER_TOOLS: "Other tools",
}
_REMEDIES = """
## Commands of each system

Which commands are told depends on `/etc/os-release` (`ID`, `ID_LIKE`) and on what starts the machine. The lines that
edit a file (`printf`, `sed`, `install`, `rm`, `mv`) are run by tests, on files of their own; `update-grub` and
`update-initramfs` were run after them on Debian 12, and did what they shall. **No command of another distribution or
boot loader was ever run there**; they follow the manuals of their tools. Where the boot loader is not known, the
remedy is in words alone.

Of an option with a list (`modprobe.blacklist=nouveau,nvidia`) the one word is taken out, and the rest stays. On Debian
and its like, the files in `/etc/default/grub.d` are changed as well, where there are any.

### An option of the kernel's command line

"""
_SYSTEMS = (
    ("Debian, GRUB", System(family="debian", loader="grub")),
    ("Ubuntu, GRUB", System(family="ubuntu", loader="grub")),
    ("Debian, systemd-boot", System(family="debian", loader="systemd-boot", kernel_cmdline=True)),
    ("Pop!_OS, kernelstub", System(family="ubuntu", loader="kernelstub")),
    ("Proxmox, GRUB", System(family="proxmox", loader="grub")),
    ("Proxmox, systemd-boot", System(family="proxmox", loader="proxmox-boot-tool", kernel_cmdline=True)),
    ("Fedora, RHEL, grubby", System(family="fedora", loader="grubby")),
    ("Fedora Silverblue, Bazzite: rpm-ostree", System(family="ostree", loader="rpm-ostree")),
    ("Arch, GRUB", System(family="arch", loader="grub")),
    ("Arch, systemd-boot", System(family="arch", loader="systemd-boot")),
    ("Arch, unified kernel images", System(family="arch", loader="systemd-boot", kernel_cmdline=True)),
    ("openSUSE, GRUB", System(family="suse", loader="grub")),
    ("NixOS", System(family="nixos", loader="nixos")),
)
_TRIED = "Debian, GRUB"
_INITRAMFS = ("initramfs-tools", "dracut", "mkinitcpio", "nixos")


def page() -> str:
    """The whole page."""
    text = [_INTRODUCTION]
    for area, title in _AREAS.items():
        text.append(f"\n## {title}\n\n")
        text += _table(("check", "what is looked at", "what to do"), map(_row, (c for c in CHECKS if c.area is area)))
    text.append(_REMEDIES)
    text += _table(("system", "put on", "taken off"), (_of_system(name, system) for name, system in _SYSTEMS))
    text.append("\n### The initramfs\n\n")
    text += _table(
        ("made by", ""), ((name, _code(remedies.rebuild_initramfs(System(initramfs=name)))) for name in _INITRAMFS)
    )
    text.append("\n### Packages\n\n")
    families = ("debian", "ubuntu", "proxmox", "fedora", "ostree", "arch", "suse")
    rows = (
        (family, *(_code(remedies.install(System(family=family), what)) for what in remedies.PACKAGES))
        for family in families
    )
    text += _table(("system", *remedies.PACKAGES), rows)
    return "".join(text)


def _row(check: Check) -> tuple[str, ...]:
    return f"`{check.kind}`", check.meaning, check.remedy


def _of_system(name: str, system: System) -> tuple[str, ...]:
    option = "intel_iommu=on"
    return (
        name if name == _TRIED else f"{name} (never run)",
        _code(remedies.add_option(system, option)[:-1]),
        _code(remedies.remove_option(system, option)[:-1]),
    )


def _code(commands: Sequence[str]) -> str:
    return "<br>".join(f"`` {command} ``".replace("|", "\\|") for command in commands) or "–"  # noqa: RUF001 -- a dash


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    lines = [head, tuple("---" for _ in head), *rows]
    return [f"| {' | '.join(line)} |\n" for line in lines]


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("doctor.md")
    target.write_text(page())
