# Written by "gpuswitchctl setup boot"; "gpuswitchctl setup boot undo" takes it back.
#
# Runs in the initrd, before udev: gives PCI functions to vfio-pci, so that no host driver touches them. A GPU of which
# anything is not as it was then is left to its host drivers, and the kernel's log says why. With gpuswitch.early=off on
# the kernel's command line nothing is done. dracut reads this into a shell of its own: hence the parentheses.

[ "${1:-}" != prereqs ] || exit 0

(
    found=

    say() { echo "<5>gpuswitch: $*" >/dev/kmsg; }

    # is PATH VENDOR DEVICE: whether that is there, below /sys/devices, and no driver has it
    is() {
        vendor=no device=device driver=
        [ ! -e "/sys/devices/$1/vendor" ] || read -r vendor <"/sys/devices/$1/vendor"
        [ ! -e "/sys/devices/$1/device" ] || read -r device <"/sys/devices/$1/device"
        if [ "$vendor $device" != "$2 $3" ]; then
            say "at $1 is $vendor $device, and not $2 $3"
            return 1
        fi
        [ -e "/sys/devices/$1/driver" ] || return 0
        driver=$(cd -P "/sys/devices/$1/driver" && pwd)
        say "${1##*/} has the driver ${driver##*/} already"
        return 1
    }

    # is_dark PATH: whether the machine did not boot on it
    is_dark() {
        boot_vga=0
        [ ! -e "/sys/devices/$1/boot_vga" ] || read -r boot_vga <"/sys/devices/$1/boot_vga"
        [ "$boot_vga" != 1 ] || say "${1##*/} is the display that this machine booted on"
        [ "$boot_vga" != 1 ]
    }

    take() {
        echo vfio-pci >"/sys/devices/$1/driver_override"
        found="$found $1"
    }

    leave() { say "$1 is left to its host drivers; to set it up anew: gpuswitchctl setup boot"; }

    read -r options </proc/cmdline
    case " $options " in
    *" gpuswitch.early=off "*) say "nothing is bound: gpuswitch.early=off" ;;
    *)
@GPUS@
        ;;
    esac

    if [ -n "$found" ]; then
        # By its place: a shell of busybox would take its own, which does not unpack modules.
        modprobe=/usr/lib/gpuswitch/modprobe
        [ -x "$modprobe" ] || modprobe=/sbin/modprobe
        "$modprobe" vfio-pci || say "cannot load vfio-pci"
        for path in $found; do
            address=${path##*/}
            [ -e "/sys/devices/$path/driver" ] || echo "$address" >/sys/bus/pci/drivers_probe
            if [ -e "/sys/bus/pci/drivers/vfio-pci/$address" ]; then
                say "$address is on vfio-pci"
            else
                say "$address could not be bound to vfio-pci, and has no driver"
            fi
        done
    fi
)
