#!/bin/sh
# Installs gpuswitch on the system it runs in, or takes it away again: `make install`, `make uninstall`.
#
#   PREFIX=/usr/local PYTHON=/usr/bin/python3 install.sh install|uninstall
#   PREFIX=/usr DESTDIR=DIR HOOK=/usr/lib/.../gpuswitch/hook.py [COCKPIT=DIR] install.sh stage
#
# Works in a chroot, without a running systemd or bus. pip obeys its own environment (PIP_NO_INDEX, PIP_FIND_LINKS ...),
# and installs what contrib/requirements.lock names by hash, built with what contrib/build.lock names.
#
# `stage` is for who makes a package: all files but the Python ones, below DESTDIR, for any user. The programs are in
# PREFIX/bin, hook.py is at HOOK with proxmox_hook.py and slurm_hook.py beside it; UNITDIR and ZSHDIR say where systemd and zsh look for
# units and completions. COCKPIT is the folder with the page for Cockpit, where `make cockpit` has built it; `install`
# takes dist/cockpit/gpuswitch, where that is there and Cockpit is, too.
#
# Each installation is a directory of its own under PREFIX/lib/gpuswitch, with a virtual environment and a manifest;
# `current` points to the one in use. A new one is built beside the old one and `current` is moved when it is complete,
# so an installation that fails leaves the old one as it was.
set -eu

PREFIX=${PREFIX:-/usr/local}
[ "$PREFIX" = / ] || PREFIX=${PREFIX%/} # it is compared, and stands in the unit
PYTHON=${PYTHON:-/usr/bin/python3}
COCKPIT=${COCKPIT:-}
source=$(cd "$(dirname "$0")/.." && pwd)
home=$PREFIX/lib/gpuswitch
current=$home/current
unit=gpuswitchd.service
hook=/etc/libvirt/hooks/qemu.d/50-gpuswitch
page=$source/dist/cockpit/gpuswitch
package=/usr/lib/gpuswitch/maintain

# A package's files lie in /usr, an administrator's own units, activation and completions in /usr/local; the bus reads
# policies in /usr/share and /etc only, and polkit before 124 actions in /usr/share only.
# bash and zsh look for completions in /usr/local/share, too, wherever the command is; fish does so only in a desktop.
if [ "$PREFIX" = /usr ]; then
    base=/usr policies=/usr/share/dbus-1/system.d
else
    base=/usr/local policies=/etc/dbus-1/system.d
fi
doc=$PREFIX/share/doc/gpuswitch
units=${UNITDIR:-$base/lib/systemd/system}
zsh=${ZSHDIR:-$base/share/zsh/site-functions}

# What every way of installing puts outside of PREFIX/lib/gpuswitch: how | from | to.
files() {
    cat <<EOF
file|units/gpuswitchd.service.in|$units/gpuswitchd.service
file|units/gpuswitch-vfio@.service.in|$units/gpuswitch-vfio@.service
file|units/gpuswitch-notify.service.in|$base/lib/systemd/user/gpuswitch-notify.service
file|units/org.gpuswitch1.service.in|$base/share/dbus-1/system-services/org.gpuswitch1.service
file|units/org.gpuswitch1.conf|$policies/org.gpuswitch1.conf
file|units/org.gpuswitch1.policy|/usr/share/polkit-1/actions/org.gpuswitch1.policy
file|units/org.gpuswitch1.rules|/usr/share/polkit-1/rules.d/50-gpuswitch.rules
file|units/gpuswitch.sysusers|$base/lib/sysusers.d/gpuswitch.conf
file|units/gpuswitch.catalog|$base/lib/systemd/catalog/gpuswitch.catalog
file|contrib/completion/gpuswitchctl.bash|$base/share/bash-completion/completions/gpuswitchctl
file|contrib/completion/gpuswitchctl.fish|/usr/share/fish/vendor_completions.d/gpuswitchctl.fish
file|contrib/completion/_gpuswitchctl|$zsh/_gpuswitchctl
program|contrib/proxmox/gpuswitch-hookscript|$PREFIX/share/gpuswitch/proxmox/gpuswitch-hookscript
program|contrib/slurm/features|$PREFIX/share/gpuswitch/slurm/features
program|contrib/slurm/health|$PREFIX/share/gpuswitch/slurm/health
program|contrib/slurm/prolog|$PREFIX/share/gpuswitch/slurm/prolog
file|contrib/slurm/slurm.conf|$PREFIX/share/gpuswitch/slurm/slurm.conf
file|contrib/slurm/gres.conf|$PREFIX/share/gpuswitch/slurm/gres.conf
file|contrib/slurm/helpers.conf|$PREFIX/share/gpuswitch/slurm/helpers.conf
file|contrib/slurm/job_submit.lua|$PREFIX/share/gpuswitch/slurm/job_submit.lua
file|contrib/slurm/devices.conf|$PREFIX/share/gpuswitch/slurm/devices.conf
file|contrib/prometheus/gpuswitch.rules.yml|$PREFIX/share/gpuswitch/prometheus/gpuswitch.rules.yml
file|contrib/grafana/gpuswitch.json|$PREFIX/share/gpuswitch/grafana/gpuswitch.json
file|docs/man/gpuswitchctl.1|$PREFIX/share/man/man1/gpuswitchctl.1
file|docs/man/gpuswitchd.8|$PREFIX/share/man/man8/gpuswitchd.8
file|docs/man/gpuswitch.toml.5|$PREFIX/share/man/man5/gpuswitch.toml.5
file|docs/man/org.gpuswitch1.5|$PREFIX/share/man/man5/org.gpuswitch1.5
EOF
}

# documents: those that lead to each other, by their paths; alerts name the runbook by its path, too.
documents() {
    (
        cd "$source"
        find README.md CHANGELOG.md CONTRIBUTING.md docs \
            \( -name '*.md' -o -name '*.svg' -o -name '*.webp' -o -name '*.xml' -o -name '*.json' \)
    )
}

# copy_documents DIR: all of them below it.
copy_documents() {
    mkdir -p "$1"
    documents | (cd "$source" && xargs cp --parents --no-preserve=mode --target-directory "$1")
}

# page_files DIR: those of the page for Cockpit, which looks for it in both places, and the entry in a desktop's menu that
# opens it; nothing without a DIR.
page_files() {
    [ -n "$1" ] || return 0
    printf 'file|contrib/desktop/gpuswitch.desktop|%s\n' "$base/share/applications/gpuswitch.desktop"
    for file in "$1"/*; do
        printf 'copy|%s|%s\n' "$file" "$base/share/cockpit/gpuswitch/$(basename "$file")"
    done
}

# What `make install` adds. libvirt looks for hooks in one place; it may be installed later, and finds ours then.
installed_files() {
    cat <<EOF
link|$current/bin/gpuswitchctl|$PREFIX/bin/gpuswitchctl
link|$current/bin/gpuswitchd|$PREFIX/sbin/gpuswitchd
hook|contrib/libvirt/qemu.d/50-gpuswitch|$hook
EOF
    files
    page_files "$COCKPIT"
}

# What a package adds: what its scripts call, and the hook, which they put in its place.
staged_files() {
    cat <<EOF
program|contrib/maintain.sh|$home/maintain
program|contrib/libvirt/qemu.d/50-gpuswitch|$home/libvirt-hook
EOF
    files
    page_files "$COCKPIT"
}

# fresh_page: whether the page was built from the sources that are here; a file that is gone counts, too.
fresh_page() { (cd "$source" && sha256sum --check --status "$page/.sources" 2>/dev/null); }

say() { printf '%s\n' "gpuswitch: $*"; }
die() { printf '%s\n' "cannot $*" >&2; exit 1; }

maintain() { "$source/contrib/maintain.sh" "$@"; }

# add_group: whose members may switch (units/org.gpuswitch1.rules). It stays when we go, as its number could be another's.
add_group() {
    if command -v systemd-sysusers >/dev/null; then
        systemd-sysusers "$base/lib/sysusers.d/gpuswitch.conf"
    else
        grep -q '^gpuswitch:' /etc/group || groupadd --system gpuswitch
    fi
}

# tell_system: journalctl, systemd and the bus read what has changed.
tell_system() {
    ! command -v journalctl >/dev/null || journalctl --update-catalog
    maintain has-systemd || return 0
    systemctl daemon-reload
    systemctl reload dbus.service
}

# missing_directories DIR: the manifest's lines for those of DIR and its parents that are not there.
missing_directories() {
    [ -d "$1" ] || { missing_directories "$(dirname "$1")" && printf 'directory %s\n' "$1"; }
}

# filled FILE SBIN HOOK: its text, with the places that this installation has.
filled() {
    sed "s|@sbindir@|$2|g; s|@bindir@|$PREFIX/bin|g; s|@datadir@|$PREFIX/share|g; s|@hook@|$3|g
        s|@proxmox_hook@|$(dirname "$3")/proxmox_hook.py|g; s|@slurm_hook@|$(dirname "$3")/slurm_hook.py|g" "$source/$1"
}

# put HOW FROM TO: one entry of the list; what was there is replaced in one instant.
put() {
    missing_directories "$(dirname "$3")" >>"$new/manifest"
    mkdir -p "$(dirname "$3")"
    prepared=$3.new
    case $1 in
    link) ln -sfn "$2" "$prepared" ;;
    copy) cp "$2" "$prepared" && chmod 0644 "$prepared" ;;
    file | program)
        filled "$2" "$PREFIX/sbin" "$current/hook.py" >"$prepared"
        chmod "$([ "$1" = program ] && echo 0755 || echo 0644)" "$prepared"
        ;;
    hook)
        prepared=$(dirname "$3").new # libvirt runs every program in the directory, whatever its name
        filled "$2" '' "$current/hook.py" >"$prepared"
        chmod 0755 "$prepared"
        ;;
    esac
    mv -fT "$prepared" "$3"
    printf 'file %s\n' "$3" >>"$new/manifest"
}

# put_documents: they are read by people alone, and need not be replaced in one instant.
put_documents() {
    documents | sed 's|[^/]*$||' | sort -u | while read -r folder; do
        folder=$doc${folder:+/${folder%/}}
        missing_directories "$folder" >>"$new/manifest"
        mkdir -p "$folder"
    done
    copy_documents "$doc"
    documents | sed "s|^|file $doc/|" >>"$new/manifest"
}

# remove MANIFEST: what it names goes, directories last and only where they are empty.
remove() {
    sed -n 's/^file //p' "$1" | while read -r path; do rm -f "$path"; done
    sed -n 's/^directory //p' "$1" | sort -r | while read -r path; do rmdir "$path" 2>/dev/null || :; done
}

# elsewhere: the PREFIX of another installation, with which this one would share units and files in /usr/share.
elsewhere() {
    for file in /usr/local/lib/systemd/system/$unit /usr/lib/systemd/system/$unit; do
        [ ! -e "$file" ] || sed -n 's|^ExecStart=\(/.*\)/sbin/gpuswitchd$|\1|p' "$file"
    done | grep -vxF "$PREFIX" || :
}

install() {
    [ ! -e "$package" ] || die "install: gpuswitch is here as a package ($package); remove that first"
    [ -z "$(elsewhere)" ] ||
        die "install in $PREFIX: gpuswitch is in $(elsewhere); 'make uninstall PREFIX=$(elsewhere)' takes that away"
    [ -z "$(maintain foreign-hook)" ] ||
        die "install: $hook is not ours, and libvirt's machines would get no GPU; move it to another name"
    "$source/contrib/need.sh" "$PYTHON" install
    if [ -z "$COCKPIT" ] && command -v cockpit-bridge >/dev/null; then
        if [ -e "$page/manifest.json" ]; then
            fresh_page || die "install: $page was built from other sources than are here; run 'make cockpit', or remove it"
            COCKPIT=$page
        else
            say "Cockpit is here: 'make cockpit' builds a page for it, and 'make install' puts that in its place then"
        fi
    fi
    old=$(readlink "$current" || :)
    missing=$(missing_directories "$home")
    mkdir -p "$home"
    new=$(mktemp -d "$home/XXXXXX")
    trap 'rm -rf "$new"' EXIT
    trap 'exit 1' HUP INT TERM
    chmod 0755 "$new"
    "$PYTHON" -m venv "$new"
    pip_install() { "$new/bin/pip" install --quiet --disable-pip-version-check "$@"; }
    pip_install --require-hashes --only-binary :all: --requirement "$source/contrib/requirements.lock"
    pip_install --require-hashes --only-binary :all: --requirement "$source/contrib/build.lock" --target "$new/build"
    PYTHONPATH=$new/build pip_install --no-deps --no-build-isolation "$source"
    rm -r "$new/build"
    "$new/bin/python" -I -c 'import gpuswitch.cli.main, gpuswitch.service, gpuswitch.daemon'
    for name in hook proxmox_hook slurm_hook; do
        file=$("$new/bin/python" -I -c "import gpuswitch.$name; print(gpuswitch.$name.__file__)")
        ln -s "$file" "$new/$name.py"
    done
    deaf=$(maintain deaf-libvirt)

    # From here on only short local writes.
    {
        [ -z "$old" ] || grep '^directory ' "$current/manifest" || :
        [ -z "$missing" ] || printf '%s\n' "$missing"
    } >"$new/manifest"
    installed_files | while IFS='|' read -r how from to; do put "$how" "$from" "$to"; done
    put_documents
    add_group
    if [ -n "$old" ]; then # what the old version had put elsewhere
        grep '^file ' "$current/manifest" | grep -vxFf "$new/manifest" >"$new/gone" || :
        remove "$new/gone"
        rm "$new/gone"
    fi
    ln -s "$(basename "$new")" "$current.new"
    mv -fT "$current.new" "$current"
    trap - EXIT

    tell_system
    if [ -z "$old" ]; then # once: an administrator's later `disable` outlives upgrades
        ! command -v systemctl >/dev/null || systemctl -q enable "$unit"
    elif maintain has-systemd; then
        systemctl try-restart "$unit" || die "restart $unit: see journalctl -u $unit"
    fi
    find "$home" -mindepth 1 -maxdepth 1 -type d ! -name "$(basename "$new")" -exec rm -rf {} +
    [ -z "$deaf" ] || say "$deaf"
    say "version $("$new/bin/python" -I -c 'import gpuswitch; print(gpuswitch.__version__)') is installed in $PREFIX"
}

uninstall() {
    [ ! -e "$package" ] || die "uninstall: gpuswitch is here as a package, too ($package); remove that first"
    [ -f "$current/manifest" ] || die "uninstall: there is no gpuswitch in $PREFIX"
    PATH=$PREFIX/bin:$PATH maintain before-removal
    ! command -v systemctl >/dev/null || systemctl -q disable "$unit"
    manifest=$(mktemp)
    cp "$current/manifest" "$manifest"
    rm -rf "$home"
    remove "$manifest"
    rm -f "$manifest"
    tell_system
    say "is removed from $PREFIX; /etc/gpuswitch, /var/lib/gpuswitch and the group gpuswitch stay"
}

stage() {
    [ -n "${DESTDIR:-}" ] || die "stage: DESTDIR is the folder to put the files in"
    [ -n "${HOOK:-}" ] || die "stage: HOOK is the path that gpuswitch/hook.py will have"
    staged_files | while IFS='|' read -r how from to; do
        mkdir -p "$(dirname "$DESTDIR$to")"
        if [ "$how" = copy ]; then
            cp "$from" "$DESTDIR$to"
        else
            filled "$from" "$PREFIX/bin" "$HOOK" >"$DESTDIR$to"
        fi
        chmod "$([ "$how" = program ] && echo 0755 || echo 0644)" "$DESTDIR$to"
    done
    copy_documents "$DESTDIR$doc"
}

[ -z "$COCKPIT" ] || [ -e "$COCKPIT/manifest.json" ] ||
    die "${1:-install}: '$COCKPIT' has no page for Cockpit; 'make cockpit' builds it"
[ "${1:-}" = stage ] || [ "$(id -u)" -eq 0 ] || die "${1:-install}: this writes to the system; run it as root"
case $PREFIX in
/*) ;;
*) die "install in '$PREFIX': PREFIX is an absolute path" ;;
esac
umask 022
case ${1:-} in
install) install ;;
uninstall) uninstall ;;
stage) stage ;;
*) die "do '${1:-}': use install, uninstall or stage" ;;
esac
