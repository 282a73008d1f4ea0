"""Domains as libvirt hands them to its hooks, and configurations with managed GPUs."""

from __future__ import annotations

from pathlib import Path

UUID = "4dea22b3-1d52-d8f3-2516-782e98ab3fa0"
HOSTDEV = """
    <hostdev mode='subsystem' type='pci' managed='yes'>
      <driver name='vfio'/>
      <source>
        <address {}/>
      </source>
      <alias name='hostdev0'/>
      <address type='pci' domain='0x0000' bus='0x06' slot='0x00' function='0x0'/>
    </hostdev>"""
INTERFACE = """
    <interface type='hostdev' managed='no'>
      <mac address='52:54:00:6d:90:02'/>
      <source>
        <address type='pci' {}/>
      </source>
      <address type='pci' domain='0x0000' bus='0x07' slot='0x00' function='0x0'/>
    </interface>"""


def domain(devices: str, metadata: str = "") -> str:
    """A domain with these devices beside its others."""
    return f"""<domain type='kvm' id='3' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>win 10</name>
  <uuid>{UUID}</uuid>
  <metadata>{metadata}</metadata>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
    <controller type='pci' index='0' model='pcie-root'>
      <address type='pci' domain='0x0000' bus='0x00' slot='0x00' function='0x0'/>
    </controller>{devices}
  </devices>
</domain>
"""


DOMAIN = domain(
    HOSTDEV.format("domain='0x0000' bus='0x01' slot='0x00' function='0x0'")
    + HOSTDEV.format("domain='0' bus='1' slot='0' function='1'").replace("managed='yes'", "managed='no'")
)
"""One with 0000:01:00.0 and 0000:01:00.1."""


def table(address: str, **keys: object) -> str:
    """A managed GPU in TOML."""
    return f"[[gpu]]\naddress = '{address}'\n" + "".join(f"{key} = {value!r}\n" for key, value in keys.items())


def write(directory: Path, **files: str) -> Path:
    """A directory of settings. Files whose names begin with `d_` are in conf.d."""
    (directory / "conf.d").mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        file = directory / (f"conf.d/{name[2:]}.toml" if name.startswith("d_") else f"{name}.toml")
        file.write_text(content)
        file.chmod(0o644)
    # Whoever's umask this is: root takes no orders from files that others may write.
    for each in (directory, directory / "conf.d"):
        each.chmod(0o755)
    return directory


BOMB = "<!DOCTYPE domain [<!ENTITY a0 'x'>{}]><domain><name>&a99;</name></domain>".format(
    "".join(f"<!ENTITY a{n} '{f'&a{n - 1};' * 10}'>" for n in range(1, 100))
)
"""Expanded, more than all the memory there is."""
