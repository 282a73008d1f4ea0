r"""The worker: a small program that does one GPU's kernel operations, one at a time, each of which may block for ever.

Run as `python -ISE worker_main.py SYSFS DEV IOMEM TOOLS GPU ROLE` with a SOCK_SEQPACKET socket as its standard input.
One message is one request, `NUMBER \0 OPERATION \0 ARGUMENT...`, answered by one message: `NUMBER \0 ok \0 VALUE...` or
`NUMBER \0 error \0 ERRNO \0 SUBJECT \0 TEXT`, SUBJECT empty where the worker cannot tell. It ends at end-of-file, that
is when the daemon let it go or died.
TOOLS are the folders where modprobe may live, joined by colons; GPU and ROLE are there for the person who reads `ps`.
"""

import errno
import os
import sys

# The options leave out every folder but the standard library's. Ours comes last, so that nothing beside it hides that.
sys.path.append(__file__.rsplit("/", 4)[0])

from gpuswitch.host.linux.operations.buses import Buses
from gpuswitch.host.linux.operations.consoles import Consoles
from gpuswitch.host.linux.operations.files import OperationError
from gpuswitch.host.linux.operations.functions import Functions
from gpuswitch.host.linux.operations.modules import Modules

LONGEST_REQUEST = 65536


def answer(parts: tuple[object, ...], request: bytes) -> bytes:
    """The reply to one request. The public methods of the parts are the operations."""
    number, _, rest = request.decode().partition("\0")
    operation, *arguments = rest.split("\0")
    part = next((part for part in parts if operation in vars(type(part)) and not operation.startswith("_")), None)
    if part is None:
        return "\0".join([number, "error", str(errno.EINVAL), operation, "the worker knows no such operation"]).encode()
    try:
        return "\0".join([number, "ok", *getattr(part, operation)(*arguments)]).encode()
    except OperationError as failure:
        return "\0".join([number, "error", str(failure.number), failure.subject, failure.text]).encode()
    except OSError as error:
        return "\0".join([number, "error", str(error.errno or errno.EIO), "", str(error)]).encode()


def main() -> None:
    sysfs, dev, iomem, tools = sys.argv[1:5]
    parts = (Functions(sysfs, dev), Buses(sysfs), Modules(sysfs, tools), Consoles(sysfs, dev, iomem))
    try:
        while request := os.read(0, LONGEST_REQUEST):
            os.write(0, answer(parts, request))
    except ConnectionError:  # the daemon died: with an answer unread, or while the kernel had an operation
        return


if __name__ == "__main__":
    main()
