# Written by "gpuswitchctl setup boot"; "gpuswitchctl setup boot undo" takes it back.
# Puts bind.sh and what it loads into the initrd (mkinitcpio(8)): for init of busybox by an early hook, and for systemd
# by a unit before udev. Never run.

build() {
    local unit=/usr/lib/systemd/system/gpuswitch-early.service

    add_module vfio_pci
    add_module vfio_iommu_type1
    add_file /etc/initcpio/gpuswitch.sh /usr/lib/gpuswitch/bind.sh 755
    add_runscript
    add_file - "$unit" 644 <<'UNIT'
[Unit]
Description=GPUs to vfio-pci
DefaultDependencies=no
Before=systemd-udevd.service

[Service]
Type=oneshot
ExecStart=/bin/sh /usr/lib/gpuswitch/bind.sh
UNIT
    add_symlink /usr/lib/systemd/system/sysinit.target.wants/gpuswitch-early.service "$unit"
}

help() {
    echo "Gives GPUs to vfio-pci before udev starts (gpuswitchctl setup boot)."
}
