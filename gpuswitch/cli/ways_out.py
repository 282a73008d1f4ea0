"""What there is to type where a switch is refused since somebody has the GPU open: each would not be refused now."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from shlex import quote
from typing import Any

from gpuswitch.cli.client import Gpu, Options
from gpuswitch.cli.failures import CtlError
from gpuswitch.cli.translate import _, marks
from gpuswitch.errors import Busy

_WAIT_SECONDS = 60
_DISPLAY_MANAGER = "display-manager.service"
"""The alias that each has (systemd.special(7))."""
_ACTS = marks(
    "or have it wait for them: {command}",
    "or have {units} stopped first, and started again when the GPU is home: {command}",
    "or have them ended, and lose what they have not saved: {command}",
)
_PLANS = marks(
    "or see the plan that waits for them: {command}",
    "or see the plan that stops {units} first, which is started again when the GPU is home: {command}",
    "or see the plan that ends them, with all that they have not saved: {command}",
)
"""Of a command that only looks; what such a plan ends with is the line that does it."""
_FLAGS = {"busy": "--busy", "wait_seconds": "--wait", "stop_units": "--stop-unit"}


def with_ways_out(error: CtlError, ways: Iterable[str]) -> CtlError:
    """The error with these sentences below it, where it is that somebody has the GPU open; they are not asked for
    before.
    """
    if error.name != Busy.name or not (found := list(ways)):
        return error
    told = CtlError("\n".join([str(error), *found]), error.exit_code, name=error.name, blockers=error.blockers)
    told.gpu, told.gpu_name = error.gpu, error.gpu_name
    return told


def ways_out(
    gpus: Sequence[Gpu], target: str, options: Options, command: str, *, behind: str = "", looks: bool = False
) -> Iterator[str]:
    """A sentence for each; `command` is what was typed, without the `options`, which stand before what is `behind`.
    The service is asked about each: what else is in the way stays there, whatever becomes of who has a GPU open.
    `looks`: the command changes nothing, and tells what would be done.
    """
    lead_waits, lead_stops, lead_ends = _PLANS if looks else _ACTS

    def helps(changed: Options) -> bool:
        try:
            return changed != options and not any(gpu.blockers(target, changed) for gpu in gpus)
        except CtlError:  # such as a unit that may not be stopped
            return False

    def typed(changed: Options) -> str:
        return " ".join(filter(None, [with_options(command, changed), behind]))

    waits = {**without(options, "busy"), "wait_seconds": ("u", _WAIT_SECONDS)}
    if helps(waits):
        yield _(lead_waits, command=typed(waits))
    ends = {**without(options, "wait_seconds"), "busy": ("s", "terminate")}
    can_end = helps(ends)
    holders = [each for gpu in gpus for each in _holders(gpu)]
    services = sorted({each["unit"] for each in holders if each["unit"].endswith(".service") and not each["user_unit"]})
    # What belongs to a desktop as a whole ends with that; where no display manager has started it, there is none.
    desktop = [_DISPLAY_MANAGER] if not can_end and any(each["session"] for each in holders) else []
    for units in filter(None, dict.fromkeys((tuple(services), (*services, *desktop)))):
        stops = {**options, "stop_units": ("as", list(dict.fromkeys([*_units(options), *units])))}
        if helps(stops):
            named = ", ".join(dict.fromkeys(units))
            yield _(lead_stops, units=named, command=typed(stops))
            break
    if can_end:
        yield _(lead_ends, command=typed(ends))


def _holders(gpu: Gpu) -> list[dict[str, Any]]:
    try:
        return gpu.holders()
    except CtlError:
        return []


def without(options: Options, name: str) -> dict[str, tuple[str, Any]]:
    return {key: value for key, value in options.items() if key != name}


def _units(options: Options) -> list[str]:
    return list(options["stop_units"][1]) if "stop_units" in options else []


def with_options(command: str, options: Mapping[str, tuple[str, Any]]) -> str:
    """As it is typed: `gpuswitchctl to-vfio rtx3070 --wait 60`."""
    words = [command]
    for name, (_signature, value) in options.items():
        for each in value if isinstance(value, list) else [value]:
            words += [_FLAGS[name], quote(f"{each}")]
    return " ".join(words)
