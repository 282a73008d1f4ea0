"""Cases about the text consoles, and the frame buffers that show them."""

from __future__ import annotations

import errno

from gpuswitch.model.facts import Consoles
from tests.host_contract.harness import ContractHarness, case, refused


def own_frame_buffer(harness: ContractHarness, consoles: Consoles) -> int:
    [number] = [n for n, function in consoles.frame_buffers.items() if function == harness.display]
    return number


async def move_one(harness: ContractHarness) -> tuple[Consoles, int]:
    """Have the last virtual terminal shown by the display; what was before, and which it is."""
    before = await harness.kernel.consoles()
    terminal = max(before.mapped)
    await harness.kernel.map_consoles([terminal], own_frame_buffer(harness, before))
    assert (await harness.kernel.consoles()).of(harness.functions) == (terminal,)
    return before, terminal


@case
async def consoles_are_shown_on_a_frame_buffer(harness: ContractHarness) -> None:
    consoles = await harness.kernel.consoles()
    own_frame_buffer(harness, consoles)
    assert set(consoles.mapped.values()) <= set(consoles.frame_buffers)
    assert {1, 2, 6} <= set(consoles.mapped)
    assert consoles.of(harness.functions) == ()
    assert list(consoles.bound.values()) == [True]


@case
async def consoles_map_is_changed_and_put_back(harness: ContractHarness) -> None:
    before, terminal = await move_one(harness)
    await harness.kernel.map_consoles([terminal], before.mapped[terminal])
    assert await harness.kernel.consoles() == before


@case
async def consoles_of_a_display_that_goes_move_to_another(harness: ContractHarness) -> None:
    before, terminal = await move_one(harness)
    await harness.unbind(harness.display)
    after = await harness.kernel.consoles()
    assert harness.display not in after.frame_buffers.values()
    assert after.mapped == before.mapped
    assert after.bound == before.bound
    await harness.kernel.probe(harness.display)
    assert await harness.kernel.consoles() == before
    assert terminal in after.mapped


@case
async def consoles_are_not_mapped_to_what_is_not_there(harness: ContractHarness) -> None:
    before = await harness.kernel.consoles()
    await refused(harness.kernel.map_consoles([1], 31), errno.ENOENT)
    await refused(harness.kernel.bind_console("vtcon31", bound=False), errno.ENOENT)
    assert await harness.kernel.consoles() == before


@case
async def console_driver_is_unbound_and_bound(harness: ContractHarness) -> None:
    """Unbound, it forgets what showed which terminal; bound, one frame buffer shows those that are in use."""
    before = await harness.kernel.consoles()
    [vtconsole] = before.bound
    for _ in range(2):
        await harness.kernel.bind_console(vtconsole, bound=False)
        assert await harness.kernel.consoles() == Consoles(before.frame_buffers, {}, {vtconsole: False})
    for _ in range(2):
        await harness.kernel.bind_console(vtconsole, bound=True)
        after = await harness.kernel.consoles()
        assert after.bound == before.bound
        assert 1 in after.mapped
        assert after.mapped.items() <= before.mapped.items()


@case
async def console_driver_that_is_unbound_is_not_bound_by_a_map(harness: ContractHarness) -> None:
    """The kernel would have that frame buffer show all terminals."""
    before = await harness.kernel.consoles()
    [vtconsole] = before.bound
    await harness.kernel.bind_console(vtconsole, bound=False)
    await refused(harness.kernel.map_consoles([1], own_frame_buffer(harness, before)), errno.ENODEV)
    assert await harness.kernel.consoles() == Consoles(before.frame_buffers, {}, {vtconsole: False})


@case
async def consoles_of_the_only_display_that_shows_any_go_dark(harness: ContractHarness) -> None:
    """Another frame buffer shows them once the console driver is bound again."""
    before = await harness.kernel.consoles()
    [vtconsole] = before.bound
    own = own_frame_buffer(harness, before)
    await harness.kernel.map_consoles(tuple(before.mapped), own)
    await harness.unbind(harness.display)
    after = await harness.kernel.consoles()
    assert (after.mapped, after.bound) == ({}, {vtconsole: False})
    await harness.kernel.bind_console(vtconsole, bound=True)
    after = await harness.kernel.consoles()
    assert after.bound == {vtconsole: True}
    assert 1 in after.mapped
    assert set(after.mapped.values()) <= set(after.frame_buffers) - {own}


@case
async def platform_device_that_is_not_there_is_unbound(harness: ContractHarness) -> None:
    assert harness.host.look().boot_framebuffers == ()
    await harness.kernel.unbind_platform("efi-framebuffer.0", "efi-framebuffer")
