#!/bin/sh
# What a package's own scripts do beyond copying files; each format calls it at its own time.
#
#   maintain after-installation   the files are there, and the service is not yet started anew
#   maintain before-removal       all is still there: brings GPUs home, stops the service, takes libvirt's hook away
#   maintain before-transaction   the same for pacman, which may still go back, and runs nothing then: says how to do so
#   maintain deaf-libvirt         our hook is not there yet: prints what makes libvirt see it, where that takes anything
#   maintain foreign-hook         prints where others have a hook in the place of ours
#   maintain has-systemd          whether systemd runs here, by its status
#
# before-removal ends with 1, and the reason, where gpuswitch must stay: nobody else knows the way home of a GPU that it
# has moved. With GPUSWITCH_REMOVE=anyway it may go all the same, and no GPU is touched. `make uninstall` calls it, too.
set -eu

unit=gpuswitchd.service
journal=/run/gpuswitch/gpus
template=$(dirname "$0")/libvirt-hook
hooks=/etc/libvirt/hooks
hook=$hooks/qemu.d/50-gpuswitch
early=/var/lib/gpuswitch/setup-boot

say() { printf '%s\n' "gpuswitch: $*"; }

has_systemd() { [ -d /run/systemd/system ] && command -v systemctl >/dev/null && ! systemd-detect-virt -q --chroot; }

# our_hook: whether what libvirt runs there is a version of our hook. All have said where their hook.py is.
our_hook() { [ -f "$hook" ] && grep -q "^hook='/.*/hook\.py'$" "$hook"; }

foreign_hook() {
    [ ! -e "$hook" ] || our_hook || echo "$hook"
}

# deaf_libvirt: the running libvirt daemons that found no hook for QEMU when they started, and will not look for one
# before they are told to (libvirt's virHookCheck).
deaf_libvirt() {
    has_systemd || return 0
    for other in "$hooks/qemu" "$hooks"/qemu.d/*; do
        [ ! -f "$other" ] || [ ! -x "$other" ] || return 0
    done
    deaf=$(for daemon in libvirtd.service virtqemud.service; do
        ! systemctl -q is-active "$daemon" || printf ' %s' "$daemon"
    done)
    [ -z "$deaf" ] ||
        echo "libvirt had no hook for QEMU when it started; so that it sees this one: systemctl reload$deaf"
}

# put_hook: a copy, since AppArmor lets libvirt run no program that lies elsewhere. It is made outside of the folder, in
# which libvirt runs every program, whatever its name: what dpkg, rpm and pacman do with configuration files would be run.
put_hook() {
    [ -f "$template" ] || return 0 # of `make install`, whose list of files has the hook
    if [ -n "$(foreign_hook)" ]; then
        say "$hook is not ours, and stays: libvirt's machines get no GPU until it has another name and this is installed anew"
        return 0
    fi
    mkdir -p "$(dirname "$hook")"
    cp "$template" "$(dirname "$hook").new"
    chmod 0755 "$(dirname "$hook").new"
    mv -fT "$(dirname "$hook").new" "$hook"
}

take_hook() {
    [ -f "$template" ] || return 0
    our_hook || return 0
    rm -f "$hook"
    rmdir --ignore-fail-on-non-empty "$(dirname "$hook")"
}

# take_initrd: what `gpuswitchctl setup boot` has the initrd do. Without us nobody takes it back: the GPU would be on
# vfio for ever.
take_initrd() {
    [ -e "$early" ] || [ -e "$early-pending" ] || return 0
    gpuswitchctl setup boot undo </dev/null
}

# away: the GPUs that are not as they were before gpuswitch, by its journal: on vfio, owned, or not quite home.
away() {
    # the note of the boot lies there, too
    for page in "$journal"/*_??_??_[0-7].json; do
        [ ! -e "$page" ] || basename "$page" .json | sed 's/_/:/; s/_/:/; s/_/./'
    done
}

stay() {
    echo "cannot remove gpuswitch: $*" >&2
    gpus=$(away | paste -sd ' ')
    [ -z "$gpus" ] || echo "Nobody else knows the way home of $gpus." >&2
    cat >&2 <<'EOF'
Do what is said above, then remove gpuswitch again.
To remove it all the same, and leave all as it is: GPUSWITCH_REMOVE=anyway in the environment of the command.
EOF
    exit 1
}

after_installation() {
    deaf=$(deaf_libvirt)
    put_hook
    [ -z "$deaf" ] || say "$deaf"
    has_systemd || return 0
    # The bus must know who may have our name before the service asks for it; Debian's trigger comes later.
    busctl -q call org.freedesktop.DBus /org/freedesktop/DBus org.freedesktop.DBus ReloadConfig ||
        say "the bus has not read its configuration; run: systemctl reload dbus"
}

before_removal() {
    if [ "${GPUSWITCH_REMOVE:-}" = anyway ]; then
        take_initrd || say "the initrd still gives GPUs to vfio-pci"
        take_hook
        ! has_systemd || systemctl stop "$unit" || say "its service does not end: systemctl status $unit"
    elif has_systemd; then
        gpus=$(away)
        if [ -n "$gpus" ]; then
            # One that somebody has open is refused, whatever the configuration does with programs.
            # shellcheck disable=SC2086 # one word for each GPU
            gpuswitchctl to-host --busy refuse $gpus </dev/null || stay "a GPU cannot come home"
        fi
        take_hook
        if ! systemctl stop "$unit"; then
            put_hook
            stay "its service does not end: systemctl status $unit"
        elif [ -n "$(away)" ]; then # taken meanwhile, or on the host with something that is still to be given back
            put_hook
            systemctl start "$unit" || :
            stay "a GPU is not home yet: gpuswitchctl status"
        elif ! take_initrd; then # the last thing: whoever is refused before keeps it
            put_hook
            systemctl start "$unit" || :
            stay "the initrd still gives GPUs to vfio-pci"
        fi
    else
        take_initrd || stay "the initrd still gives GPUs to vfio-pci"
    fi
    take_hook
}

case ${1:-} in
after-installation) after_installation ;;
before-removal) before_removal ;;
before-transaction)
    before_removal
    say "should it stay after all: $0 after-installation; systemctl start $unit"
    ;;
deaf-libvirt) deaf_libvirt ;;
foreign-hook) foreign_hook ;;
has-systemd) has_systemd ;;
*)
    echo "cannot do '${1:-}': what can be done stands at the head of $0" >&2
    exit 2
    ;;
esac
