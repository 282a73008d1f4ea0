"""Virtual machines of a real libvirtd, confined by AppArmor: emulated, with next to nothing to run."""

from __future__ import annotations

from uuid import NAMESPACE_DNS, uuid5

from tests.harness.machines.errors import Result
from tests.harness.machines.inside import words
from tests.harness.setups.guest import configure, drivers, prop, state, wait_prop, wait_state
from tests.harness.setups.logind import await_may_sleep, kept_awake
from tests.harness.virtual_machines.hardware import AUDIO_DRIVER, DISPLAY_DRIVER, GPU, GPU_AUDIO
from tests.harness.virtual_machines.machine import Machine

HOOKS = "/etc/libvirt/hooks/qemu.d"
HOOK = f"{HOOKS}/50-gpuswitch"

AT_HOME = [DISPLAY_DRIVER, AUDIO_DRIVER]
AWAY = ["vfio-pci", "vfio-pci"]
MANAGED = f'[[gpu]]\naddress = "{GPU}"\n'

DOMAIN = """\
<domain type='qemu'>
  <name>{name}</name>
  <uuid>{uuid}</uuid>
  <metadata><test:padding xmlns:test='urn:test'>{padding}</test:padding></metadata>
  <memory unit='MiB'>64</memory>
  <os><type arch='x86_64' machine='q35'>hvm</type></os>
  <features><acpi/></features>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
    <controller type='usb' model='none'/>
    <memballoon model='none'/>
    {devices}
  </devices>
</domain>
"""

HOSTDEV = """\
<hostdev mode='subsystem' type='pci' managed='{managed}'>
  <source><address domain='0x{domain}' bus='0x{bus}' slot='0x{slot}' function='0x{function}'/></source>
</hostdev>
"""

DISK_FILE = "/var/lib/libvirt/images/setups.img"
DISK = f"""\
<disk type='file' device='disk'>
  <driver name='qemu' type='raw'/><source file='{DISK_FILE}'/><target dev='sda' bus='sata'/>
</disk>
"""

SERIAL_FILE = "/var/lib/libvirt/images/setups.serial"
SERIAL = f"<serial type='file'><source path='{SERIAL_FILE}'/></serial>"

BOOTED = "u"
# The ACPI registers of q35, where SeaBIOS puts them: PM1_STS at 0x600, PM1_EN at 0x602, PM1_CNT at 0x604.
BOOT_SECTOR = bytes.fromhex(
    "ba0206 b80001 ef"  # mov dx, 0x602; mov ax, 0x100; out dx, ax: tell of the power button
    "baf803 b075 ee"  # mov dx, 0x3f8; mov al, 'u'; out dx, al: say so
    "ba0006"  # mov dx, 0x600
    "f4 ed f6c401 74f9"  # again: hlt; in ax, dx; test ah, 1; jz again: until it is pressed
    "ba0406 b80020 ef"  # mov dx, 0x604; mov ax, 0x2000; out dx, ax: switch off
    "f4 ebfd"  # hlt, for ever
)
"""A guest that switches itself off when it is asked to, as `virsh shutdown` does; it says when it listens."""

SEEN = "/run/setups-seen"
WITNESS = f"""\
#!/bin/sh
# Writes down who is called for what, and where the GPU is at that moment.
cat >/dev/null
for function in {GPU} {GPU_AUDIO}; do
    set -- "$@" $(basename "$(readlink /sys/bus/pci/devices/$function/driver)")
done
echo "$1 $2: $5 $6" >>{SEEN}-${{0##*/}}
"""


def set_up(machine: Machine, toml: str = MANAGED) -> None:
    """Configure the service, and have the hooks before and after ours write down what they see."""
    configure(machine, toml)
    for name in ("10-before", "90-after"):
        machine.push(WITNESS, f"{HOOKS}/{name}", mode=0o755)
    # libvirt compiles a profile for each start: emulated, its simplification alone takes seconds
    machine.sh("echo Optimize=no-expr-simplify >>/etc/apparmor/parser.conf")


def hostdev(function: str, managed: str = "yes") -> str:
    """The XML of a PCI function that goes to a domain."""
    domain, bus, slot, number = function.replace(".", ":").split(":")
    return HOSTDEV.format(managed=managed, domain=domain, bus=bus, slot=slot, function=number)


def domain(name: str, *functions: str, managed: str = "yes", padding: int = 0, more: str = "") -> str:
    """The XML of a domain with these PCI functions, and so many bytes of what libvirt keeps and nobody reads."""
    devices = "".join(hostdev(function, managed) for function in functions)
    uuid = uuid5(NAMESPACE_DNS, name)
    return DOMAIN.format(name=name, uuid=uuid, padding="x" * padding, devices=devices + more)


def define(machine: Machine, name: str, *functions: str, managed: str = "yes", padding: int = 0) -> None:
    """A domain that pays no attention to anybody: there is nothing to boot from."""
    text = domain(name, *functions, managed=managed, padding=padding)
    machine.sh("virsh define /dev/stdin", stdin=text)


def define_obedient(machine: Machine, name: str, *functions: str) -> None:
    """A domain that shuts down when it is asked to."""
    machine.push(BOOT_SECTOR.ljust(510, b"\0") + b"\x55\xaa", DISK_FILE)
    machine.sh(f"truncate -s 1M {DISK_FILE}")
    machine.sh("virsh define /dev/stdin", stdin=domain(name, *functions, more=DISK + SERIAL))


def await_obedient(machine: Machine, *, boots: int = 1) -> None:
    """Wait until it has booted, so many times since its start, far enough to hear the power button."""
    machine.do(words.await_text, SERIAL_FILE, f"^{BOOTED}{{{boots}}}$")


def virsh(machine: Machine, command: str, *, check: bool = True) -> Result:
    return machine.sh(f"virsh {command}", check=check)


def domains(machine: Machine) -> dict[str, str]:
    """What `virsh list` says, which waits for every domain that libvirt is busy with: the state of each by name."""
    lines = virsh(machine, "list --all").stdout.splitlines()[2:]
    return dict(line.split(maxsplit=2)[1:] for line in lines if line)


def qemu_pid(machine: Machine, name: str) -> str:
    return machine.read(f"/run/libvirt/qemu/{name}.pid").strip()


def seen(machine: Machine, witness: str = "90-after") -> list[str]:
    """The calls of the hooks up to now, with the drivers of the GPU's functions: "win11 prepare: vfio-pci vfio-pci"."""
    return machine.read(f"{SEEN}-{witness}").splitlines()


def await_seen(machine: Machine, call: str) -> None:
    """Wait until the last of the hooks was called so: "win11 release"."""
    machine.do(words.await_text, f"{SEEN}-90-after", f"^{call}:")


def call_hook(machine: Machine, arguments: str, xml: str, *, check: bool = True) -> Result:
    """Call our hook as libvirt would: "win11 prepare begin -"."""
    return machine.sh(f"{HOOK} {arguments}", stdin=xml, check=check)


def owner(machine: Machine, gpu: str = GPU) -> str:
    """The name of the VM that a GPU belongs to, or ""."""
    return str(prop(machine, gpu, "Owner")[0])


def await_owner(machine: Machine, name: str, gpu: str = GPU) -> None:
    wait_prop(machine, gpu, "Owner", lambda owner: owner[0] == name)


def check_given(machine: Machine, name: str) -> None:
    """The GPU is in the hands of that VM, which runs."""
    assert (state(machine), owner(machine)) == ("vfio", name)
    assert drivers(machine, GPU, GPU_AUDIO) == AWAY
    assert kept_awake(machine)
    group = prop(machine, GPU, "IommuGroups")[0]
    # libvirt gives QEMU a /dev of its own, where fuser does not know the node
    holders = machine.sh(f"find /proc/[0-9]*/fd -lname /dev/vfio/{group} 2>/dev/null", check=False).stdout.splitlines()
    assert {holder.split("/")[2] for holder in holders} == {qemu_pid(machine, name)}


def await_home(machine: Machine) -> None:
    """Wait until nobody has the GPU, and nothing is left of who had it."""
    wait_state(machine, GPU, "host")
    await_owner(machine, "")
    await_may_sleep(machine)
    assert state(machine) == "host"
    assert drivers(machine, GPU, GPU_AUDIO) == AT_HOME
