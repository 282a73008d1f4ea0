"""The base: a Debian system without the project, its kernel, and an initrd that only mounts its disk."""

from __future__ import annotations

import lzma
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

from tests.harness.debian import releases
from tests.harness.debian.cache import Cache, content_key, remove
from tests.harness.debian.errors import HarnessError
from tests.harness.debian.releases import Release, make_system
from tests.harness.debian.tools import run, run_in

PACKAGES = (
    # the system
    *("systemd", "systemd-sysv", "udev", "dbus", "polkitd", "kmod", "apparmor", "linux-image-amd64"),
    # what the project and its tests use
    *("python3", "python3-venv", "make", "pciutils", "iproute2", "procps", "psmisc", "strace"),
    *("libvirt-daemon-system", "libvirt-clients", "libvirt-daemon-driver-qemu", "qemu-system-x86"),
    # a person at the machine: logs in on a seat, has a service manager and sound
    *("login", "passwd", "libpam-systemd", "dbus-user-session", "pipewire", "wireplumber"),
    # what the initrd is made with
    *("busybox-static", "cpio", "xz-utils", "zstd"),
)

RELEASE_PACKAGES: Mapping[str, tuple[str, ...]] = {
    # where it is installed it is the system bus, as on the desktops of today
    "forky": ("dbus-broker",),
}

INITRD_MODULES = "virtio_pci virtio_blk ext4"

KERNEL_VERSION = "kernel-version"

GZIP = 16 + zlib.MAX_WBITS
"""What zlib calls a stream with gzip's header."""

INIT = """\
#!/bin/busybox sh
b=/bin/busybox
$b mount -t devtmpfs dev /dev
while read -r module; do $b insmod "/modules/$module"; done </modules/order
$b mount -t ext4 -o noatime,noinit_itable /dev/vda /mnt
$b mount -o move /dev /mnt/dev
exec $b switch_root /mnt /sbin/init
"""

MAKE_INITRD = f"""\
kernel=$(ls /lib/modules)
tree=$(mktemp -d)
mkdir -p "$tree/bin" "$tree/dev" "$tree/mnt" "$tree/modules"
cp "$(command -v busybox)" "$tree/bin/busybox"
cat /harness-init >"$tree/init"
chmod +x "$tree/init"
# ext4's checksums, where they are not the kernel's own
checksums=$(find "/lib/modules/$kernel" -name 'crc32c_generic.ko*' -printf crc32c_generic)
for module in {INITRD_MODULES} $checksums; do modprobe -S "$kernel" --show-depends "$module"; done >"$tree/depends"
# others are built in
awk '$1 == "insmod" && !seen[$2]++ {{ print $2 }}' "$tree/depends" >"$tree/list"
while read -r file; do
    name=$(basename "${{file%.xz}}")
    case $file in *.xz) xz -dc "$file" ;; *) cat "$file" ;; esac >"$tree/modules/$name"
    echo "$name" >>"$tree/modules/order"
done <"$tree/list"
rm "$tree/list" "$tree/depends"
(cd "$tree" && find . | cpio -o -H newc --quiet) >/harness-initrd
rm -r "$tree" /harness-init
"""


def find_base(cache: Cache, release: Release) -> Path:
    """The folder with rootfs.tar, vmlinux, initrd and the kernel's version. The caller holds the cache's lock."""

    def build(folder: Path) -> None:
        root = folder / "root"
        packages = (*PACKAGES, *RELEASE_PACKAGES.get(release.name, ()))
        cache.say(f"  installing {release.name} and {len(packages)} packages, about a minute")
        # initramfs-tools' kernel hook would make an initrd that nobody boots
        make_system(release, root, packages, env={"INITRD": "No"})
        cache.say("  kernel and initrd")
        (folder / "vmlinux").write_bytes(uncompressed_kernel(root))
        (root / "harness-init").write_text(INIT)
        run_in(root, MAKE_INITRD)
        (folder / KERNEL_VERSION).write_text(next((root / "lib/modules").iterdir()).name)
        (root / "harness-initrd").rename(folder / "initrd")
        cache.say("  packing")
        run(["tar", "-C", root, "--numeric-owner", "--xattrs", "--xattrs-include=*", "-cf", folder / "rootfs.tar", "."])
        remove(root)

    return cache.make(f"base-{release.name}", base_key(release), build)


def base_key(release: Release) -> str:
    """Changes with this file, not with Debian's point releases: those come in when the cache is removed."""
    return content_key(release.name, Path(__file__), Path(releases.__file__))


def uncompressed_kernel(root: Path) -> bytes:
    """The ELF image in the machine's vmlinuz: it boots at once, where the kernel's own unpacker, emulated, takes long.

    As the kernel's scripts/extract-vmlinux: look for the magic numbers of the compressors, believe the one that
    gives an ELF file.
    """
    image = next((root / "boot").glob("vmlinuz-*")).read_bytes()
    unpackers: tuple[tuple[bytes, Callable[[bytes], bytes]], ...] = (
        (b"\xfd7zXZ\0", lambda data: lzma.LZMADecompressor().decompress(data)),
        (b"\x1f\x8b\x08", lambda data: zlib.decompressobj(GZIP).decompress(data)),
        # a stream is followed by other data, so that zstd fails at its end
        (b"\x28\xb5\x2f\xfd", lambda data: run(["chroot", root, "sh", "-c", "zstd -dqc || true"], stdin=data)),
    )
    for magic, unpack in unpackers:
        start = image.find(magic)
        while start >= 0:
            try:
                kernel = unpack(image[start:])
            except (lzma.LZMAError, zlib.error):
                kernel = b""
            if kernel.startswith(b"\x7fELF"):
                return kernel
            start = image.find(magic, start + 1)
    raise HarnessError("cannot find the kernel in its image: it is compressed with neither xz, gzip nor zstd")
