r"""The worker: a small program that does one GPU's kernel operations, one at a time, each of which may block for ever.

Run as `python -ISE worker_main.py SYSFS DEV TOOLS GPU` with a SOCK_SEQPACKET socket as its standard input. One
message is one request, `NUMBER \0 OPERATION \0 ARGUMENT...`, answered by one message: `NUMBER \0 ok \0 VALUE...` or
`NUMBER \0 error \0 ERRNO \0 SUBJECT \0 TEXT`. It ends at end-of-file, that is when the daemon let it go or died.
TOOLS are the folders where modprobe may live, joined by colons; GPU is there for the person who reads `ps`.

It imports next to nothing, since its start-up is part of the first switch: `re` alone would double it, so addresses and
names are checked by hand here. They are checked although the daemon did so: this is the process that writes.
"""

import errno
import os
import sys

LONGEST_REQUEST = 65536
_HEX = frozenset("0123456789abcdef")
_NAME = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-")
_MODPROBE_ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"}
# How people say in modprobe.d that a module must not be loaded, where a `blacklist` line is not strong enough.
_NEVER = frozenset({"true", "false", ":"})


class OperationError(Exception):
    """The operation failed on `subject`: the kernel's errno, and what there is to say about it."""

    def __init__(self, number: int, subject: str, text: str) -> None:
        super().__init__(text)
        self.number = number
        self.subject = subject
        self.text = text


class Worker:
    """The operations. Each public method is one, takes its arguments as text, and returns its values as text."""

    def __init__(self, sysfs: str, dev: str, tools: str) -> None:
        self._sysfs = sysfs
        self._dev = dev
        self._tools = tools.split(":")
        self._groups: dict[str, int] = {}

    def capture(self, *addresses: str) -> list[str]:
        """Four values for each function: driver, its module, driver_override, power/control; "" for none.

        driver_override comes first: on 6.1 reading it takes the device lock (driver_override_show in
        drivers/pci/pci-sysfs.c), so a bind or unbind that was under way is over before the driver link is read. On
        6.12 it does not; there the first write to power/control waits, and a function whose unbind by somebody else
        hangs counts as driverless, which it is about to be.
        """
        values = []
        for address in addresses:
            override = self._read(address, "driver_override")
            control = self._read(address, "power/control")
            driver = _link(f"{self._device(address)}/driver")
            module = _link(f"{self._sysfs}/bus/pci/drivers/{driver}/module") if driver else ""
            # A module that is built in has a folder too, but was never initialised from a file.
            if module and not _there(f"{self._sysfs}/module/{module}/initstate"):
                module = ""
            values += [driver, module, "" if override == "(null)" else override, control]
        return values

    def candidates(self, address: str) -> list[str]:
        """Modules for the function's modalias, as `modprobe` itself resolves it, minus vfio's and barred ones.

        `modprobe -R` looks an alias up and prints every match, blacklisted or not: it returns before the flag of `-b`
        is used (insmod_insert in kmod's tools/modprobe.c). `-D -b` shows what a load would do, and obeys both.
        """
        modalias = self._read(address, "modalias")
        if not modalias.startswith("pci:") or not modalias[4:].isalnum():
            raise OperationError(errno.EINVAL, address, f"its modalias {modalias!r} is not a PCI alias")
        status, lines = self._modprobe(address, "-R", modalias)
        if status:
            if lines and "not found in directory" in lines[-1]:
                return []
            raise _modprobe_failure(address, status, lines)
        found = [line for line in lines if line and _NAME.issuperset(line) and "vfio" not in line]
        return [name for name in dict.fromkeys(found) if self._loadable(address, name)]

    def load(self, module: str) -> list[str]:
        """`modprobe MODULE`, unless it is there already."""
        _checked_name(module)
        if _contents(f"{self._sysfs}/module/{module.replace('-', '_')}/initstate") == "live":
            return []
        status, lines = self._modprobe(module, module)
        if status:
            raise _modprobe_failure(module, status, lines)
        return []

    def power(self, *pairs: str) -> list[str]:
        """ADDRESS VALUE pairs: power/control of each function."""
        for address, value in _pairs(pairs):
            if value not in {"auto", "on"}:
                raise OperationError(errno.EINVAL, address, f"power/control has no value {value!r}")
            self._write(address, "power/control", value)
        return []

    def awake(self, *addresses: str) -> list[str]:
        """Forbid runtime suspend, which resumes synchronously, and see that it did.

        pm_runtime_forbid in drivers/base/power/runtime.c calls rpm_resume and drops its result, so the state has to be
        looked at. `unsupported`: no runtime power management, and so nothing that could put the device to sleep.
        """
        for address in addresses:
            self._write(address, "power/control", "on")
            status = self._read(address, "power/runtime_status")
            if status not in {"active", "unsupported"}:
                raise OperationError(errno.EIO, address, f"it is {status} although power/control is on")
        return []

    def override(self, *pairs: str) -> list[str]:
        """ADDRESS DRIVER pairs; "" clears by a newline, since the kernel ignores an empty write."""
        for address, driver in _pairs(pairs):
            self._write(address, "driver_override", _checked_name(driver) if driver else "\n")
        return []

    def unbind(self, address: str, driver: str) -> list[str]:
        """Through the driver's own folder: there the kernel checks that the function is bound to it."""
        _checked_address(address)
        path = f"{self._sysfs}/bus/pci/drivers/{_checked_name(driver)}/unbind"
        try:
            _write(path, address)
        except FileNotFoundError:
            raise OperationError(errno.ENODEV, address, f"there is no driver {driver}") from None
        except OSError as error:
            raise _failure(error, address, {errno.ENODEV: f"it is not bound to {driver}"}) from None
        return []

    def probe(self, address: str) -> list[str]:
        """Let the drivers look at the function; the kernel says EINVAL for whatever a driver's probe failed with."""
        try:
            _write(f"{self._sysfs}/bus/pci/drivers_probe", _checked_address(address))
        except OSError as error:
            meanings = {errno.ENODEV: "it is not on the PCI bus", errno.EINVAL: "its driver could not take it"}
            raise _failure(error, address, meanings) from None
        return []

    def hold(self, group: str) -> list[str]:
        """Open /dev/vfio/GROUP; kept until `release`, or until this process ends."""
        if not (group.isascii() and group.isdigit()):
            raise OperationError(errno.EINVAL, group, "this is not the number of an IOMMU group")
        if group not in self._groups:
            try:
                self._groups[group] = os.open(f"{self._dev}/vfio/{group}", os.O_RDWR | os.O_NOFOLLOW)
            except OSError as error:
                raise _failure(error, f"/dev/vfio/{group}", {errno.EBUSY: "somebody else has it open"}) from None
        return []

    def release(self, group: str) -> list[str]:
        descriptor = self._groups.pop(group, None)
        if descriptor is not None:
            os.close(descriptor)
        return []

    def _device(self, address: str) -> str:
        return f"{self._sysfs}/bus/pci/devices/{_checked_address(address)}"

    def _read(self, address: str, attribute: str) -> str:
        try:
            return _read(f"{self._device(address)}/{attribute}")
        except OSError as error:
            raise self._attribute_failure(error, address, attribute) from None

    def _write(self, address: str, attribute: str, value: str) -> None:
        try:
            _write(f"{self._device(address)}/{attribute}", value)
        except OSError as error:
            raise self._attribute_failure(error, address, attribute) from None

    def _attribute_failure(self, error: OSError, address: str, attribute: str) -> OperationError:
        """A missing file: either the device is gone, or this kernel has no such attribute."""
        if error.errno != errno.ENOENT:
            return _failure(error, address)
        if _there(self._device(address)):
            return OperationError(errno.ENOENT, address, f"it has no {attribute}")
        return OperationError(errno.ENODEV, address, "it is not on the PCI bus")

    def _loadable(self, subject: str, module: str) -> bool:
        status, lines = self._modprobe(subject, "-D", "-b", module)
        if status:
            return False
        for line in lines:
            kind, _, rest = line.strip().partition(" ")
            name = _last(rest.split(" ")[0])
            if kind == "install":
                return name not in _NEVER
            if kind in {"insmod", "builtin"} and name.partition(".ko")[0].replace("-", "_") == module:
                return True
        return False

    def _modprobe(self, subject: str, *arguments: str) -> tuple[int, list[str]]:
        """Exit status and output lines. The output goes to memory, so that nobody who keeps it open is waited for."""
        program = next((p for t in self._tools if os.access(p := f"{t}/modprobe", os.X_OK)), None)
        if program is None:
            raise OperationError(errno.ENOENT, subject, f"there is no modprobe in {':'.join(self._tools)}")
        output = os.memfd_create("modprobe")
        try:
            actions = [
                (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0),
                (os.POSIX_SPAWN_DUP2, output, 1),
                (os.POSIX_SPAWN_DUP2, output, 2),
            ]
            pid = os.posix_spawn(program, ["modprobe", *arguments], _MODPROBE_ENVIRONMENT, file_actions=actions)
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            return status, os.pread(output, LONGEST_REQUEST, 0).decode(errors="replace").split("\n")[:-1]
        finally:
            os.close(output)


def _checked_address(text: str) -> str:
    """A PCI address as sysfs spells it, and nothing else: it becomes part of a path."""
    domain, _, rest = text.partition(":")
    bus, _, rest = rest.partition(":")
    slot, _, function = rest.partition(".")
    right = len(domain) in range(4, 9) and len(bus) == 2 and len(slot) == 2 and len(function) == 1
    if not (right and _HEX.issuperset(domain + bus + slot) and slot[0] in "01" and function in "01234567"):
        raise OperationError(errno.EINVAL, text, "this is not a PCI address")
    return text


def _checked_name(text: str) -> str:
    """The name of a driver or module: it becomes part of a path, or an argument of modprobe."""
    if not text or text.startswith("-") or not _NAME.issuperset(text):
        raise OperationError(errno.EINVAL, text, "this is not a driver's or a module's name")
    return text


def _pairs(values: tuple[str, ...]) -> list[tuple[str, str]]:
    return list(zip(values[::2], values[1::2], strict=True))


def _write(path: str, value: str) -> None:
    """One write of the whole value, as sysfs wants it; never creates a file."""
    descriptor = os.open(path, os.O_WRONLY | os.O_NOFOLLOW)
    try:
        os.write(descriptor, value.encode())
    finally:
        os.close(descriptor)


def _read(path: str) -> str:
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        return os.read(descriptor, 4096).decode(errors="replace").partition("\n")[0]
    finally:
        os.close(descriptor)


def _contents(path: str) -> str:
    """A first line, "" where there is no such file."""
    try:
        return _read(path)
    except FileNotFoundError:
        return ""


def _link(path: str) -> str:
    """The name that a link points to, "" where there is no such link."""
    try:
        return _last(os.readlink(path))  # noqa: PTH115 - pathlib would double the time that this program takes to start
    except FileNotFoundError:
        return ""


def _last(path: str) -> str:
    return path.rpartition("/")[2]


def _there(path: str) -> bool:
    return os.access(path, os.F_OK)


def _failure(error: OSError, subject: str, meanings: dict[int, str] | None = None) -> OperationError:
    """What the kernel said; in the words of the operation where it has its own."""
    number = error.errno or errno.EIO
    return OperationError(number, subject, (meanings or {}).get(number) or os.strerror(number))


def _modprobe_failure(subject: str, status: int, lines: list[str]) -> OperationError:
    """It ends with 1 whatever went wrong; modprobe's last line ends with the kernel's own words."""
    last = lines[-1] if lines else "it said nothing"
    words = last.rpartition(": ")[2]
    number = next((n for n in errno.errorcode if os.strerror(n) == words), errno.EIO)
    if "not found in directory" in last:
        number = errno.ENOENT
    return OperationError(number, subject, f"modprobe ended with status {status}: {last}")


_OPERATIONS = frozenset(name for name in vars(Worker) if not name.startswith("_"))


def answer(worker: Worker, request: bytes) -> bytes:
    """The reply to one request."""
    number, _, rest = request.decode().partition("\0")
    operation, *arguments = rest.split("\0")
    if operation not in _OPERATIONS:
        return "\0".join([number, "error", str(errno.EINVAL), operation, "the worker knows no such operation"]).encode()
    try:
        return "\0".join([number, "ok", *getattr(worker, operation)(*arguments)]).encode()
    except OperationError as failure:
        return "\0".join([number, "error", str(failure.number), failure.subject, failure.text]).encode()
    except OSError as error:
        subject = arguments[0] if arguments else operation
        return "\0".join([number, "error", str(error.errno or errno.EIO), subject, str(error)]).encode()


def main() -> None:
    worker = Worker(*sys.argv[1:4])
    while request := os.read(0, LONGEST_REQUEST):
        reply = answer(worker, request)
        try:
            os.write(0, reply)
        except BrokenPipeError:  # the daemon went away while the kernel had this operation
            return


if __name__ == "__main__":
    main()
