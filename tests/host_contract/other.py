"""Another process, for the contract on a real kernel: has something open until its standard input ends.

`other.py open PATH`; `other.py map PATH`, which maps a page of it and closes it; `other.py hide PATH`, which sends the
descriptor to itself, takes it from nowhere, and closes its own; `other.py vm GROUP ADDRESS...` for what QEMU does to
give a group to a VM. Says `ok`, or the errno that it got. A line on its standard input makes it close what `open` has
opened, and say `ok` again.
"""

import ctypes
import fcntl
import mmap
import os
import socket
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


def map_page(descriptor: int) -> None:
    """By the C library: Python's mmap keeps a descriptor of its own."""
    library = ctypes.CDLL(None, use_errno=True)
    library.mmap.restype = ctypes.c_void_p
    library.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    if library.mmap(None, mmap.PAGESIZE, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, 0) == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), "mmap")


def take(verb: str, path: str) -> int:
    """Have it in the way of the verb; returns the descriptor that it was opened as."""
    descriptor = os.open(path, os.O_RDWR)
    if verb == "map":
        map_page(descriptor)
    elif verb == "hide":
        here, there = socket.socketpair()
        socket.send_fds(here, [b"take it"], [descriptor])
        here.detach()
        there.detach()
    if verb != "open":
        os.close(descriptor)
    return descriptor


def say(text: object) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def main() -> None:
    descriptor = -1
    try:
        if sys.argv[1] == "vm":
            start_vm(sys.argv[2], sys.argv[3:])
        else:
            descriptor = take(sys.argv[1], sys.argv[2])
    except OSError as error:
        say(error.errno)
        return
    say("ok")
    while sys.stdin.readline():
        os.close(descriptor)
        say("ok")


if __name__ == "__main__":
    main()
