"""Operations on the text consoles: which frame buffer shows which, and whether frame buffers show them at all."""

import errno
import os
import sys
from fcntl import ioctl

from gpuswitch.host.linux.framebuffers import function_of
from gpuswitch.host.linux.operations.files import (
    OperationError,
    checked_number,
    contents,
    failure,
    is_address,
    is_number,
    link,
    names,
    read,
    write,
)

# include/uapi/linux/fb.h: struct fb_con2fbmap {__u32 console, framebuffer}
_FBIOGET_CON2FBMAP = 0x460F
_FBIOPUT_CON2FBMAP = 0x4610
_WORD = 4
_TERMINALS = range(1, 64)  # include/uapi/linux/vt.h: MAX_NR_CONSOLES
_NO_FRAME_BUFFER = 0xFFFFFFFF  # con2fb_map[] has -1 there


class Consoles:
    """`iomem` is /proc/iomem."""

    def __init__(self, sysfs: str, dev: str, iomem: str) -> None:
        self._sysfs = sysfs
        self._dev = dev
        self._iomem = iomem

    def consoles(self) -> list[str]:
        """KIND NAME VALUE: `fb NUMBER ADDRESS` ("" for none), `vt NUMBER FRAME_BUFFER`, `vtcon NAME 0|1`.

        Where frame buffers show no text the map says nothing, whatever the kernel has left in it.
        """
        numbers = self._frame_buffers()
        bound = self._bound() if numbers else {}
        values = []
        for number in numbers:
            values += ["fb", number, self._function(number)]
        for name, state in bound.items():
            values += ["vtcon", name, state]
        if "1" not in bound.values():
            return values
        descriptor = self._open(numbers)
        try:
            for terminal in _TERMINALS:
                shown_on = _shown_on(descriptor, terminal)
                if shown_on != _NO_FRAME_BUFFER:
                    values += ["vt", str(terminal), str(shown_on)]
        except OSError as error:
            raise failure(error, "/dev/fb") from None
        finally:
            os.close(descriptor)
        return values

    def map_consoles(self, frame_buffer: str, *terminals: str) -> list[str]:
        """Through the frame buffer's own node, so that no other one is opened, and its driver's module used.

        Where frame buffers show no text, the kernel would let this one show all terminals (set_con2fb_map in
        drivers/video/fbdev/core/fbcon.c), so it is not asked.
        """
        checked_number(frame_buffer, "a frame buffer")
        wanted = [int(checked_number(terminal, "a virtual terminal")) for terminal in terminals]
        descriptor = self._open([frame_buffer])
        try:
            if "1" not in self._bound().values():
                raise OperationError(errno.ENODEV, f"/dev/fb{frame_buffer}", "no frame buffer device is bound")
            for terminal in wanted:
                # A repeated mapping is harmless, but redraws the screen.
                if _shown_on(descriptor, terminal) != int(frame_buffer):
                    ioctl(descriptor, _FBIOPUT_CON2FBMAP, _words(terminal, int(frame_buffer)))
        except OSError as error:
            raise failure(error, f"/dev/fb{frame_buffer}") from None
        finally:
            os.close(descriptor)
        return []

    def bind_console(self, vtconsole: str, wanted: str) -> list[str]:
        """The write always succeeds (store_bind in drivers/tty/vt/vt.c), so what it did is looked at."""
        if not vtconsole.startswith("vtcon") or not is_number(vtconsole[5:]) or wanted not in {"0", "1"}:
            raise OperationError(errno.EINVAL, vtconsole, "this is not a console driver")
        attribute = f"{self._sysfs}/class/vtconsole/{vtconsole}/bind"
        try:
            if read(attribute) == wanted:
                return []
            write(attribute, wanted)
            if read(attribute) != wanted:
                text = f"it stays {'unbound' if wanted == '1' else 'bound'}"
                raise OperationError(errno.EIO, vtconsole, text)
        except FileNotFoundError:
            raise OperationError(errno.ENOENT, vtconsole, "there is no such console driver") from None
        return []

    def _frame_buffers(self) -> list[str]:
        """Numbers, in order."""
        found = (name[2:] for name in names(f"{self._sysfs}/class/graphics") if name.startswith("fb"))
        return sorted(filter(is_number, found), key=int)

    def _bound(self) -> dict[str, str]:
        """Whether each console driver that shows text on frame buffers is bound: 1 or 0."""
        folder = f"{self._sysfs}/class/vtconsole"
        found = [name for name in names(folder) if "frame buffer device" in contents(f"{folder}/{name}/name")]
        return {name: contents(f"{folder}/{name}/bind") for name in found}

    def _function(self, number: str) -> str:
        """Whose it is: a driver of the PCI function made it, or the boot's own driver for it."""
        device = link(f"{self._sysfs}/class/graphics/fb{number}/device")
        if is_address(device):
            return device
        platform = f"{self._sysfs}/bus/platform/devices/{device}"
        return function_of(platform, link(f"{platform}/driver"), self._iomem)

    def _open(self, numbers: list[str]) -> int:
        """The first of these frame buffers that can be opened: any of them answers for the whole map."""
        refused = None
        for number in numbers:
            node = f"{self._dev}/fb{number}"
            try:
                return os.open(node, os.O_RDONLY | os.O_NOFOLLOW)
            except OSError as error:
                refused = refused or failure(error, f"/dev/fb{number}")
        raise refused or OperationError(errno.ENODEV, "/dev/fb", "there is no frame buffer")


def _shown_on(descriptor: int, terminal: int) -> int:
    answer = ioctl(descriptor, _FBIOGET_CON2FBMAP, _words(terminal, 0))
    return int.from_bytes(answer[_WORD:], sys.byteorder)


def _words(console: int, frame_buffer: int) -> bytes:
    return console.to_bytes(_WORD, sys.byteorder) + frame_buffer.to_bytes(_WORD, sys.byteorder)
