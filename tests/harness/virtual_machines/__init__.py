"""The harness: emulated PCs with an IOMMU and several GPUs, on a real kernel with a real systemd.

A machine is built from Debian packages and booted once; what is saved then is the *template*. Every test gets a
*clone* of it in about a second: it maps the template's RAM copy-on-write, loads the state of its devices, and
writes to a disk overlay of its own. A clone never changes the template.

    release  -> base      (base.py)      Debian packages, kernel, initrd
    base     -> modules   (modules.py)   test drivers for that kernel
    base     -> disk      (disk.py)      with the modules, the harness's guest files and the project (`make install`)
    disk     -> template  (template.py)  booted, settled, saved
    template -> clone     (machine.py)   one for each test

All but clones is kept where tests/harness/debian says.

`python -m tests.harness.virtual_machines build`, and `shell` in its place, are for developers.
"""
