"""A kernel operation is declared once: what the worker and the simulated machine do is held against that."""

from __future__ import annotations

import ast
import errno
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_origin

import pytest

from gpuswitch.errors import KernelError
from gpuswitch.host.linux.kernel import LinuxKernel
from gpuswitch.host.linux.operations.buses import Buses
from gpuswitch.host.linux.operations.consoles import Consoles
from gpuswitch.host.linux.operations.functions import Functions
from gpuswitch.host.linux.operations.modules import Modules
from gpuswitch.host.linux.sysfs import Roots
from gpuswitch.host.linux.wire import on_wire
from gpuswitch.host.operation import Operation, Operations, Request, Words, operation
from gpuswitch.host.port import OPERATIONS
from gpuswitch.host.simulated import faults
from gpuswitch.host.simulated.host import parts_of
from gpuswitch.host.simulated.kernel import Machine
from gpuswitch.model.address import PciAddress
from gpuswitch.switch.steps.step import Step
from tests.harness.facts import at

GPU = at("0000:01:00.0")
WORKER = (Functions, Buses, Modules, Consoles)
SIMULATED = Path(faults.__file__).parent
OWN = [each for each in OPERATIONS.values() if not each.attribute]
"""Those that a host has to do something of its own for."""


def public(part: type) -> set[str]:
    return {name for name, value in vars(part).items() if inspect.isfunction(value) and not name.startswith("_")}


def is_many(hint: Any) -> bool:
    return get_origin(hint) in {Mapping, Sequence}


@pytest.mark.parametrize("each", OWN, ids=lambda each: each.name)
def test_the_worker_does_it(each: Operation) -> None:
    [method] = [vars(part)[each.name] for part in WORKER if each.name in public(part)] or [None]
    assert method is not None, f"{each.name} is declared in Kernel: give a class in host/linux/operations this method"
    kinds = [parameter.kind for parameter in list(inspect.signature(method).parameters.values())[1:]]
    # A capture is told what to read.
    single = sum(not is_many(hint) for hint in each.parameters.values()) + (each.name == "capture")
    many = [inspect.Parameter.VAR_POSITIONAL] * sum(map(is_many, each.parameters.values()))
    wanted = [inspect.Parameter.POSITIONAL_OR_KEYWORD] * single + many
    assert kinds == wanted, f"{each.name} of the worker is to take {single} texts{' and any number more' * bool(many)}"


def test_the_worker_does_nothing_else() -> None:
    done = set().union(*map(public, WORKER))
    assert done - {"write"} == {each.name for each in OWN}, "declare in Kernel what the worker can be asked for"


@pytest.mark.parametrize("each", OWN, ids=lambda each: each.name)
def test_the_simulated_machine_does_it(each: Operation) -> None:
    parts = [part for part in parts_of(Machine([], [])) if hasattr(part, each.name)]
    assert len(parts) == 1, f"{each.name} is declared in Kernel: one part of the simulated machine is to have it"
    method = getattr(parts[0], each.name)
    assert inspect.iscoroutinefunction(method)
    taken = set(inspect.signature(method).parameters)
    assert taken == {*each.parameters, "call"}, f"{each.name} takes {', '.join(each.parameters)}, and `call`"


def test_each_operation_can_be_made_to_fail() -> None:
    """Faults are added by name: one that the machine counts under another would never hit."""
    struck = {
        node.args[0].value
        for path in SIMULATED.glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "strike"
        and isinstance(node.args[0], ast.Constant)
    }
    written = {each.name for each in OPERATIONS.values() if each.attribute} | {"keep_awake"}
    assert struck | written == set(faults.OPERATIONS)


class Asked(Operations):
    """Keeps what it is asked."""

    def __init__(self) -> None:
        self.requests: list[Request] = []

    async def perform(self, request: Request) -> Any:
        self.requests.append(request)

    @operation("probe")
    def bend(self, functions: Sequence[PciAddress], angle: int = 90, *, slowly: bool = False) -> Words[None]:
        """Bend it."""
        return Words("bend slowly" if slowly else "bend", functions[0], f"{functions[0]} by {angle} degrees")


async def test_a_request_has_all_arguments_and_its_words() -> None:
    asked = Asked()
    await asked.bend([GPU], slowly=True)
    [request] = asked.requests
    assert request.arguments == {"functions": [GPU], "angle": 90, "slowly": True}
    assert request.words.verb == "bend slowly"
    assert request.words.subject == str(GPU)
    assert request.words.whole == f"{GPU} by 90 degrees"
    assert request.words.what == f"bend slowly {GPU} by 90 degrees"
    assert on_wire(request.arguments) == ["90", "1", str(GPU)]


def test_a_mapping_goes_over_the_wire_in_pairs() -> None:
    assert on_wire({"to": {GPU: "a", at("0000:01:00.1"): None}}) == [str(GPU), "a", "0000:01:00.1", ""]


async def test_a_value_that_an_attribute_does_not_take_is_not_sent() -> None:
    kernel = LinuxKernel(str(GPU), Roots())
    with pytest.raises(KernelError, match=rf"cannot set power/control of {GPU}: power/control has no value 'off'"):
        await kernel.set_power_control({GPU: "off"})
    assert kernel.pending is None
    assert kernel.worker is None


def test_an_operation_without_a_deadline_is_refused() -> None:
    with pytest.raises(TypeError, match=r"the operation bend is of kind 'bending', for which there is no deadline"):

        @operation("bending")
        def bend(self: Asked) -> Words[None]:
            return Words("bend", "it")


def test_an_operation_says_what_it_takes_and_returns() -> None:
    with pytest.raises(TypeError, match=r"the operation bend is declared to return .*: write Words\[...\]"):

        @operation("probe")  # type: ignore[arg-type] # that is what is refused
        def bend(self: Asked) -> None:
            """Bend it."""

    def twist(self: Asked, angle: float) -> Words[None]:
        return Words("twist", angle)

    del twist.__annotations__["angle"]
    with pytest.raises(TypeError, match="the operation twist does not say of which type angle is"):
        operation("probe")(twist)


def test_what_writes_an_attribute_takes_values_by_function() -> None:
    with pytest.raises(TypeError, match="the operation bend writes angle: it takes one Mapping, of functions to value"):

        @operation("probe", writes="angle")
        def bend(self: Asked, angle: int) -> Words[None]:
            return Words("bend", angle)


def test_a_step_without_a_deadline_is_refused() -> None:
    with pytest.raises(TypeError, match=r"the step Bend is of kind 'bending', for which .* gpuswitch/config/schema.py"):

        class Bend(Step):
            kind = "bending"

    with pytest.raises(TypeError, match="the step Fold is of kind ''"):

        class Fold(Step):
            pass


def test_errnos_are_ones_that_there_are() -> None:
    for each in OPERATIONS.values():
        assert set(each.raises) <= set(errno.errorcode), each.name
