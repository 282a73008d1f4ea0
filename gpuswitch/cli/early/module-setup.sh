# Written by "gpuswitchctl setup boot"; "gpuswitchctl setup boot undo" takes it back.
# A module of dracut's (dracut.modules(7)): puts bind.sh and what it loads into the initrd.

check() {
    return 0
}

depends() {
    return 0
}

installkernel() {
    # Whatever this machine has loaded now.
    hostonly='' instmods vfio_pci vfio_iommu_type1
}

install() {
    inst_hook pre-udev 00 "${moddir:?}/gpuswitch.sh"
    # With busybox in the initrd, /sbin/modprobe is one of its programs, which does not unpack modules.
    inst "$(command -v kmod)" /usr/lib/gpuswitch/modprobe
}
