#!/bin/sh
# The bare sysfs writes of a switch, and nothing else: no look at holders, no verification, no way back. It is the
# floor that a switch's time is measured against.
#
#   bare_writes.sh to-vfio|to-host FUNCTION...        full addresses, the display function first
set -eu

target=$1
shift
bus=/sys/bus/pci

case $target in
to-vfio)
    modprobe vfio-pci
    # on all functions first: a driver that loads meanwhile must find no function free
    for function; do echo vfio-pci >"$bus/devices/$function/driver_override"; done
    ;;
to-host)
    # an empty write does nothing; a newline clears
    for function; do echo >"$bus/devices/$function/driver_override"; done
    ;;
*)
    echo "bare_writes.sh: cannot go to '$target': it is to-vfio or to-host" >&2
    exit 2
    ;;
esac
for function; do echo "$function" >"$bus/devices/$function/driver/unbind"; done
for function; do echo "$function" >"$bus/drivers_probe"; done
