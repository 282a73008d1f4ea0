"""What the operations share: attributes read and written in one go, names that may become part of a path, failures."""

import errno
import os

_HEX = frozenset("0123456789abcdef")
_NAME = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-")


class OperationError(Exception):
    """The operation failed on `subject`: the kernel's errno, and what there is to say about it."""

    def __init__(self, number: int, subject: str, text: str) -> None:
        super().__init__(text)
        self.number = number
        self.subject = subject
        self.text = text


def failure(error: OSError, subject: str, meanings: dict[int, str] | None = None) -> OperationError:
    """What the kernel said; in the words of the operation where it has its own."""
    number = error.errno or errno.EIO
    return OperationError(number, subject, (meanings or {}).get(number) or os.strerror(number))


def checked_address(text: str) -> str:
    """A PCI address as sysfs spells it, and nothing else: it becomes part of a path."""
    if not is_address(text):
        raise OperationError(errno.EINVAL, text, "this is not a PCI address")
    return text


def is_address(text: str) -> bool:
    domain, _, rest = text.partition(":")
    bus, _, rest = rest.partition(":")
    slot, _, function = rest.partition(".")
    right = len(domain) in range(4, 9) and len(bus) == 2 and len(slot) == 2 and len(function) == 1
    return right and _HEX.issuperset(domain + bus + slot) and slot[0] in "01" and function in "01234567"


def checked_name(text: str) -> str:
    """The name of a driver or module: it becomes part of a path, or an argument of modprobe."""
    if not is_name(text) or text.startswith("-"):
        raise OperationError(errno.EINVAL, text, "this is not a driver's or a module's name")
    return text


def is_name(text: str) -> bool:
    return bool(text) and _NAME.issuperset(text)


def checked_number(text: str, what: str) -> str:
    if not is_number(text):
        raise OperationError(errno.EINVAL, text, f"this is not the number of {what}")
    return text


def is_number(text: str) -> bool:
    return text.isascii() and text.isdigit()


def write(path: str, value: str) -> None:
    """One write of the whole value, as sysfs wants it; never creates a file."""
    descriptor = os.open(path, os.O_WRONLY | os.O_NOFOLLOW)
    try:
        os.write(descriptor, value.encode())
    finally:
        os.close(descriptor)


def raw(path: str) -> bytes:
    """All of it, as sysfs gives it in one read: a page at most."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        return os.read(descriptor, 4096)
    finally:
        os.close(descriptor)


def read(path: str) -> str:
    """The first line."""
    return raw(path).decode(errors="replace").partition("\n")[0]


def contents(path: str) -> str:
    """A first line, "" where there is no such file."""
    try:
        return read(path)
    except FileNotFoundError:
        return ""


def names(folder: str) -> list[str]:
    """The names in a folder, in order; none where there is no such folder."""
    try:
        return sorted(os.listdir(folder))  # noqa: PTH208 - pathlib would double the time that the worker takes to start
    except FileNotFoundError:
        return []


def link(path: str) -> str:
    """The name that a link points to, "" where there is no such link."""
    try:
        return last(os.readlink(path))  # noqa: PTH115 - as above
    except FileNotFoundError:
        return ""


def last(path: str) -> str:
    return path.rpartition("/")[2]


def there(path: str) -> bool:
    return os.access(path, os.F_OK)
