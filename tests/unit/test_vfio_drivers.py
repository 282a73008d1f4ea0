"""Which drivers are vfio's, and which of them a function gets."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from gpuswitch.config.loading import load
from gpuswitch.config.schema import Defaults
from gpuswitch.config.settings import Config, GpuConfig
from gpuswitch.errors import ConfigError
from gpuswitch.gpu.observe import observe, place
from gpuswitch.host.linux.sysfs import Sysfs
from gpuswitch.model.address import PciAddress
from gpuswitch.model.drivers import vfio_drivers
from gpuswitch.model.facts import Driver, HostFacts
from gpuswitch.model.gpu import Gpu
from gpuswitch.model.states import State
from gpuswitch.switch.planning.guards import blockers
from gpuswitch.switch.planning.plan import Plan, to_host, to_vfio
from gpuswitch.switch.planning.requirements import DetachRequirements
from gpuswitch.switch.restore_state import NOTHING_TO_RESTORE, RestoreState
from tests.harness.facts import MODULES, VFIO, at, captured, facts, geforce
from tests.harness.sysfs_tree import Tree

SUPERCHIP = "pci:v000010DEd00002342sv000010DEsd000016EBbc03sc02i00"
NVGRACE = Driver("nvgrace-gpu-vfio-pci", "nvgrace_gpu_vfio_pci")
ALIASES = (
    ("vfio_pci:v*d*sv*sd*bc*sc*i*", "vfio_pci"),
    ("vfio_pci:v000010DEd00002342sv*sd*bc*sc*i*", "nvgrace_gpu_vfio_pci"),
    ("vfio_pci:v00008086d0000E20Bsv*sd*bc*sc*i*", "xe_vfio_pci"),
)
GPU, SOUND = at("0000:01:00.0"), at("0000:01:00.1")
CARD = Gpu(GPU, (GPU, SOUND))


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


def superchip(
    display: str | None = "nvidia", sound: str | None = "snd_hda_intel", **registered: str | None
) -> HostFacts:
    """One with sound, whose GPU a variant of vfio-pci is for."""
    card, audio = geforce(display, sound)
    known = {**MODULES, **{name.replace("_", "-"): module for name, module in registered.items()}}
    return replace(facts([replace(card, modalias=SUPERCHIP), audio], registered=known), vfio_aliases=ALIASES)


def titles(plan: Plan) -> list[str]:
    return [step.title.replace("0000:01:00", "gpu").replace("driver override", "override") for step in plan.steps]


@pytest.mark.parametrize(
    ("driver", "device", "on_vfio"),
    [
        ("vfio-pci", True, True),
        ("nvgrace-gpu-vfio-pci", True, True),
        ("mlx5_vfio_pci", False, True),
        ("some_driver", True, True),
        ("some_driver", False, False),
        ("nvidia_vgpu_vfio", False, False),
    ],
)
def test_any_vfio_driver_is_vfio(tree: Tree, driver: str, device: bool, on_vfio: bool) -> None:
    """By its name already while it binds, and by the vfio device that it makes, whatever its name."""
    tree.function(str(GPU), driver=driver)
    if device:
        (tree.path(str(GPU)) / "vfio-dev/vfio0").mkdir(parents=True)
    assert Sysfs(tree.roots).look().functions[GPU].on_vfio is on_vfio
    assert Sysfs(tree.roots).look([GPU]).functions[GPU].on_vfio is on_vfio


def test_what_its_driver_lets_go_of_is_not_on_vfio(tree: Tree) -> None:
    """In 6.1 the vfio device is there until the end of the unbind, and the link goes at its start."""
    tree.function(str(GPU), driver="vfio-pci")
    (tree.path(str(GPU)) / "vfio-dev/vfio0").mkdir(parents=True)
    tree.unbind(str(GPU))
    assert not Sysfs(tree.roots).look().functions[GPU].on_vfio


def test_which_vfio_driver_is_for_what_is_read_from_the_aliases_of_modules(tree: Tree) -> None:
    sysfs = Sysfs(tree.roots)
    assert sysfs.look().vfio_aliases == ()
    lines = ["pci:v000010DEd*sv*sd*bc03sc00i00* nouveau", *(f"{alias} {module}" for alias, module in ALIASES)]
    tree.installed("modules.alias", "".join(f"alias {line}\n" for line in lines))
    assert sysfs.look().vfio_aliases == ALIASES


class TestTheDriverOfAFunction:
    def test_is_the_one_that_fits_best(self) -> None:
        """What it is called is known once its module is loaded; until then it goes by its module's name."""
        unloaded = Driver("nvgrace_gpu_vfio_pci", "nvgrace_gpu_vfio_pci")
        assert vfio_drivers(CARD, superchip()) == {GPU: unloaded, SOUND: VFIO}
        loaded = superchip(nvgrace_gpu_vfio_pci="nvgrace_gpu_vfio_pci")
        assert vfio_drivers(CARD, loaded) == {GPU: NVGRACE, SOUND: VFIO}

    def test_is_vfio_pci_where_the_kernel_names_none(self) -> None:
        host = facts(geforce("nvidia", "snd_hda_intel"))
        assert vfio_drivers(CARD, host) == {GPU: VFIO, SOUND: VFIO}

    def test_is_what_a_variant_of_another_name_is_called(self) -> None:
        arc, sound = geforce("xe", "snd_hda_intel")
        arc = replace(arc, modalias="pci:v00008086d0000E20Bsv00008086sd00001100bc03sc00i00")
        host = replace(facts([arc, sound]), vfio_aliases=ALIASES)
        assert vfio_drivers(CARD, host)[GPU] == Driver("xe-vfio-pci", "xe_vfio_pci")

    @pytest.mark.parametrize("named", ["vfio-pci", "vfio_pci"])
    def test_is_the_one_that_is_named_for_display_functions(self, named: str) -> None:
        assert vfio_drivers(CARD, superchip(), named) == {GPU: VFIO, SOUND: VFIO}

    @pytest.mark.parametrize("named", ["nvgrace-gpu-vfio-pci", "nvgrace_gpu_vfio_pci"])
    @pytest.mark.parametrize("module", ["nvgrace_gpu_vfio_pci", None])
    def test_is_named_with_dashes_or_underscores_and_may_be_built_in(self, named: str, module: str | None) -> None:
        host = superchip(nvgrace_gpu_vfio_pci=module)
        assert vfio_drivers(CARD, host, named) == {GPU: Driver("nvgrace-gpu-vfio-pci", module), SOUND: VFIO}

    def test_is_the_one_that_it_is_on(self) -> None:
        host = superchip("vfio-pci", "vfio-pci")
        assert vfio_drivers(CARD, host, "nvgrace-gpu-vfio-pci") == {GPU: VFIO, SOUND: VFIO}


class TestPlan:
    def test_each_function_to_its_own_driver(self) -> None:
        host = superchip()
        assert titles(to_vfio(CARD, host, captured(host), NOTHING_TO_RESTORE)) == [
            "load nvgrace_gpu_vfio_pci",
            "load vfio-pci",
            "keep the machine from sleeping",
            "keep both functions awake",
            "aim the override of both functions at nvgrace_gpu_vfio_pci, vfio-pci",
            "unbind gpu.1 from snd_hda_intel",
            "unbind gpu.0 from nvidia",
            "bind gpu.1 to vfio-pci",
            "bind gpu.0 to nvgrace_gpu_vfio_pci",
            "check IOMMU group 1",
        ]

    def test_to_the_driver_that_the_configuration_names(self) -> None:
        host = superchip()
        told = titles(
            to_vfio(CARD, host, captured(host), NOTHING_TO_RESTORE, DetachRequirements(vfio_driver="vfio-pci"))
        )
        assert "aim the override of both functions at vfio-pci" in told

    def test_a_function_stays_on_the_vfio_driver_that_it_has(self) -> None:
        host = superchip("vfio-pci", "snd_hda_intel", vfio_pci="vfio_pci")
        told = titles(to_vfio(CARD, host, captured(host), NOTHING_TO_RESTORE))
        assert "aim the override of both functions at vfio-pci" in told
        assert [title for title in told if "bind" in title] == [
            "unbind gpu.1 from snd_hda_intel",
            "bind gpu.1 to vfio-pci",
        ]

    def test_home_from_each_driver(self) -> None:
        host = superchip("nvgrace-gpu-vfio-pci", "vfio-pci")
        told = titles(to_host(CARD, host, captured(host), RestoreState(captured(superchip()))))
        assert [title for title in told if "bind" in title] == [
            "unbind gpu.0 from nvgrace-gpu-vfio-pci",
            "unbind gpu.1 from vfio-pci",
            "bind gpu.0 to nvidia",
            "bind gpu.1 to snd_hda_intel",
        ]


def test_a_gpu_is_on_vfio_whichever_driver_each_function_has() -> None:
    host = superchip("nvgrace-gpu-vfio-pci", "vfio-pci")
    assert observe(CARD, host, NOTHING_TO_RESTORE) is State.VFIO
    assert place(CARD, host) == "on nvgrace-gpu-vfio-pci"
    assert place(CARD, superchip()) == "on the host"
    assert observe(CARD, superchip("nvgrace-gpu-vfio-pci", "snd_hda_intel"), NOTHING_TO_RESTORE) is State.UNKNOWN


@pytest.mark.parametrize("aliases", [ALIASES, ()], ids=["installed", "not installed"])
def test_a_driver_that_is_not_installed_is_a_blocker(aliases: tuple[tuple[str, str], ...]) -> None:
    host = replace(superchip(), vfio_aliases=aliases)
    rules = Defaults(vfio_driver="xe-vfio-pci")
    named = Config(gpus=(GpuConfig(CARD.address, managed=True, rules=rules),))
    found = [blocker.sentence for blocker in blockers(CARD, State.VFIO, State.HOST, host, named)]
    missing = (
        "the driver xe-vfio-pci is not available, its kernel module is not installed: install what has it for the "
        "running kernel, so that this works: modprobe xe_vfio_pci; or use another one: "
        f'set `vfio_driver = ""` in the [[gpu]] table of {CARD.address} in /etc/gpuswitch/config.toml, then run: '
        "systemctl reload gpuswitchd"
    )
    assert found == ([] if aliases else [missing])


class TestAKernelWithoutGroups:
    def test_is_a_blocker_once_vfio_is_loaded(self) -> None:
        loaded = superchip(vfio_pci="vfio_pci")
        for host, found in (
            (superchip(), []),
            (loaded, []),
            (replace(loaded, vfio_nodes=frozenset()), ["no_vfio_groups"]),
        ):
            assert [blocker.kind for blocker in blockers(CARD, State.VFIO, State.HOST, host, Config())] == found

    def test_keeps_what_is_on_vfio_there(self) -> None:
        """Nobody could keep a machine from opening it in the last moment."""
        away = replace(superchip("vfio-pci", "vfio-pci", vfio_pci="vfio_pci"), vfio_nodes=frozenset())
        (blocker,) = blockers(CARD, State.HOST, State.VFIO, away, Config())
        assert blocker.sentence == (
            "0000:01:00.0 cannot be kept from virtual machines while it moves: this kernel has no VFIO groups; use one "
            "with CONFIG_VFIO_GROUP"
        )

    def test_is_no_matter_to_what_is_at_home(self) -> None:
        home = replace(superchip(vfio_pci="vfio_pci"), vfio_nodes=frozenset())
        assert blockers(CARD, State.HOST, State.UNKNOWN, home, Config()) == ()


@pytest.mark.parametrize("value", ["nvidia", "vfio", "vfio-pci/..", "-vfio pci", "x" * 100 + "-vfio-pci"])
def test_the_configuration_names_vfio_drivers_only(tmp_path: Path, value: str) -> None:
    (tmp_path / "config.toml").write_text(f'[defaults]\nvfio_driver = "{value}"\n')
    with pytest.raises(ConfigError) as error:
        load(tmp_path, {})
    (sentence,) = str(error.value).splitlines()
    assert sentence.startswith(f"cannot use {tmp_path}/config.toml:2: defaults.vfio_driver: ")
    assert value[:10] in sentence


def test_one_gpu_may_have_another_than_all_the_others(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(
        f'[defaults]\nvfio_driver = "vfio-pci"\n[[gpu]]\naddress = "{GPU}"\nvfio_driver = ""\n'
    )
    config = load(tmp_path, {})
    assert config.gpu(GPU).rules.vfio_driver == ""
    assert config.gpu(PciAddress.parse("0000:02:00.0")).rules.vfio_driver == "vfio-pci"
