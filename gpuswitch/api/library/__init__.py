"""The D-Bus library: dbus-next, or dbus-fast where a test asks for that.

Each has a module here, with what it does wrong and how that is put right. Both give the same:

- `Link(address)`, the connection of the library. `connect` logs in and says Hello; where it raises, nothing stays open.
  When the socket has something to read, the loop calls `_message_reader`, which `gpuswitch.api.connection` defines
- `unmarshal(frame)`, the message in these bytes; raises where there is none
- `marshal(message)` and `marshal_body(signature, body)`, the bytes of a message or of a body alone. Both raise the
  library's SignatureBodyMismatchError where the body does not fit
- `Message`, `Variant` and what else `gpuswitch.api.connection` passes on
"""

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

__all__ = ["LIBRARIES", "VARIABLE", "chosen", "library"]

LIBRARIES: Final = ("dbus-next", "dbus-fast")
VARIABLE: Final = "DBUS_LIBRARY"
"""Names the library. Only tests set it; GPUSWITCH_... would be a setting of the service."""


def chosen(environ: Mapping[str, str] = os.environ) -> str:
    """The library that the environment names, the first one where it names none. Ends the program if it is unknown."""
    name = environ.get(VARIABLE) or LIBRARIES[0]
    if name not in LIBRARIES:
        raise SystemExit(f"cannot use {VARIABLE}={name}: it is one of {', '.join(LIBRARIES)}")
    return name


if TYPE_CHECKING or chosen() == "dbus-next":
    from gpuswitch.api.library import dbus_next as library
else:
    from gpuswitch.api.library import dbus_fast as library
