#!/bin/sh
# Sees to it that this machine has what a make target needs beside git, make and python3.
#
#   need.sh PYTHON develop|test|dbus-daemon|dbus-broker|install|system|cockpit|vm
#
# Nothing missing: says nothing. As root on Debian: installs the missing packages. Otherwise: prints the one
# line to run, and fails. It goes to the network only when something is missing.
set -eu

python=$1
purpose=$2

# One line for each need: the Debian package that brings it|a command that succeeds where it is present.
needs() {
    cat <<EOF
python3|command -v $python
python3-venv|! command -v $python || $python -c 'import ensurepip, venv'
EOF
    case $purpose in
    install) ;;
    develop)
        cat <<EOF
dbus-daemon|command -v dbus-daemon
EOF
        ;;
    test)
        cat <<EOF
dbus-daemon|command -v dbus-daemon
dbus-bin|test -x /usr/bin/dbus-send
prometheus|command -v promtool
openssl|command -v openssl
bash-completion|test -e /usr/share/bash-completion/bash_completion
zsh|command -v zsh
fish|command -v fish
man-db|command -v man
groff-base|command -v groff
mandoc|command -v mandoc
jq|command -v jq
desktop-file-utils|command -v desktop-file-validate
kubernetes-client|command -v kubectl
EOF
        ;;
    dbus-daemon) ;; # what `test` needs is enough
    dbus-broker)
        cat <<EOF
mmdebstrap|command -v mmdebstrap
EOF
        ;;
    system)
        cat <<EOF
dbus-daemon|command -v dbus-daemon
mmdebstrap|command -v mmdebstrap
openssl|command -v openssl
iproute2|command -v ip
EOF
        ;;
    cockpit)
        cat <<EOF
nodejs|command -v node
npm|command -v npm
EOF
        ;;
    vm)
        cat <<EOF
dbus-daemon|command -v dbus-daemon
qemu-system-x86|command -v qemu-system-x86_64
qemu-utils|command -v qemu-img
mmdebstrap|command -v mmdebstrap
e2fsprogs|command -v mke2fs
EOF
        ;;
    *)
        echo "need.sh: cannot tell what '$purpose' needs: use develop, test, dbus-daemon, dbus-broker, install, system, cockpit or vm" >&2
        exit 2
        ;;
    esac
}

needs >/dev/null # ends here where nobody knows the purpose

missing() {
    needs | while IFS='|' read -r package check; do
        sh -c "$check" >/dev/null 2>&1 || printf '%s ' "$package"
    done
}

PATH=$PATH:/usr/sbin:/sbin # where Debian keeps mke2fs and depmod, also for those who are not root

packages=$(missing)
if [ -n "$packages" ]; then
    line="apt-get install --no-install-recommends ${packages% }"
    if ! command -v apt-get >/dev/null; then
        echo "cannot go on without these (Debian's names): ${packages% }; install them with your package manager" >&2
        exit 1
    elif [ "$(id -u)" -ne 0 ]; then
        echo "cannot go on without ${packages% }; run: sudo $line" >&2
        exit 1
    fi
    echo "installing Debian packages: ${packages% }"
    export DEBIAN_FRONTEND=noninteractive
    apt-get -q -o DPkg::Lock::Timeout=300 update
    # shellcheck disable=SC2086 # one word for each package
    apt-get -q -y -o DPkg::Lock::Timeout=300 install --no-install-recommends $packages
    packages=$(missing)
    if [ -n "$packages" ]; then
        echo "cannot go on: still missing after the installation: ${packages% } (python is $(command -v "$python"))" >&2
        exit 1
    fi
fi

if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "cannot use $python: it is older than Python 3.11; name a newer one: make PYTHON=python3.11" >&2
    exit 1
fi
