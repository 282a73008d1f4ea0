"""The D-Bus library: dbus-next.

Its module has what it does wrong and how that is put right, and gives:

- `Link(address)`, the connection of the library. `connect` logs in and says Hello; where it raises, nothing stays open.
  When the socket has something to read, the loop calls `_message_reader`, which `gpuswitch.api.connection` defines
- `unmarshal(frame)`, the message in these bytes; raises where there is none
- `marshal(message)` and `marshal_body(signature, body)`, the bytes of a message or of a body alone. Both raise the
  library's SignatureBodyMismatchError where the body does not fit
- `Message`, `Variant` and what else `gpuswitch.api.connection` passes on
"""

from gpuswitch.api.library import dbus_next as library

__all__ = ["library"]
