"""What polkit is told of a call: what whoever allows it should know."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest

from gpuswitch.api.authority import Action
from gpuswitch.api.gpu import GpuObject
from gpuswitch.api.manager import ManagerObject
from gpuswitch.api.metrics import MetricsObserver
from gpuswitch.api.vms import VirtualMachines
from gpuswitch.config.schema import Defaults
from gpuswitch.config.settings import Config, GpuConfig
from gpuswitch.host.simulated.scenarios import SCENARIOS
from gpuswitch.model.address import PciAddress
from gpuswitch.model.policy import Busy
from tests.harness.simulated.harness import Harness

GPU = PciAddress.parse("0000:01:00.0")
GEFORCE = "geforce (0000:01:00.0)"
RULES = Defaults(busy=Busy.TERMINATE, stop_units=("a.service",), end_sessions=True)
UNNAMED = "0000:01:00.0 (NVIDIA Corporation GA104 [GeForce RTX 3070])"
OF_THE_DRIVER = "nvidia-persistenced.service, nvidia-powerd.service"


def told(gpu: str, target: str, stops: str) -> dict[str, str]:
    """`what` is what the question shows, the rest is for rules of an administrator's."""
    return {"gpu": gpu, "target": target or "-", "what": f"{gpu} -> {target}" if target else gpu, "stops": stops}


async def gpu_object(folder: Path, rules: Defaults | None = None) -> GpuObject:
    """The GPU of the laptop, as the bus has it; managed, and named, where there are rules for it."""
    managed = (GpuConfig(GPU, managed=True, name="geforce", rules=rules),) if rules else ()
    harness = await Harness.start(SCENARIOS["laptop"](), folder, Config(gpus=managed))
    return GpuObject(harness.fleet.find("01:00.0"), cast("Any", None), MetricsObserver().refusals)


@pytest.mark.parametrize(
    ("rules", "method", "arguments", "about"),
    [
        (None, "ToVfio", [{}], told(UNNAMED, "vfio", OF_THE_DRIVER)),
        (RULES, "ToVfio", [{}], told(GEFORCE, "vfio", f"programs (terminate), sessions, a.service, {OF_THE_DRIVER}")),
        (RULES, "Trial", [9.0, {"busy": "wait"}], told(GEFORCE, "vfio", f"sessions, a.service, {OF_THE_DRIVER}")),
        (
            RULES,
            "Recover",
            [{"busy": "kill", "stop_units": ["b.service", "a.service"]}],
            told(GEFORCE, "", f"programs (kill), sessions, a.service, {OF_THE_DRIVER}, b.service"),
        ),
        (RULES, "Cancel", ["1f"], told(GEFORCE, "", "-")),
    ],
)
async def test_it_names_the_gpu_and_what_may_be_stopped(
    tmp_path: Path, rules: Defaults | None, method: str, arguments: list[object], about: dict[str, str]
) -> None:
    gpu = await gpu_object(tmp_path, rules)
    assert gpu.about(GpuObject.methods[method], arguments) == about


async def test_of_many_units_some_are_named(tmp_path: Path) -> None:
    gpu = await gpu_object(tmp_path)
    many = {"stop_units": [f"{number}.service" for number in range(500)]}
    stops = gpu.about(GpuObject.methods["ToHost"], [many])["stops"]
    assert stops.startswith(f"{OF_THE_DRIVER}, 0.service, 1.service, ")
    assert stops.endswith(", 7.service, and 492 more")
    killing = gpu.about(GpuObject.methods["ToHost"], [{**many, "busy": "kill"}])["stops"]
    assert killing.startswith("programs (kill), ")


@pytest.mark.parametrize(
    ("rules", "options", "needed"),
    [
        (None, {}, Action.SWITCH),
        (None, {"busy": "wait", "wait_seconds": 5}, Action.SWITCH),
        (None, {"busy": "terminate"}, Action.FORCE),
        (None, {"stop_units": ["a.service"]}, Action.FORCE),
        (RULES, {"stop_units": ["a.service"], "busy": "terminate"}, Action.SWITCH),
        (RULES, {"busy": "refuse"}, Action.SWITCH),
        (RULES, {"busy": "kill"}, Action.FORCE),
        (RULES, {"stop_units": ["a.service", "A.service"]}, Action.FORCE),
    ],
)
async def test_what_ends_more_than_the_configuration_needs_more(
    tmp_path: Path, rules: Defaults | None, options: dict[str, object], needed: Action
) -> None:
    gpu = await gpu_object(tmp_path, rules)
    assert list(gpu.actions(GpuObject.methods["ToVfio"], [options])) == [needed]
    assert list(gpu.actions(GpuObject.methods["Trial"], [60.0, options])) == [needed]


EXAMPLES: dict[str, object] = {"s": "text", "u": 0, "x": 1, "d": 60.0, "as": [], "a{sv}": {}}


async def test_each_method_that_needs_an_action_can_be_told_of(tmp_path: Path) -> None:
    no_gpus = VirtualMachines(cast("Any", None), cast("Any", None), cast("Any", None))
    no_gpus.named = lambda selectors: []  # type: ignore[method-assign]  # noqa: ARG005 -- there is no fleet
    for each in (
        ManagerObject(cast("Any", None), no_gpus, cast("Any", None), cast("Any", None)),
        await gpu_object(tmp_path),
    ):
        for method in each.methods.values():
            arguments = [EXAMPLES[signature] for signature in method.arguments.values()]
            assert list(each.actions(method, arguments)) == ([method.action] if method.action else [])
            assert all(isinstance(text, str) for text in each.about(method, arguments).values())


def test_the_name_of_a_machine_is_shown_in_one_line() -> None:
    manager = ManagerObject(cast("Any", None), cast("Any", None), cast("Any", None), cast("Any", None))
    about = manager.about(ManagerObject.methods["AcquireForVm"], ["win\n11" + "x" * 200, "", []])
    assert about == {"machine": "win?11" + "x" * 74}
