# Written by "gpuswitchctl setup boot"; "gpuswitchctl setup boot undo" takes it back.
# Puts what scripts/init-top/gpuswitch loads into the initrd (initramfs-tools(7)).

[ "${1:-}" != prereqs ] || exit 0

. /usr/share/initramfs-tools/hook-functions
manual_add_modules vfio_pci vfio_iommu_type1
