"""Another process, for the contract on a real kernel: has something open until its standard input ends.

`other.py open PATH`, or `other.py vm GROUP ADDRESS...` for what QEMU does to give a group to a VM. Says `ok`, or the
errno that it got.
"""

import fcntl
import os
import sys

# include/uapi/linux/vfio.h: _IO(';', 100 + n)
VFIO_SET_IOMMU, VFIO_GROUP_SET_CONTAINER, VFIO_GROUP_GET_DEVICE_FD = 0x3B66, 0x3B68, 0x3B6A
VFIO_TYPE1V2_IOMMU = 3


def start_vm(group: str, addresses: list[str]) -> None:
    container = os.open("/dev/vfio/vfio", os.O_RDWR)
    descriptor = os.open(f"/dev/vfio/{group}", os.O_RDWR)
    fcntl.ioctl(descriptor, VFIO_GROUP_SET_CONTAINER, container.to_bytes(4, sys.byteorder))
    fcntl.ioctl(container, VFIO_SET_IOMMU, VFIO_TYPE1V2_IOMMU)
    for address in addresses:
        fcntl.ioctl(descriptor, VFIO_GROUP_GET_DEVICE_FD, address.encode() + b"\0")


def main() -> None:
    try:
        if sys.argv[1] == "vm":
            start_vm(sys.argv[2], sys.argv[3:])
        else:
            os.open(sys.argv[2], os.O_RDWR)
    except OSError as error:
        sys.stdout.write(f"{error.errno}\n")
        return
    sys.stdout.write("ok\n")
    sys.stdout.flush()
    sys.stdin.read()


if __name__ == "__main__":
    main()
