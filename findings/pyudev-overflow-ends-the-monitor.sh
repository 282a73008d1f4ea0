#!/bin/sh
# pyudev 0.24.5: one overflow of its socket, and a Monitor says the same error for ever; a MonitorObserver is gone.
#
# The kernel drops events that do not fit into the receive buffer and says so once: the next call on the socket has
# ENOBUFS, and the events that were kept are there. Monitor.poll() asks poll(2), sees POLLERR, and raises an OSError
# without an errno (Poll._parse_events in pyudev/_os/poll.py), so nobody can tell an overflow from a dead descriptor.
# It does not take the error off the socket either: each further call raises it again, with events waiting behind it.
# Whoever reads SO_ERROR himself goes on. The thread of a MonitorObserver ends with that error, and nobody is told: no
# event comes any more, in a program that runs for months and meets one burst.
#
# Needs root (to send events: `change` of /dev/null's device, which nobody heeds), python3 with venv, libudev1. Seen:
#   poll: OSError, errno None, 3 times of 3
#   SO_ERROR: ENOBUFS; then events are there
#   the observer's thread lives: False
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check pyudev==0.24.5
"$folder/venv/bin/python" - 2>/dev/null <<'END'
import errno
import os
import socket

import pyudev


def burst() -> None:
    for _ in range(2000):
        with open("/sys/class/mem/null/uevent", "w") as uevent:
            uevent.write("change")


def monitor() -> pyudev.Monitor:
    made = pyudev.Monitor.from_netlink(pyudev.Context(), "kernel")
    made.set_receive_buffer_size(4096)
    made.start()
    return made


overflown = monitor()
burst()
errors = []
for _ in range(3):
    try:
        overflown.poll(timeout=0)
    except OSError as error:
        errors.append(error.errno)
print(f"poll: OSError, errno {errors[0]}, {len(errors)} times of 3")
assert errors == [None, None, None]

with socket.socket(fileno=os.dup(overflown.fileno())) as same:
    number = same.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
kept = overflown.poll(timeout=0)
print(f"SO_ERROR: {errno.errorcode[number]}; then events are there" if kept else "changed: nothing was kept")
assert number == errno.ENOBUFS
assert kept is not None

bursts = iter([burst])
observer = pyudev.MonitorObserver(monitor(), callback=lambda _: next(bursts, lambda: None)())
observer.start()
with open("/sys/class/mem/null/uevent", "w") as uevent:
    uevent.write("change")
observer.join(60)
print(f"the observer's thread lives: {observer.is_alive()}")
assert not observer.is_alive()
END
