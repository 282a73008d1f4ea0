"""The device nodes that the driver of a function made, as a look tells them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping

from gpuswitch.host.linux.reading import entries, first_line, there, written
from gpuswitch.host.linux.scanning.files import entries as found_in
from gpuswitch.model.facts import Kind

# Where the nodes of a class of devices lie below /dev. The kernel knows (`devnode` of each class) and says so in
# `uevent`, which we may not read.
_NODE_FOLDERS: Mapping[Kind, Mapping[str, str]] = {
    Kind.DISPLAY: {"drm": "dri/", "graphics": ""},
    # accel_devnode in drivers/accel/drm_accel.c; amdgpu makes DRM devices of an MI300 as well.
    Kind.ACCELERATOR: {"drm": "dri/", "accel": "accel/"},
    Kind.AUDIO: {"sound": "snd/"},
}
_DRIVEN_BY_DRM = frozenset({Kind.DISPLAY, Kind.ACCELERATOR})


class Nodes:
    """Looks at nodes in `dev`, with udev's database in `udev` (`Roots`). Remembers the numbers of what has some."""

    def __init__(self, dev: str, udev: str) -> None:
        self._dev = dev
        self._udev = udev
        self._numbers: dict[str, tuple[int, str]] = {}

    def of(self, path: str, kind: Kind) -> tuple[tuple[str, ...], bool]:
        """The nodes of the function at `path` that are ready, and whether some are not."""
        folders = _NODE_FOLDERS.get(kind)
        if folders is None:
            return (), False
        ready = []
        pending = False
        udev_runs = there(f"{self._udev}/control")
        for node, numbers in (found for place in _places(path, kind) for found in self._class_devices(place, folders)):
            made = written(f"{self._dev}/{node}")
            # udev writes this file when owner and mode are right. One that is older than the node was written for
            # another device of the same numbers, of which udev does not know yet that it is gone.
            done = written(f"{self._udev}/data/c{numbers}") if udev_runs else made
            if made is not None and done is not None and done >= made:
                ready.append(f"/dev/{node}")
            else:
                pending = True
        return tuple(sorted(ready)), pending

    def of_display(self, path: str) -> tuple[str, ...]:
        """The nodes below /dev that the device at `path` is to have by what its driver draws with, ready or not."""
        return tuple(sorted(node for node, _ in self._class_devices(path, _NODE_FOLDERS[Kind.DISPLAY])))

    def _class_devices(self, path: str, folders: Mapping[str, str]) -> Iterator[tuple[str, str]]:
        """Node name below /dev and MAJOR:MINOR of each device that a function's driver registered with these classes.

        DRM minors and frame buffers lie right in the class's folder, a sound card's in the folder of the card
        (`sound/card0/controlC0`). What has no `dev` has no node: connectors, cards. Nor has a link: `controlD65` beside
        `card1` is an old name of it (create_compat_control_link in drivers/gpu/drm/drm_drv.c).
        """
        for folder, prefix in folders.items():
            places = [f"{path}/{folder}"]
            if folder == "sound":
                places = [card.path for card in found_in(places[0]) if card.is_dir(follow_symlinks=False)]
            for device in (each for place in places for each in found_in(place)):
                if device.is_dir(follow_symlinks=False) and (numbers := self._numbers_of(device)):
                    yield f"{prefix}{device.name}", numbers

    def _numbers_of(self, device: os.DirEntry[str]) -> str:
        """They stay the same for as long as its folder, which has another inode when it is made anew."""
        known = self._numbers.get(device.path)
        if known is not None and known[0] == device.inode():
            return known[1]
        # The folder is there before it (device_add in drivers/base/core.c).
        if numbers := first_line(f"{device.path}/dev"):
            self._numbers[device.path] = device.inode(), numbers
        return numbers


def _places(path: str, kind: Kind) -> Iterator[str]:
    """Where the devices of a function may lie: below it, or below an auxiliary device that its driver made.

    Such a one is named MODULE.NAME.NUMBER (__auxiliary_device_add in drivers/base/auxiliary.c); nova-core makes one for
    nova-drm.
    """
    yield path
    if kind in _DRIVEN_BY_DRM and not there(f"{path}/drm"):
        yield from (f"{path}/{name}" for name, _ in entries(path) if name.count(".") == 2 and name[-1].isdigit())
