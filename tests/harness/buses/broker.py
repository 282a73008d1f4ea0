"""dbus-broker out of a newer Debian than the one below us, which has 33: its answers carry no descriptors yet.

Its launcher is made for a machine that systemd runs: it takes the socket from systemd (sd_listen_fds(3)), logs to the
journal, and starts services through systemd, which it looks for on its own bus, as on a real machine
(`starter.py` is there for it). What it needs of a machine is laid out in a mount namespace, and nothing else:
in the namespaces of PIDs and users it is among us, so what it says of its callers is true.
"""

from __future__ import annotations

import os
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.harness.debian.cache import Cache, Say, default_folder
from tests.harness.debian.releases import RELEASES
from tests.harness.debian.roots import find_root
from tests.harness.debian.tools import require_tools

RELEASE = "trixie"

STAGE = """
root=$1 folder=$2
mount -t tmpfs -o mode=755 tmpfs "$folder/stage"
cd "$folder/stage"
mkdir -p usr etc proc sys dev run/systemd/journal "./$folder"
for name in bin sbin lib lib64; do ln -s "usr/$name" "$name"; done
mount --bind "$root/usr" usr
for name in proc sys dev; do mount --rbind "/$name" "$name"; done
mount --bind "$folder" "./$folder"
cp "$root/etc/passwd" "$root/etc/group" "$root/etc/nsswitch.conf" etc
echo 0123456789abcdef0123456789abcdef >etc/machine-id
ln -s "$folder/journal" run/systemd/journal/socket
export LISTEN_PID=$$
exec chroot . /usr/bin/dbus-broker-launch --scope user --config-file="$folder/bus.conf" 3<&0 </dev/null
"""


@dataclass(frozen=True)
class Broker:
    """dbus-broker of the system that is unpacked in `root`."""

    root: Path
    asks_systemd = True

    @contextmanager
    def run(self, folder: Path) -> Iterator[subprocess.Popen[bytes]]:
        (folder / "stage").mkdir(exist_ok=True)
        (folder / "journal").unlink(missing_ok=True)
        settings = {
            "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
            "DBUS_SESSION_BUS_ADDRESS": f"unix:path={folder}/bus",
            "LISTEN_FDS": "1",
            "LISTEN_FDNAMES": "dbus.socket",
        }
        # Without root's rights: a namespace of users in which everybody is who they are outside.
        rights = [] if os.geteuid() == 0 else ["--map-current-user", "--keep-caps"]
        command = ["unshare", *rights, "--mount", "--propagation=private"]
        command += ["sh", "-euc", STAGE, "sh", str(self.root), str(folder)]
        with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as journal:
            journal.bind(f"{folder}/journal")
            listener.bind(f"{folder}/bus")
            listener.listen(socket.SOMAXCONN)
            with subprocess.Popen(command, env=settings, stdin=listener.fileno(), stdout=subprocess.PIPE) as process:
                listener.close()
                reader = threading.Thread(target=_read_to_the_end, args=(journal,))
                reader.start()
                try:
                    yield process
                finally:
                    journal.shutdown(socket.SHUT_RD)
                    reader.join()


def _read_to_the_end(journal: socket.socket) -> None:
    """dbus-broker tells of each peer that it hangs up on, and ends itself where nobody takes that (its log.c)."""
    while journal.recv(1 << 16):
        pass


def find_broker(say: Say) -> Broker:
    """As it is in the cache, or made now. Raises HarnessError."""
    require_tools("dbus-broker")
    cache = Cache(default_folder(), say)
    with cache.lock():
        return Broker(find_root(cache, "broker", RELEASES[RELEASE], ["dbus-broker"]))
