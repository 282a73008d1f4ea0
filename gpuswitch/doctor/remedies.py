"""Commands for this distribution and boot loader: whole lines, to be copied and run by root.

Only those of Debian with GRUB and initramfs-tools were ever run; the others follow the manuals of their tools.
"""

from __future__ import annotations

from collections.abc import Mapping
from shlex import quote

from gpuswitch.doctor.seen import System

REBOOT = "systemctl reboot"
_GRUB: Mapping[str, str] = {
    # grub-mkconfig(8). update-grub is Debian's and Ubuntu's own.
    "debian": "update-grub",
    "ubuntu": "update-grub",
    "proxmox": "update-grub",
    "fedora": "grub2-mkconfig -o /boot/grub2/grub.cfg --update-bls-cmdline",
    "suse": "grub2-mkconfig -o /boot/grub2/grub.cfg",
}
_GRUB_ELSEWHERE = "grub-mkconfig -o /boot/grub/grub.cfg"
_KERNEL_CMDLINE: Mapping[str, str] = {
    # kernel-install(8); add-all is there since systemd 255, and Debian 12 has 252.
    "debian": 'kernel-install add "$(uname -r)" "/boot/vmlinuz-$(uname -r)"',
    "ubuntu": 'kernel-install add "$(uname -r)" "/boot/vmlinuz-$(uname -r)"',
    "arch": "mkinitcpio -P",  # which makes unified kernel images with it
}
_KERNEL_CMDLINE_ELSEWHERE = "kernel-install add-all"
_ENTRIES = '"$(bootctl --print-boot-path)"/loader/entries/*.conf'
"""Where boot loader entries lie is for bootctl(1) to say: /boot, /efi or /boot/efi."""
_INITRAMFS: Mapping[str, str] = {
    "initramfs-tools": "update-initramfs -u -k all",
    "dracut": "dracut --force --regenerate-all",
    "mkinitcpio": "mkinitcpio -P",
    "nixos": "nixos-rebuild boot",
}
_INSTALL: Mapping[str, str] = {
    "debian": "apt-get install",
    "ubuntu": "apt-get install",
    "proxmox": "apt-get install",
    "fedora": "dnf install",
    "ostree": "rpm-ostree install",
    "arch": "pacman -S",
    "suse": "zypper install",
}
PACKAGES: Mapping[str, Mapping[str, str]] = {
    "polkit": {"debian": "polkitd", "ubuntu": "polkitd", "proxmox": "polkitd", "": "polkit"},
    "vfio": {
        "debian": '--reinstall "linux-image-$(uname -r)"',
        "ubuntu": '"linux-modules-extra-$(uname -r)"',
        "proxmox": '--reinstall "proxmox-kernel-$(uname -r)"',
        "fedora": '"kernel-modules-$(uname -r)"',
    },
    "kernel": {"debian": "linux-image-amd64", "ubuntu": "linux-generic", "fedora": "kernel", "arch": "linux"},
}
"""What brings what, by family; "": everywhere else."""


def add_option(system: System, option: str) -> tuple[str, ...]:
    """Put an option on the kernel's command line, and start the machine anew; () where nobody knows how."""
    match system.loader:
        case "grub":
            # /etc/default/grub is read as a shell script (grub-mkconfig), so the last word on it can be added.
            line = f"echo 'GRUB_CMDLINE_LINUX=\"$GRUB_CMDLINE_LINUX {option}\"' >> /etc/default/grub"
            return (line, *_grub(system), REBOOT)
        case "grubby":
            return (f"grubby --update-kernel=ALL --args={option}", REBOOT)
        case "rpm-ostree":
            return (f"rpm-ostree kargs --append-if-missing={option}", REBOOT)
        case "kernelstub":
            return (f"kernelstub --add-options {option}", REBOOT)
        case "systemd-boot" | "proxmox-boot-tool":
            return _edited(system, f"1s/$/ {option}/", f"/^options/ s/$/ {option}/")
        case "nixos":
            return (f'# in /etc/nixos/configuration.nix: boot.kernelParams = [ "{option}" ];', *_nixos())
    return ()


def remove_option(system: System, option: str) -> tuple[str, ...]:
    """Take an option off the kernel's command line, and start the machine anew; () where nobody knows how."""
    begin, end = r"""\(^\|[ "']\)""", r"""\($\|[ "']\)"""
    pattern = rf"s/{begin}{_escaped(option)}{end}/\1\2/g"
    match system.loader:
        case "grub":
            return (f"sed -i {_quoted(pattern)} /etc/default/grub", *_grub(system), REBOOT)
        case "grubby":
            return (f"grubby --update-kernel=ALL --remove-args={quote(option)}", REBOOT)
        case "rpm-ostree":
            return (f"rpm-ostree kargs --delete-if-present={quote(option)}", REBOOT)
        case "kernelstub":
            return (f"kernelstub --delete-options {quote(option)}", REBOOT)
        case "systemd-boot" | "proxmox-boot-tool":
            return _edited(system, pattern, f"/^options/ {pattern}")
        case "nixos":
            return (f'# in /etc/nixos/configuration.nix, take out of boot.kernelParams: "{option}"', *_nixos())
    return ()


def rebuild_initramfs(system: System) -> tuple[str, ...]:
    """Make the initial file system anew, which has a copy of modprobe's configuration; () where nobody knows how."""
    found = _INITRAMFS.get(system.initramfs)
    if found is None:
        return ()
    return (found, "proxmox-boot-tool refresh") if system.loader == "proxmox-boot-tool" else (found,)


def install(system: System, what: str) -> tuple[str, ...]:
    """Install the package that brings this; () where nobody knows which, or how."""
    package = PACKAGES[what].get(system.family, PACKAGES[what].get(""))
    program = _INSTALL.get(system.family)
    return (f"{program} {package}",) if program and package else ()


def take_out(file: str, *words: str) -> str:
    """Make comments of the lines of a file of modprobe's that have these words and no others, but for a comment.

    What a package has brought is put aside as a whole: modprobe.d(5) reads the file of the same name in /etc instead.
    """
    if not file.startswith("/etc/"):
        name = file.rpartition("/")[2]
        return f"ln -s /dev/null {quote(f'/etc/modprobe.d/{name}')}"
    pattern = r"[[:space:]]\+".join(map(_escaped, words))
    end = r"[[:space:]]*\(#.*\)\?$"
    return f"sed -i {_quoted(f's/^[[:space:]]*{pattern}{end}/# &/')} {quote(file)}"


def _grub(system: System) -> tuple[str, ...]:
    return (_GRUB.get(system.family, _GRUB_ELSEWHERE),)


def _nixos() -> tuple[str, ...]:
    return ("nixos-rebuild boot", REBOOT)


def _edited(system: System, cmdline: str, entries: str) -> tuple[str, ...]:
    """What systemd-boot starts is written from /etc/kernel/cmdline where there is one, else by hand."""
    if system.loader == "proxmox-boot-tool":
        return (f"sed -i {_quoted(cmdline)} /etc/kernel/cmdline", "proxmox-boot-tool refresh", REBOOT)
    if system.kernel_cmdline:
        again = _KERNEL_CMDLINE.get(system.family, _KERNEL_CMDLINE_ELSEWHERE)
        return (f"sed -i {_quoted(cmdline)} /etc/kernel/cmdline", again, REBOOT)
    return (f"sed -i {_quoted(entries)} {_ENTRIES}", REBOOT)


def _escaped(text: str) -> str:
    """For a basic regular expression between slashes."""
    return "".join(f"\\{c}" if c in "\\/.*[]^$" else c for c in text)


def _quoted(text: str) -> str:
    """For a shell."""
    return "'" + text.replace("'", "'\\''") + "'"
