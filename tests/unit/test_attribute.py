"""Attributes of functions: one spelling, which is a path below a function's folder in sysfs and nowhere else."""

from __future__ import annotations

import pytest

from gpuswitch.errors import InvalidArgument
from gpuswitch.model.attribute import FunctionAttribute
from tests.harness.facts import at


@pytest.mark.parametrize("path", ["d3cold_allowed", "power/control", "link/l1_aspm"])
def test_what_is_written_is_read(path: str) -> None:
    attribute = FunctionAttribute(at("0000:00:01.0"), path)
    assert str(attribute) == f"0000:00:01.0/{path}"
    assert FunctionAttribute.parse(str(attribute)) == attribute


@pytest.mark.parametrize(
    "text",
    ["", "0000:00:01.0", "0000:00:01.0/", "/d3cold_allowed", "0000:00:01.0/..", "0000:00:01.0/power/", "x/power"],
)
def test_nothing_else_is(text: str) -> None:
    with pytest.raises(InvalidArgument):
        FunctionAttribute.parse(text)
