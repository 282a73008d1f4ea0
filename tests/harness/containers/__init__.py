"""The harness: small Debian systems, each with its own systemd, bus, logind, polkit and journal, as containers.

They run on the machine's own kernel at its own speed, and are up within a second. They see no PCI device and cannot
change the kernel's state: for that there are emulated machines (tests/harness/virtual_machines).

    release  -> root      (tests/harness/debian/roots.py)  Debian packages, unpacked; one for each message bus
    root     -> project   (system.py)              what `make install` changes in it
    layers   -> container (container.py)           booted, with a copy of its own: memory on top of the layers

What a container is made of goes with it, however the test ends: keeper.py sees to that.
"""
