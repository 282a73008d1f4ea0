"""Commands for this distribution and boot loader: whole lines, to be copied and run by root.

Only those of Debian with GRUB and initramfs-tools were ever run; the others follow the manuals of their tools.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from shlex import quote

from gpuswitch.doctor.seen import Line, System
from gpuswitch.sentence import Sentence

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
_SWITCH = "nixos-rebuild switch"
MAINTAIN = "/usr/lib/gpuswitch/maintain"
"""What a package's own scripts call, and nothing but a package brings (contrib/maintain.sh, docs/packages.md)."""
_PACKAGE_AGAIN: Mapping[str, str] = {
    "debian": "apt-get install --reinstall ./gpuswitch_*.deb",
    "ubuntu": "apt-get install --reinstall ./gpuswitch_*.deb",
    "proxmox": "apt-get install --reinstall ./gpuswitch_*.deb",
    "fedora": "dnf reinstall ./gpuswitch-*.rpm",
    "arch": "pacman -U ./gpuswitch-*.pkg.tar.zst",
}
PACKAGES: Mapping[str, Mapping[str, str]] = {
    "polkit": {"debian": "polkitd", "ubuntu": "polkitd", "proxmox": "polkitd", "": "polkit"},
    "vfio": {
        "debian": '--reinstall "linux-image-$(uname -r)"',
        "ubuntu": '"linux-modules-extra-$(uname -r)"',
        "proxmox": '--reinstall "proxmox-kernel-$(uname -r)"',
        "fedora": '"kernel-modules-$(uname -r)"',
    },
    "virsh": {
        "debian": "libvirt-clients",
        "ubuntu": "libvirt-clients",
        "proxmox": "libvirt-clients",
        "fedora": "libvirt-client",
        "ostree": "libvirt-client",
        "suse": "libvirt-client",
        "arch": "libvirt",
    },
    "prometheus": {"debian": "prometheus", "ubuntu": "prometheus", "proxmox": "prometheus", "arch": "prometheus"},
    "kernel": {
        "debian": '"linux-image-$(dpkg --print-architecture)"',
        "ubuntu": "linux-generic",
        "fedora": "kernel",
        "arch": "linux",
    },
}
"""What brings what, by family; "": everywhere else."""


def add_option(system: System, option: str) -> tuple[str, ...]:
    """Put an option on the kernel's command line, and start the machine anew; () where nobody knows how."""
    return change_options(system, {}, [option])


def remove_option(system: System, option: str) -> tuple[str, ...]:
    """Take an option off the kernel's command line, and start the machine anew; () where nobody knows how."""
    return change_options(system, {option: ""})


def change_options(system: System, changes: Mapping[str, str], added: Sequence[str] = ()) -> tuple[str, ...]:
    """Change words of the kernel's command line, and start the machine anew; () where nobody knows how.

    `changes` has what is to stand there instead of each word, "" for nothing; `added` comes besides.
    """
    gone, new = " ".join(changes), " ".join([*filter(None, changes.values()), *added])
    match system.loader:
        case "grub":
            return (*_in_grub(system, changes, added), REBOOT)
        case "grubby":
            change = "grubby --update-kernel=ALL"
            return (
                *([f"{change} --remove-args={quote(gone)}"] if gone else ()),
                *([f"{change} --args={quote(new)}"] if new else ()),
                REBOOT,
            )
        case "rpm-ostree":
            # Each goes on from the deployment that the one before has prepared.
            return (
                *(f"rpm-ostree kargs --delete-if-present={quote(word)}" for word in changes),
                *(f"rpm-ostree kargs --append-if-missing={quote(word)}" for word in new.split()),
                REBOOT,
            )
        case "kernelstub":
            return (
                *([f"kernelstub --delete-options {quote(gone)}"] if gone else ()),
                *([f"kernelstub --add-options {quote(new)}"] if new else ()),
                REBOOT,
            )
        case "systemd-boot" | "proxmox-boot-tool":
            ends = [f"s/$/ {_replacement(word)}/" for word in added]
            words = [_word_changed(old, new) for old, new in changes.items()]
            return _edited(
                system,
                "; ".join([*words, *(f"1{end}" for end in ends)]),
                "; ".join(f"/^options/ {each}" for each in [*words, *ends]),
            )
        case "nixos":
            file = "# in /etc/nixos/configuration.nix"
            return (
                *(
                    f'{file}, in boot.kernelParams: "{new}" instead of "{old}"'
                    if new
                    else f'{file}, take out of boot.kernelParams: "{old}"'
                    for old, new in changes.items()
                ),
                *(f'{file}: boot.kernelParams = [ "{word}" ];' for word in added),
                *_nixos(),
            )
    return ()


def without(option: str, value: str, modules: Collection[str]) -> str:
    """The option with a list of modules but for these, whose names have underscores; "" where none is left."""
    rest = ",".join(name for name in value.split(",") if name and underscored(name) not in modules)
    return f"{option}={rest}" if rest else ""


def underscored(module: str) -> str:
    """A module's name as the kernel has it: people write it with hyphens as well."""
    return module.replace("-", "_")


def _in_grub(system: System, changes: Mapping[str, str], added: Sequence[str]) -> tuple[str, ...]:
    """/etc/default/grub is read as a shell script (grub-mkconfig), so the last word on a variable can be added.

    What is added begins a line of its own, also where the last one has no end.
    """
    script = "; ".join(_word_changed(old, new, before="=") for old, new in changes.items())
    files = " ".join(map(quote, system.grub_files))
    return (
        *([f"sed -i {_quoted(script)} {files}"] if script else ()),
        *(
            rf"""printf '\n%s\n' 'GRUB_CMDLINE_LINUX="$GRUB_CMDLINE_LINUX {word}"' >> /etc/default/grub"""
            for word in added
        ),
        _GRUB.get(system.family, _GRUB_ELSEWHERE),
    )


def _word_changed(old: str, new: str, before: str = "") -> str:
    """For sed: another word, or none, where this one stands as a whole. `before`: what else may stand before it."""
    begin, end = rf"""\(^\|[[:space:]"'{before}]\)""", r"""\($\|[[:space:]"']\)"""
    return rf"s/{begin}{_escaped(old)}{end}/\1{_replacement(new)}\2/g"


def rebuild_initramfs(system: System) -> tuple[str, ...]:
    """Make the initial file system anew, which has a copy of modprobe's configuration; () where nobody knows how."""
    # Where Debian's command is, whatever makes the initrd: it tells the boot loader of the new one as well.
    found = _INITRAMFS.get("initramfs-tools" if system.update_initramfs else system.initramfs)
    if found is None:
        return ()
    return (found, "proxmox-boot-tool refresh") if system.loader == "proxmox-boot-tool" else (found,)


def install(system: System, what: str) -> tuple[str, ...]:
    """Install the package that brings this; () where nobody knows which, or how."""
    package = PACKAGES[what].get(system.family, PACKAGES[what].get(""))
    program = _INSTALL.get(system.family)
    return (f"{program} {package}",) if program and package else ()


def change_line(line: Line, instead: Sequence[str] = ()) -> tuple[str, ...]:
    """Make comments of the lines of a file of modprobe's that have these words and no others, but for a comment.

    `instead` are the words of a line that comes in their place, none for no line. A file that a package has brought
    stays; modprobe.d(5) reads one of the same name in /etc in its place, with all else that it says. () for a line
    that goes on in the next one of the file.
    """
    if line.goes_on:
        return ()
    pattern = r"[[:space:]]\+".join(map(_escaped, line.words))
    new = rf"\n{_replacement(' '.join(instead))}" if instead else ""
    script = rf"s/^[[:space:]]*{pattern}[[:space:]]*\(#.*\)\?$/# &{new}/"
    if line.file.startswith("/etc/"):
        return (f"sed -i {_quoted(script)} {quote(line.file)}",)
    place = quote(f"/etc/modprobe.d/{line.file.rpartition('/')[2]}")
    copy = f"[ -e {place} ] || install -D -m 0644 {quote(line.file)} {place}"
    return (copy, f"sed -i {_quoted(script)} {place}")


def install_again(system: System, *, packaged: bool) -> tuple[Sentence, tuple[str, ...]]:
    """Bring back what is missing of gpuswitch: in words, and the commands."""
    if system.family == "nixos":  # where nothing but a configuration puts files there
        return Sentence("build the system anew, with `services.gpuswitch.enable`"), (_SWITCH,)
    if not packaged:
        return Sentence("install gpuswitch again, in its sources"), ("make install",)
    command = _PACKAGE_AGAIN.get(system.family)
    words = Sentence("install the package of gpuswitch again, in the folder where it lies")
    return words, (command,) if command else ()


def put_hook(system: System, *, packaged: bool) -> tuple[Sentence, tuple[str, ...]]:
    """Have our hook put where libvirt looks for it: in words, and the commands."""
    if not packaged or system.family == "nixos":
        return install_again(system, packaged=packaged)
    return Sentence("have the package put it there"), (f"{MAINTAIN} after-installation",)


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


def _replacement(text: str) -> str:
    """For what sed puts in, between slashes."""
    return "".join(f"\\{c}" if c in "\\/&" else c for c in text)


def _quoted(text: str) -> str:
    """For a shell."""
    return "'" + text.replace("'", "'\\''") + "'"
