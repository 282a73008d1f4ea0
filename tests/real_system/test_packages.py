"""The Debian package on a running system: it is upgraded under a GPU that is away, and goes when that is home."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from gpuswitch.cli.early_binding import TOOLS, Bound, Function, files_of
from tests.harness.containers.cockpit import PLACE, find_page
from tests.harness.containers.container import Container
from tests.harness.containers.packaged import APT, NEXT, THIS, Packaged, find_packaged
from tests.harness.containers.system import System
from tests.harness.containers.words import (
    AS_NOBODY,
    GPU,
    JOURNAL,
    NAME,
    ROOT,
    call,
    ctl,
    history,
    hybrid,
    prop,
    show,
    simulated,
)
from tests.harness.debian.cache import Cache, default_folder
from tests.harness.debian.package import NEWER_VERSION, find_package, find_tools
from tests.harness.debian.progress import progress
from tests.harness.debian.releases import find_release
from tests.harness.debian.roots import find_root
from tests.harness.debian.tools import PROJECT, run, run_on_top
from tests.harness.machines.errors import Result
from tests.real_system.conftest import BUS, RELEASE, Boot
from tests.real_system.test_install import everything, fields, make

HOOK = "/etc/libvirt/hooks/qemu.d/50-gpuswitch"
FOREIGN_HOOK = "#!/bin/sh\nexit 0\n"
WIN11 = "a1b2c3d4-0000-4000-8000-000000000011"
STAYS_ON_VFIO = "touch /run/harness/on-vfio"
"""Tells hybrid.py, whose machine is in the memory of one service, that the next one finds the GPU there."""
BOOKS = ("/var/lib/dpkg/", "/var/lib/apt/", "/var/cache/apt/", "/var/cache/debconf/", "/var/log/")
"""Of dpkg and apt."""

HOST = simulated(program="/usr/bin/gpuswitchd")
PYTHON = "/usr/bin/python3" if find_release(RELEASE).libraries else "/usr/lib/gpuswitch/bin/python3"
PAGE = f"{JOURNAL}/0000_01_00_0.json"
SPARE = f"spare ({GPU})"
MANAGED = {"/etc/gpuswitch/config.toml": f'[[gpu]]\naddress = "{GPU}"\nname = "spare"\n'}


@pytest.fixture(scope="session")
def cache(request: pytest.FixtureRequest) -> Cache:
    return Cache(default_folder(), progress(request.config))


@pytest.fixture(scope="session")
def systems(cache: Cache) -> Packaged:
    return find_packaged(cache, find_release(RELEASE), BUS)


@pytest.fixture
def bare(boot: Boot, systems: Packaged) -> Container:
    """A machine without the project."""
    return boot(systems.bare, HOST)


@pytest.fixture
def packaged(boot: Boot, systems: Packaged) -> Container:
    """A machine on which the package was installed before it booted."""
    return boot(systems.installed, hybrid(python=PYTHON) | MANAGED)


def install(machine: Container, package: str, *, check: bool = True) -> Result:
    return machine.sh(f"{APT} install {package} 2>&1", check=check, timeout=300)


def remove(machine: Container, how: str = "remove", *, check: bool = True, env: str = "") -> Result:
    return machine.sh(f"{env} {APT} {how} gpuswitch 2>&1", check=check, timeout=300)


def state_of_package(machine: Container) -> str:
    return machine.sh("dpkg-query -W -f '${db:Status-Status}' gpuswitch", check=False).stdout


def pages(machine: Container) -> dict[str, str]:
    found = machine.sh(f"find {JOURNAL} -name '*.json'").stdout.split()
    return {path: machine.read(path) for path in found}


def give_to_vm(machine: Container) -> None:
    [taken] = call(machine, ROOT, f"{NAME}.Manager.AcquireForVm", "ssas", "win11", WIN11, "1", GPU)
    assert taken == [GPU]
    machine.sh(STAYS_ON_VFIO)


def take_from_vm(machine: Container) -> None:
    call(machine, ROOT, f"{NAME}.Manager.ReleaseFromVm", "sss", "win11", WIN11, "stopped")
    ctl(machine, f"wait {GPU}")


Said = Callable[[Path, str, Mapping[str, bytes]], str]


@pytest.fixture
def said(tmp_path: Path) -> Said:
    """What a shell script says, good or bad, about files in its folder, in an unpacked system that has its tools."""

    def look(tools: Path, command: str, files: Mapping[str, bytes]) -> str:
        (changes := tmp_path / "changes").mkdir()
        (layer := tmp_path / "layer").mkdir()
        layer.chmod(0o755)
        for name, content in {**files, "look": command.encode()}.items():
            (file := layer / "srv" / name).parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
        run_on_top([layer, tools], changes, "cd /srv; sh -eu look >/said 2>&1 || echo its status is $? >>/said")
        return (changes / "said").read_text()

    return look


def test_lintian_has_no_complaint(cache: Cache, said: Said) -> None:
    release = find_release(RELEASE)
    with cache.lock():
        tools, package = find_tools(cache, release), find_package(cache, release)
    files = {file.name: file.read_bytes() for file in package.glob("gpuswitch_*")}
    assert said(tools, "lintian --allow-root --tag-display-limit 0 *.changes", files) == ""


@pytest.mark.campaign
def test_it_has_the_page_for_cockpit_that_was_built(cache: Cache, said: Said) -> None:
    release = find_release(RELEASE)
    page = find_page(cache) / PLACE
    with cache.lock():
        tools, package = find_tools(cache, release), find_package(cache, release, page)
    files = {file.name: file.read_bytes() for file in package.glob("gpuswitch_*")}
    look = "dpkg-deb --fsys-tarfile *.deb | tar -xO ./usr/share/cockpit/gpuswitch/manifest.json; "
    shown = said(tools, f"{look} lintian --allow-root --tag-display-limit 0 *.changes", files)
    assert shown == (page / "manifest.json").read_text()


IN_THE_INITRD = Bound("0000:01:00.0", [Function("0000:01:00.0", "pci0000:00/0000:01:00.0", "0x1", "0x2", dark=True)])
RECIPE_TOOLS = ("nix-bin", "rpm", "rpmlint", "shellcheck")


def recipes() -> dict[str, bytes]:
    """Those for other distributions, which are made elsewhere, and all scripts."""
    contrib = PROJECT / "contrib"
    wanted = [contrib / "arch/PKGBUILD", contrib / "arch/gpuswitch.install", contrib / "nix/module.nix"]
    wanted += [contrib / "rpm/gpuswitch.spec", *contrib.glob("*.sh"), *contrib.glob("debian/*.sh")]
    wanted += [contrib / f"debian/{script}" for script in ("preinst", "postinst", "prerm", "postrm")]
    written = {
        f"early/{tool}/{Path(place).parent.name}-{Path(place).name}": text.encode()
        for tool in TOOLS
        for place, text in files_of(tool, [IN_THE_INITRD]).items()
    }
    return {str(path.relative_to(contrib)): path.read_bytes() for path in wanted} | written


LOOK_AT_RECIPES = """\
nix-instantiate --parse nix/module.nix >nix/said 2>&1 || cat nix/said
# its errors make it fail; of its warnings, rpm has needed no BuildRoot for long, and the source is made in a checkout
rpmlint rpm/gpuswitch.spec >rpm/said || cat rpm/said
grep ': W: ' rpm/said | grep -v -e no-buildroot-tag -e 'invalid-url Source0' || :
bash -n arch/PKGBUILD
sh -n arch/gpuswitch.install
shellcheck *.sh debian/*.sh debian/p*
# makepkg reads its variables, sets others, and ends it when a command fails
shellcheck --shell=bash --exclude=SC2034,SC2154,SC2164 arch/PKGBUILD
shellcheck --shell=sh arch/gpuswitch.install
# what `setup boot` writes; functions of initramfs-tools are not here
shellcheck --shell=sh early/*/init-top-* early/*/*-gpuswitch.sh
shellcheck --shell=sh --exclude=SC1091 early/initramfs-tools/hooks-*
shellcheck --shell=dash early/mkinitcpio/hooks-*
shellcheck --shell=bash early/dracut/*-module-setup.sh early/mkinitcpio/install-*
"""


def test_recipes_for_others_have_no_complaint(cache: Cache, said: Said) -> None:
    """As far as Debian has tools for them: they are not run here."""
    with cache.lock():
        tools = find_root(cache, "recipe-tools", find_release(RELEASE), RECIPE_TOOLS)
    assert said(tools, LOOK_AT_RECIPES, recipes()) == ""


def test_it_has_what_every_way_of_installing_puts_down(packaged: Container, tmp_path: Path) -> None:
    """The list is that of `make install`; the manual pages are compressed here."""
    env = {
        "DESTDIR": str(tmp_path),
        "PREFIX": "/usr",
        "HOOK": "/hook.py",
        "ZSHDIR": "/usr/share/zsh/vendor-completions",
    }
    run([PROJECT / "contrib/install.sh", "stage"], env=env)
    staged = {f"/{path.relative_to(tmp_path)}" for path in tmp_path.rglob("*") if path.is_file()}
    listed = packaged.sh("dpkg -L gpuswitch | xargs realpath -m").stdout.splitlines()
    assert staged - {path.removesuffix(".gz") for path in listed} == set()

    programs = packaged.sh("sed -n 's/^ExecStart=//p' /usr/lib/systemd/*/gpuswitch*.service").stdout.splitlines()
    assert programs == [
        *("/usr/bin/gpuswitchctl hold --yes --unit %n", "/usr/bin/gpuswitchd"),
        "/usr/bin/gpuswitchctl notify",
    ]
    packaged.sh(f'test -r "$(sed -n "s/^hook=\'\\(.*\\)\'$/\\1/p" {HOOK})"')


def test_it_comes_works_and_goes_and_nothing_is_left(bare: Container) -> None:
    bare.sh("systemctl start polkit")
    before = everything(bare)
    install(bare, THIS)
    assert bare.sh("systemctl is-enabled gpuswitchd").stdout == "enabled\n"
    assert (show(bare, "ActiveState"), show(bare, "Result"), show(bare, "NRestarts")) == ("active", "success", "0")
    assert bare.sh("getent group gpuswitch").stdout.startswith("gpuswitch:")
    assert bare.sh("systemctl --global is-enabled gpuswitch-notify", check=False).stdout == "disabled\n"
    assert GPU in bare.sh(f"{AS_NOBODY} gpuswitchctl list").stdout
    assert bare.sh(f"{AS_NOBODY} gpuswitchctl to-vfio {GPU}", check=False).status == 4
    assert ctl(bare, "config check").status == 0
    ctl(bare, f"to-vfio {GPU}")

    # nobody has it open: it is brought home first
    assert f"{GPU} is on the host now" in remove(bare).stdout
    assert bare.sh("pgrep -f gpuswitch[d]", check=False).stdout == ""
    assert pages(bare) == {}
    assert "history.db" in bare.sh("ls /etc/gpuswitch /var/lib/gpuswitch").stdout
    assert state_of_package(bare) == "config-files"

    remove(bare, "purge")
    changed = {fields(line)[0] for line in before ^ everything(bare)}
    assert {path for path in changed if not path.startswith(BOOKS)} == set()
    assert bare.sh("ls -d /run/gpuswitch", check=False).stdout == ""


def test_an_upgrade_touches_no_gpu_and_a_removal_is_refused_while_a_machine_has_one(packaged: Container) -> None:
    """The next service knows whose it is, and the way home; so does the one that stays."""
    give_to_vm(packaged)
    pid, owned = show(packaged, "MainPID"), ("vfio", ["win11", WIN11])

    def told() -> tuple[str, list[str]]:
        return prop(packaged, "State"), prop(packaged, "Owner")

    assert told() == owned
    install(packaged, NEXT)
    assert show(packaged, "MainPID") not in {"0", pid}
    assert ctl(packaged, "--version").stdout.split()[1] == NEWER_VERSION
    assert told() == owned
    assert history(packaged) == [("vfio", "done")]

    refused = remove(packaged, check=False)
    assert refused.status != 0
    assert "cannot remove gpuswitch: a GPU cannot come home" in refused.stdout
    assert "win11" in refused.stdout
    assert f"the way home of {GPU}." in refused.stdout
    assert (state_of_package(packaged), show(packaged, "ActiveState")) == ("installed", "active")
    assert told() == owned
    packaged.sh(f"test -x {HOOK}")

    take_from_vm(packaged)
    assert (prop(packaged, "State"), pages(packaged)) == ("host", {})
    remove(packaged)
    assert state_of_package(packaged) == "config-files"
    assert packaged.sh(f"ls {HOOK}", check=False).stdout == ""


def test_a_removal_that_cannot_ask_the_service_is_refused(packaged: Container) -> None:
    """While it is masked nobody could bring the GPU home. Where it is only stopped, it is started for that."""
    ctl(packaged, "to-vfio spare")
    packaged.sh(f"{STAYS_ON_VFIO}; systemctl mask --now gpuswitchd")
    refused = remove(packaged, check=False)
    assert refused.status != 0
    assert "cannot remove gpuswitch: a GPU cannot come home" in refused.stdout
    assert state_of_package(packaged) == "installed"

    packaged.sh("systemctl unmask gpuswitchd; systemctl stop gpuswitchd")
    assert f"{SPARE} is on the host now" in remove(packaged).stdout
    assert (state_of_package(packaged), pages(packaged)) == ("config-files", {})


def test_a_removal_anyway_leaves_the_gpu_where_it_is(packaged: Container) -> None:
    give_to_vm(packaged)
    kept = pages(packaged)
    remove(packaged, env="GPUSWITCH_REMOVE=anyway")
    assert (state_of_package(packaged), pages(packaged)) == ("config-files", kept)
    assert show(packaged, "LoadState") == "not-found"
    assert packaged.sh("pgrep -f gpuswitch[d]", check=False).stdout == ""

    # the way home outlives what dpkg and the service knew
    remove(packaged, "purge")
    assert pages(packaged) == kept
    assert packaged.sh("ls -d /etc/gpuswitch /var/lib/gpuswitch", check=False).stdout == ""


def test_what_is_noted_of_the_boot_keeps_nobody(boot: Boot, systems: Packaged) -> None:
    """It lies beside the pages of the GPUs until the machine starts anew, wherever these are."""
    config = MANAGED["/etc/gpuswitch/config.toml"] + 'at_boot = "vfio"\n'
    machine = boot(systems.installed, hybrid(python=PYTHON) | {"/etc/gpuswitch/config.toml": config})
    assert (prop(machine, "State"), set(pages(machine))) == ("vfio", {f"{JOURNAL}/at_boot.json", PAGE})

    assert f"{SPARE} is on the host now" in remove(machine).stdout
    assert (state_of_package(machine), set(pages(machine))) == ("config-files", {f"{JOURNAL}/at_boot.json"})
    remove(machine, "purge")
    assert machine.sh("ls -d /run/gpuswitch", check=False).stdout == ""


def test_what_others_have_put_into_libvirts_hooks_stays(packaged: Container) -> None:
    packaged.push(FOREIGN_HOOK, HOOK, mode=0o755)
    assert f"{HOOK} is not ours, and stays" in install(packaged, NEXT).stdout
    remove(packaged, "purge")
    assert packaged.read(HOOK) == FOREIGN_HOOK


def test_a_package_does_not_go_over_make_install(boot: Boot, systems: Packaged, system: System) -> None:
    both = boot([systems.packages, system.sources, system.project, systems.root], simulated())
    policy = "sha256sum /usr/share/polkit-1/*/*gpuswitch*"
    before = both.sh(policy).stdout
    refused = install(both, THIS, check=False)
    assert refused.status != 0
    assert "'make install' in /usr/local; run 'make uninstall PREFIX=/usr/local'" in refused.stdout
    assert both.sh(policy).stdout == before
    assert prop(both, "State") == "host"


@pytest.mark.parametrize("prefix", ["/opt/gpuswitch", "/usr"])
def test_all_ways_know_what_make_install_put_elsewhere(
    boot: Boot, systems: Packaged, system: System, prefix: str
) -> None:
    """Its units win over those of the package, or it has the package's own folder."""
    machine = boot([system.sources, *systems.bare])
    make(machine, f"install PREFIX={prefix}")
    refused = make(machine, "install", check=False)
    assert refused.status != 0
    assert f"cannot install in /usr/local: gpuswitch is in {prefix};" in refused.stdout
    refused = install(machine, THIS, check=False)
    assert refused.status != 0
    assert f"'make install' in {prefix}; run 'make uninstall PREFIX={prefix}' in its sources first" in refused.stdout

    make(machine, f"uninstall PREFIX={prefix}")
    install(machine, THIS)
    assert state_of_package(machine) == "installed"


def test_make_install_and_uninstall_keep_off_a_package(boot: Boot, systems: Packaged, system: System) -> None:
    machine = boot([system.sources, *systems.installed], HOST)
    refused = make(machine, "install", check=False)
    assert refused.status != 0
    assert "cannot install: gpuswitch is here as a package" in refused.stdout

    # as a package that did not look had it
    machine.sh("mkdir /usr/lib/gpuswitch/current; touch /usr/lib/gpuswitch/current/manifest")
    before = everything(machine)
    refused = make(machine, "uninstall PREFIX=/usr", check=False)
    assert refused.status != 0
    assert "cannot uninstall: gpuswitch is here as a package, too" in refused.stdout
    assert everything(machine) ^ before == set()


def test_a_purge_takes_nothing_from_make_install(boot: Boot, systems: Packaged, system: System) -> None:
    """Whoever removed the package may go on without one; what dpkg still knows of it is purged some day."""
    machine = boot([system.sources, *systems.installed], HOST | MANAGED)
    remove(machine)
    make(machine, "install")
    for path, content in hybrid().items():
        machine.push(content, path)
    machine.sh("systemctl daemon-reload")
    give_to_vm(machine)
    kept, owned = pages(machine), prop(machine, "Owner")
    assert set(kept) == {PAGE}

    remove(machine, "purge")
    assert state_of_package(machine) != "config-files"
    assert (pages(machine), prop(machine, "Owner")) == (kept, owned)
    assert machine.sh("systemctl is-enabled gpuswitchd").stdout == "enabled\n"
    assert machine.read("/etc/gpuswitch/config.toml") == MANAGED["/etc/gpuswitch/config.toml"]
    machine.sh("systemctl restart gpuswitchd")
    assert (prop(machine, "State"), prop(machine, "Owner"), len(history(machine))) == ("vfio", owned, 1)
