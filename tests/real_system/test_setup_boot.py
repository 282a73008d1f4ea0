"""`setup boot` with the real initramfs-tools and dracut: the initrd has the script and vfio-pci, and loses them again.

The machine beneath has no GPU that may be looked at, so the command is given a sysfs of files. The kernel is an
installed one that nobody has started; the virtual machine tests start it.
"""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from gpuswitch.doctor.machine import Machine
from tests.harness.containers.container import Container
from tests.harness.containers.system import PACKAGES, System, find_bus
from tests.harness.debian.cache import Cache, default_folder
from tests.harness.debian.progress import progress
from tests.harness.debian.releases import find_release
from tests.harness.debian.roots import find_root
from tests.harness.debian.tools import PROJECT, run
from tests.harness.made_machine import CARD, SOUND, MadeMachine
from tests.real_system.conftest import BUS, RELEASE, Boot

DEFAULT = "dracut" if RELEASE == "forky" else "initramfs-tools"
"""What a kernel's package of this release brings along."""
LISTED = {
    "initramfs-tools": ("lsinitramfs", "scripts/init-top/gpuswitch"),
    "dracut": ("lsinitrd", "hooks/pre-udev/00-gpuswitch.sh"),
}
MAINTAIN = PROJECT / "contrib/maintain.sh"
IMAGE = "$(echo /boot/initrd.img-*)"
SETS_UP = """
import pickle, sys
from functools import partial
from pathlib import Path
from gpuswitch.cli import main, setup_boot
machine = pickle.loads(Path("/run/machine").read_bytes())
setup_boot.boot = partial(setup_boot.boot, machine=machine)
setup_boot.undo = partial(setup_boot.undo, machine=machine)
sys.exit(main.main())
"""
"""The command, with the sysfs of files."""


@pytest.fixture(
    params=[pytest.param(tool, marks=[] if tool == DEFAULT else [pytest.mark.campaign]) for tool in sorted(LISTED)]
)
def tool(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def machine(request: pytest.FixtureRequest, boot: Boot, system: System, tool: str, tmp_path: Path) -> Container:
    """A system with a kernel and an initrd, and what stands in for its sysfs, at the same place as out here."""
    cache, packages = Cache(default_folder(), progress(request.config)), (*PACKAGES, *find_bus(BUS))
    with cache.lock():
        root = find_root(cache, f"initrd-{tool}", find_release(RELEASE), (*packages, "linux-image-amd64", tool))
    booted = boot([system.project, root])
    made = MadeMachine(tmp_path)
    booted.sh("tar -C / -xf -", stdin=run(["tar", "-C", "/", "-cf", "-", tmp_path.relative_to("/")]))
    booted.push(pickle.dumps(Machine("", made.machine.roots, as_root=True)), "/run/machine")
    booted.push(SETS_UP, "/run/sets-up.py")
    return booted


def setup_boot(machine: Container, words: str) -> str:
    python = "/usr/local/lib/gpuswitch/current/bin/python"
    return machine.sh(f"{python} /run/sets-up.py setup boot {words}", timeout=500).stdout


def ours(machine: Container, tool: str) -> list[str]:
    """What the initrd has of ours: the script, then the module."""
    program, script = LISTED[tool]
    lines = machine.sh(f"{program} {IMAGE}", timeout=300).stdout.splitlines()
    names = [line.split()[-1] for line in lines if line]
    return [name for end in (script, "/vfio-pci.ko") for name in names if name.partition(".xz")[0].endswith(end)]


@pytest.mark.timeout(1200)
def test_the_initrd_has_it_and_loses_it_again(machine: Container, tool: str) -> None:
    before = machine.sh("find /etc /usr/lib/dracut -type f -exec sha256sum {} + 2>/dev/null | sort").stdout
    assert not [name for name in ours(machine, tool) if "gpuswitch" in name]

    said = setup_boot(machine, f"--gpu {CARD} --yes")
    assert f"take pci0000:00/0000:00:01.0/{SOUND}" in said
    script, module = ours(machine, tool)
    assert (script.endswith(LISTED[tool][1]), "/vfio-pci.ko" in module) == (True, True)
    if tool == "initramfs-tools":
        # udev's own script starts it, and this one is run before.
        machine.sh(f"mkdir /run/initrd && unmkinitramfs {IMAGE} /run/initrd", timeout=300)
        order = machine.sh("cat /run/initrd/scripts/init-top/ORDER /run/initrd/*/scripts/init-top/ORDER", check=False)
        scripts = [line.split()[0].rpartition("/")[2] for line in order.stdout.splitlines() if "/init-top/" in line]
        assert scripts.index("gpuswitch") < scripts.index("udev")

    # Who removes gpuswitch takes it back, by `setup boot undo`.
    machine.push(MAINTAIN.read_text(), "/run/maintain", mode=0o755)
    removed = machine.sh("/run/maintain before-removal", timeout=500).stdout
    assert "from the next start on, host drivers find the GPU" in removed
    assert not [name for name in ours(machine, tool) if "gpuswitch" in name]
    assert machine.sh("find /etc /usr/lib/dracut -type f -exec sha256sum {} + 2>/dev/null | sort").stdout == before
