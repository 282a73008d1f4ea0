#!/bin/sh
# kmod 30: a `softdep` line voids the `install` line of the same module, from whatever file either comes.
#
# Two lines that guides for virtual machines with a graphics card give, for two ends: `install NAME /bin/false`, so that a
# driver is never loaded, and `softdep NAME pre: vfio-pci`, so that vfio-pci comes first. With both, the module is loaded:
# where a module has soft dependencies, its command is ignored (`ignorecmd` in __kmod_module_get_probe_list of
# libkmod/libkmod-module.c), without a word, and `modprobe --showconfig` lists both as if both held. modprobe.d(5) has
# half a sentence of it. `blacklist` is not void, but keeps nothing from loading it by name, or as a dependency.
#
# Needs apt-get and dpkg-deb with Debian 12's archive, and as (binutils). Seen:
#   kmod version 30
#   install alone: install /bin/false
#   install and softdep: insmod first.ko, insmod driver.ko
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
apt-get download --quiet --quiet kmod=30+20221128-1 libkmod2=30+20221128-1
for package in *.deb; do dpkg-deb -x "$package" root; done
kmod() { LD_LIBRARY_PATH=$(dirname "$(find "$folder/root" -name 'libkmod.so.2')") "$folder/root/sbin/$@"; }
kmod modprobe --version | head -n 1

modules=lib/modules/6.1.0
mkdir -p "$modules" alone both
for name in first driver; do
    printf '.section .modinfo,"a"\n.asciz "name=%s"\n.asciz "license=GPL"\n' "$name" | as -o "$modules/$name.ko"
done
kmod depmod -b "$folder" 6.1.0
echo 'install driver /bin/false' | tee alone/never.conf >both/never.conf
echo 'softdep driver pre: first' >both/order.conf

# What it would do, in its own words, without the folder.
would() {
    kmod modprobe -d "$folder" -S 6.1.0 -C "$1" --dry-run --verbose driver |
        sed 's|insmod .*/|insmod |; s| *$||' | paste -s -d , | sed 's/,/, /g'
}
alone=$(would alone)
both=$(would both)
echo "install alone: $alone"
echo "install and softdep: $both"
[ "$alone" = 'install /bin/false' ]
[ "$both" = 'insmod first.ko, insmod driver.ko' ]
