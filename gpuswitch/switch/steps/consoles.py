"""The text consoles: which virtual terminals a GPU shows, where they go when it leaves, and how they come back.

One frame buffer console may serve all GPUs, so what is right for one GPU depends on where the others are. Each step
looks at the consoles at the moment it runs, and notes in the restore state what it changes.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass

from gpuswitch.model.address import PciAddress
from gpuswitch.model.facts import Consoles
from gpuswitch.sentence import Sentence
from gpuswitch.switch.restore_state import RestoreState
from gpuswitch.switch.steps.step import Step, StepContext


def consoles_to_move(
    functions: Collection[PciAddress], consoles: Consoles, *, unload: bool, leaving: Collection[PciAddress] = ()
) -> tuple[tuple[int, ...], int | None, tuple[str, ...]]:
    """The GPU's virtual terminals, the frame buffer to move them to, and the vtconsoles to unbind.

    Where there is another frame buffer, the lowest one, but none of a GPU that is `leaving` as well. Where there is
    none, fbcon lets go of a device that is unbound by itself, and keeps only a module from being unloaded.
    """
    own = consoles.numbers(functions)
    if not own:
        return (), None, ()
    others = sorted(n for n, function in consoles.frame_buffers.items() if n not in own and function not in leaving)
    bound = tuple(sorted(name for name, is_bound in consoles.bound.items() if is_bound))
    return consoles.of(functions), others[0] if others else None, bound if unload and not others else ()


def unbound_with(functions: Collection[PciAddress], consoles: Consoles) -> tuple[str, ...]:
    """The vtconsoles that the kernel unbinds when the functions' frame buffers go, though there are others.

    One that shows no terminal does not take any over (fbcon_fb_unbind in drivers/video/fbdev/core/fbcon.c), and a frame
    buffer that is there already brings no console back.
    """
    shown = set(consoles.mapped.values())
    own = set(consoles.numbers(functions))
    if not shown or not shown <= own or own == set(consoles.frame_buffers):
        return ()
    return tuple(sorted(name for name, is_bound in consoles.bound.items() if is_bound))


def shown_by_other_gpus(
    functions: Collection[PciAddress],
    consoles: Consoles,
    terminals_of_others: Collection[int],
    *,
    boot_display: bool,
    console_map: Collection[int] | None = None,
) -> tuple[tuple[int, PciAddress], ...]:
    """The terminals that other functions show, each with whose it is, where a new frame buffer would draw them away.

    When frame buffer 0 comes, or that of the display that the machine booted on, all terminals are drawn on it; with
    `fbcon=map:`, when one of those comes that it names (con2fb_map_boot in drivers/video/fbdev/core/fbcon.c).
    """
    own = consoles.numbers(functions)
    drawn_on = {0} if console_map is None else console_map
    if not own or not (any(number in drawn_on for number in own) or (boot_display and console_map is None)):
        return ()
    whose = {terminal: consoles.frame_buffers.get(number) for terminal, number in sorted(consoles.mapped.items())}
    return tuple(
        [(t, f) for t, f in whose.items() if f is not None and f not in functions and t not in terminals_of_others]
    )


@dataclass(frozen=True)
class MoveConsoles(Step):
    """Show the GPU's virtual terminals on another GPU's frame buffer; where none is left, unbind the vtconsoles.

    `terminals`, `to` (None for none) and `vtconsoles` are what was seen when it was planned. `terminals_of_others` are
    shown on it while their own GPUs are away; `shown_by_others` are on other GPUs. Of what is unbound, those in `leave`
    stay so. `unload`: the driver's modules are to be unloaded. The way back looks at what is there then: a driver that
    was bound anew has made a new frame buffer.
    """

    kind = "console"
    functions: tuple[PciAddress, ...]
    terminals: tuple[int, ...]
    to: int | None
    vtconsoles: tuple[str, ...]
    leave: tuple[str, ...]
    unload: bool
    terminals_of_others: frozenset[int] = frozenset()
    shown_by_others: tuple[tuple[int, PciAddress], ...] = ()

    @property
    def title(self) -> str:
        if self.vtconsoles:
            return Sentence("unbind {consoles}", consoles=", ".join(self.vtconsoles))
        if self.terminals and self.to is not None:
            return Sentence("move the console to {frame_buffer}", frame_buffer=f"fb{self.to}")
        return Sentence("see that no console is on it")

    async def apply(self, context: StepContext) -> None:
        async with _alone(context):
            await self._move(context)

    async def _move(self, context: StepContext) -> None:
        consoles = await context.kernel.consoles()
        leaving = context.arbiter.functions_away_from_host(besides=context.gpu)
        terminals, to, unbind = consoles_to_move(self.functions, consoles, unload=self.unload, leaving=leaving)
        if terminals and to is not None:
            await context.kernel.map_consoles(terminals, to)
            consoles = await context.kernel.consoles()
        lost = unbind or unbound_with(self.functions, consoles)
        if lost:
            context.shown = {terminal: consoles.frame_buffers.get(n) for terminal, n in consoles.mapped.items()}
        if again := tuple(vtconsole for vtconsole in lost if vtconsole not in self.leave):
            context.record_restore(RestoreState(vtconsoles=again))
        for vtconsole in unbind:
            await context.kernel.bind_console(vtconsole, bound=False)

    async def revert(self, context: StepContext) -> None:
        async with _alone(context):
            theirs = await self._taken_back(context) if self.terminals_of_others else frozenset()
            await _put_back(context, self.functions, tuple(t for t in self.terminals if t not in theirs), self.leave)
            await self._show_the_others(context)
            await _show_on_others(context, self.functions, self.shown_by_others)

    async def _taken_back(self, context: StepContext) -> frozenset[int]:
        """The borrowed terminals whose GPU came home meanwhile, or is about to."""
        at_home = context.arbiter.terminals_at_home(await context.kernel.consoles())
        return self.terminals_of_others - (context.arbiter.terminals_of_others(context.gpu) - at_home)

    async def _show_the_others(self, context: StepContext) -> None:
        """A vtconsole that is bound again shows all terminals on one frame buffer, the other GPUs' too."""
        shown, context.shown = context.shown, {}
        consoles = await context.kernel.consoles() if shown else Consoles()
        for number, function in consoles.frame_buffers.items():
            theirs = [
                terminal
                for terminal, before in shown.items()
                if before == function and consoles.mapped.get(terminal, number) != number
            ]
            if theirs and function not in self.functions:
                await context.kernel.map_consoles(theirs, number)


@dataclass(frozen=True)
class RestoreConsoles(Step):
    """Show its virtual terminals on the GPU again, and bind what was unbound when no GPU was left to show any."""

    kind = "console"
    optional = True
    functions: tuple[PciAddress, ...]
    terminals: tuple[int, ...]
    leave: tuple[str, ...]
    shown_by_others: tuple[tuple[int, PciAddress], ...] = ()

    @property
    def title(self) -> str:
        return Sentence("bring the console back")

    async def apply(self, context: StepContext) -> None:
        async with _alone(context):
            await _put_back(context, self.functions, self.terminals, self.leave)
            await _show_on_others(context, self.functions, self.shown_by_others)


@asynccontextmanager
async def _alone(context: StepContext) -> AsyncIterator[None]:
    """No other GPU's step looks at the consoles, or moves any, meanwhile."""
    context.waits_for("the consoles of another GPU are still being moved")
    async with context.arbiter.consoles:
        context.waits_for("")
        yield


async def _put_back(
    context: StepContext, functions: tuple[PciAddress, ...], terminals: tuple[int, ...], leave: tuple[str, ...]
) -> None:
    """Bind the vtconsoles, for whichever GPU's sake they were unbound, and map the terminals to the frame buffer that
    the functions have now, if they have one.
    """
    consoles = await context.kernel.consoles()
    if again := [name for name in context.arbiter.unbound() if name not in leave and not consoles.bound.get(name)]:
        for vtconsole in again:
            await context.kernel.bind_console(vtconsole, bound=True)
        consoles = await context.kernel.consoles()
    own = consoles.numbers(functions)
    # Mapping a terminal while no frame buffer console is bound would bind it, whatever was left unbound on purpose.
    if own and terminals and any(consoles.bound.values()):
        await context.kernel.map_consoles(terminals, own[0])


async def _show_on_others(
    context: StepContext, functions: tuple[PciAddress, ...], shown_by_others: tuple[tuple[int, PciAddress], ...]
) -> None:
    """Map what was drawn on the functions' frame buffer to other GPUs' again, where those are there to show theirs."""
    consoles = await context.kernel.consoles() if shown_by_others else Consoles()
    drawn = set(consoles.of(functions)) - context.arbiter.terminals_of_others(context.gpu)
    for number, function in consoles.frame_buffers.items():
        if theirs := [terminal for terminal, whose in shown_by_others if whose == function and terminal in drawn]:
            await context.kernel.map_consoles(theirs, number)
