"""Who besides root may open a device node: an entry for one user in its access control list (acl(5))."""

from __future__ import annotations

import re
from typing import NamedTuple, Self

from gpuswitch.errors import InvalidArgument

_SPELLING = re.compile(r"(0|[1-9][0-9]{0,9}) (/dev(?:/[A-Za-z0-9_-]+)+)")
NO_USER = 2**32 - 1
"""What the kernel takes for no uid (`uid_valid` in include/linux/uidgid.h)."""


class UserAccess(NamedTuple):
    """That the user `uid` may read and write `node`, an absolute path below /dev."""

    uid: int
    node: str

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read what `str` gives: `1000 /dev/vfio/12`.

        Raises:
            InvalidArgument: for anything else.
        """
        found = _SPELLING.fullmatch(text)
        if found is None or int(found[1]) >= NO_USER:
            raise InvalidArgument(f"{text[:80]!r} is not the access of a user to a device node")
        return cls(int(found[1]), found[2])

    def __str__(self) -> str:
        return f"{self.uid} {self.node}"
