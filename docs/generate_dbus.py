"""Write docs/dbus/: what introspection serves of each of our interfaces. `python docs/generate_dbus.py [FOLDER]`."""

from __future__ import annotations

import sys
from pathlib import Path

from gpuswitch.api.gpu import GpuObject
from gpuswitch.api.introspection import document
from gpuswitch.api.manager import ManagerObject

INTERFACES = (ManagerObject, GpuObject)


def pages() -> dict[str, str]:
    """The text of each file, by its name."""
    return {f"{interface.dbus_name}.xml": document([interface]) for interface in INTERFACES}


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent / "dbus")
    folder.mkdir(exist_ok=True)
    for name, text in pages().items():
        (folder / name).write_text(text)


if __name__ == "__main__":
    main()
