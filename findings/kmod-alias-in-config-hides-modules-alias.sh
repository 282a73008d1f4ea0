#!/bin/sh
# kmod 30: one alias in modprobe.d that matches a device hides every module whose own table matches it.
#
# depmod writes the tables of all modules to modules.alias, and modprobe -R lists each module that is for a modalias: two,
# where two have it. An `alias` line of the configuration looks like one more entry. It is none: where one matches, be
# its pattern as wide as it likes, modules.alias is not looked into (kmod_module_new_from_lookup in
# libkmod/libkmod-module.c asks the configuration first, and stops where that has an answer). udev, which loads by the
# same function, loads the configured module alone: the device's own driver does not come. Whoever asks modprobe which
# drivers fit a device hears of none but that one.
#
# Needs apt-get and dpkg-deb with Debian 12's archive, and as (binutils). Seen:
#   kmod version 30
#   without configuration: first second
#   with an alias for another module: other
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
apt-get download --quiet --quiet kmod=30+20221128-1 libkmod2=30+20221128-1
for package in *.deb; do dpkg-deb -x "$package" root; done
kmod() { LD_LIBRARY_PATH=$(dirname "$(find "$folder/root" -name 'libkmod.so.2')") "$folder/root/sbin/$@"; }
kmod modprobe --version | head -n 1

modules=lib/modules/6.1.0
mkdir -p "$modules" none some
module() { # NAME [ALIAS]
    printf '.section .modinfo,"a"\n.asciz "name=%s"\n.asciz "license=GPL"\n' "$1" >"$1.s"
    [ $# -lt 2 ] || printf '.asciz "alias=%s"\n' "$2" >>"$1.s"
    as -o "$modules/$1.ko" "$1.s"
}
module first 'pci:v00001234d00001111sv*sd*bc*sc*i*'
module second 'pci:v00001234d*sv*sd*bc03sc*i*'
module other
kmod depmod -b "$folder" 6.1.0
echo 'alias pci:v00001234d*sv*sd*bc*sc*i* other' >some/local.conf

found() { kmod modprobe -d "$folder" -S 6.1.0 -C "$1" -R 'pci:v00001234d00001111sv00001AF4sd00001100bc03sc00i00' | sort | xargs; }
without=$(found none)
with=$(found some)
echo "without configuration: $without"
echo "with an alias for another module: $with"
[ "$without" = "first second" ]
[ "$with" = other ]
