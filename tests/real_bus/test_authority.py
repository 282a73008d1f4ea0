"""What is asked of polkit, and what its answers mean. Real ones are asked in tests/real_system/test_polkit.py."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from typing import Any

import pytest

from gpuswitch.api.authority import Action, Authority
from gpuswitch.api.bus import Bus
from gpuswitch.api.interface import Interface, dbus_method
from gpuswitch.api.metrics import MetricsObserver
from gpuswitch.api.serving import Caller
from gpuswitch.errors import AuthenticationRequired, Failed, NotAuthorized
from tests.harness.buses.private import PrivateBus
from tests.harness.managers.memory import RefusedError
from tests.harness.managers.polkit import NO, PROVE, YES, FakePolkit
from tests.harness.service.peers import Peer, PeerError

SOMEBODY = Caller(":1.99", 4242, may_be_asked=False)
TO_PROVE = (
    "to switch GPUs, prove to polkit that you may (org.gpuswitch1.switch), or become a member of the group gpuswitch"
)
AT_A_TERMINAL = Caller(":1.99", 4242, may_be_asked=True)


@pytest.fixture
async def polkit(private_bus: PrivateBus) -> AsyncIterator[FakePolkit]:
    async with FakePolkit.on(private_bus.address) as polkit:
        yield polkit


async def test_the_question_names_the_caller_by_its_connection(bus: Bus, polkit: FakePolkit) -> None:
    about = {"gpu": "0000:01:00.0", "stops": "-"}
    await Authority(bus).permit(SOMEBODY, Action.SWITCH, about)
    await Authority(bus).permit(AT_A_TERMINAL, Action.FORCE, about)
    subject = ("system-bus-name", {"name": ("s", ":1.99")})
    assert [each[:4] for each in polkit.asked] == [
        (subject, "org.gpuswitch1.switch", about, 0),
        (subject, "org.gpuswitch1.force", about, 1),
    ]
    assert polkit.asked[0][4] != ""


async def test_root_and_who_runs_the_service_may_do_all_and_are_not_asked(bus: Bus, polkit: FakePolkit) -> None:
    polkit.says = NO
    for user in (0, os.geteuid()):
        for action in Action:
            await Authority(bus).permit(Caller(":1.99", user, may_be_asked=True), action, {})
    assert polkit.asked == []


@pytest.mark.parametrize(
    ("says", "caller", "error", "text"),
    [
        (
            NO,
            SOMEBODY,
            NotAuthorized,
            "you may not switch GPUs: polkit does not allow it (org.gpuswitch1.switch)",
        ),
        (
            PROVE,
            SOMEBODY,
            AuthenticationRequired,
            TO_PROVE,
        ),
        (
            PROVE,
            AT_A_TERMINAL,
            AuthenticationRequired,
            f"{TO_PROVE}; no agent of it is there to ask you",
        ),
        (
            (False, False, {"polkit.dismissed": "true"}),
            AT_A_TERMINAL,
            NotAuthorized,
            "you may not switch GPUs: the question of polkit was dismissed",
        ),
        (
            RefusedError("Failed", "no such process"),
            SOMEBODY,
            Failed,
            "cannot ask polkit whether you may switch GPUs: no such process",
        ),
    ],
)
async def test_what_its_answers_mean(
    bus: Bus, polkit: FakePolkit, says: Any, caller: Caller, error: type[Exception], text: str
) -> None:
    polkit.says = says
    with pytest.raises(error) as raised:
        await Authority(bus).permit(caller, Action.SWITCH, {})
    assert (type(raised.value), str(raised.value)) == (error, text)


async def test_who_asks_again_and_again_is_logged_once(
    bus: Bus, polkit: FakePolkit, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    polkit.says = NO
    authority = Authority(bus)
    for _ in range(3):
        with pytest.raises(NotAuthorized):
            await authority.permit(SOMEBODY, Action.SWITCH, {})
    assert [record.getMessage() for record in caplog.records] == [
        "user 4242 (:1.99) may not switch GPUs: polkit says no to org.gpuswitch1.switch"
    ]


async def test_a_question_that_nobody_waits_for_any_more_is_withdrawn(bus: Bus, polkit: FakePolkit) -> None:
    polkit.says = None
    asking = asyncio.create_task(Authority(bus).permit(AT_A_TERMINAL, Action.SWITCH, {}))
    while not polkit.asked:
        polkit.changed.clear()
        await polkit.changed.wait()
    asking.cancel()
    assert await polkit.withdrawn.get() == polkit.asked[0][4]
    await asyncio.wait([asking])
    assert asking.cancelled()


class Guarded(Interface, name="org.example1.Guarded"):
    def __init__(self) -> None:
        self.switched = 0

    @dbus_method(action="switch", outlives=True)
    async def switch(self) -> None:
        self.switched += 1


class Asking:
    """Asks a person who does not answer. `over` is set when that is given up."""

    def __init__(self) -> None:
        self.begun, self.over = asyncio.Event(), asyncio.Event()

    async def permit(self, _caller: Caller, _action: str, _about: Mapping[str, str]) -> None:
        self.begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            self.over.set()


async def test_the_gpu_is_unplugged_while_the_question_is_open(bus: Bus, peer: Peer) -> None:
    """Nobody is asked about it any more, the caller is told, and who calls others is served all the while."""
    guarded, other, asking = Guarded(), Guarded(), Asking()
    bus.export("/gpus", manages=True)
    bus.export("/gpus/one", guarded)
    bus.export("/gpus/two", other)
    bus.authorize_by(asking)
    calling = asyncio.create_task(peer.call(bus.name, "/gpus/one", "org.example1.Guarded.Switch", interactive=True))
    await asking.begun.wait()
    bus.unexport("/gpus/one")
    with pytest.raises(PeerError, match="there is no object /gpus/one") as told:
        await calling
    assert told.value.name == "org.freedesktop.DBus.Error.UnknownObject"
    assert asking.over.is_set()
    assert await peer.call(bus.name, "/gpus/two", "org.freedesktop.DBus.Peer.Ping") is None
    bus.export("/gpus/one", Guarded())
    assert guarded.switched == other.switched == 0


async def test_a_question_about_another_gpu_stays_open(bus: Bus, peer: Peer) -> None:
    asking = Asking()
    for name in ("one", "two"):
        bus.export(f"/gpus/{name}", Guarded())
    bus.authorize_by(asking)
    calling = asyncio.create_task(peer.call(bus.name, "/gpus/one", "org.example1.Guarded.Switch", interactive=True))
    await asking.begun.wait()
    bus.unexport("/gpus/two")
    await peer.call(bus.name, "/", "org.freedesktop.DBus.Peer.Ping")
    assert not calling.done()
    assert not asking.over.is_set()
    calling.cancel()


async def test_who_is_not_allowed_is_counted_by_action_and_reason(bus: Bus, polkit: FakePolkit) -> None:
    metrics = MetricsObserver()
    heard: list[str] = []
    metrics.heard = lambda: heard.append("a denial")
    authority = Authority(bus, metrics.denied)
    for says in (NO, PROVE, PROVE, YES):
        polkit.says = says
        with suppress(NotAuthorized):
            await authority.permit(SOMEBODY, Action.SWITCH, {"gpu": "whatever"})
    polkit.says = RefusedError("Failed", "no such process")
    with pytest.raises(Failed):
        await authority.permit(SOMEBODY, Action.SWITCH, {})
    counted = {
        (sample.labels["action"], sample.labels["reason"]): sample.value
        for family in metrics.registry.collect()
        for sample in family.samples
        if sample.name == "gpuswitch_denials_total" and sample.value
    }
    assert counted == {("switch", "not_authorized"): 1, ("switch", "interactive_authorization_required"): 2}
    assert len(heard) == 3


async def test_without_polkit_everybody_may_look_and_root_alone_may_act(
    bus: Bus, caplog: pytest.LogCaptureFixture
) -> None:
    authority = Authority(bus)
    await authority.permit(SOMEBODY, Action.INSPECT, {})
    for action in set(Action) - {Action.INSPECT}:
        with pytest.raises(NotAuthorized, match=r"only root may .*: polkit is not there to ask"):
            await authority.permit(AT_A_TERMINAL, action, {})
    assert [record.getMessage() for record in caplog.records] == ["polkit is not there, so only root may switch GPUs"]


async def test_a_polkit_that_goes_says_neither_yes_nor_no(private_bus: PrivateBus, bus: Bus) -> None:
    async with FakePolkit.on(private_bus.address) as polkit:
        polkit.says = None
        asking = asyncio.create_task(Authority(bus).permit(SOMEBODY, Action.SWITCH, {}))
        while not polkit.asked:
            polkit.changed.clear()
            await polkit.changed.wait()
    with pytest.raises(Failed, match="cannot ask polkit whether you may switch GPUs"):
        await asking


async def test_that_its_caller_is_gone_is_no_sign_that_polkit_is(bus: Bus, polkit: FakePolkit) -> None:
    """It passes on what the bus says of that: the name that also stands for a service that is not there."""
    polkit.says = RefusedError("NameHasNoOwner", "no such name")
    polkit.name = "org.freedesktop.DBus.Error"
    with pytest.raises(Failed, match="cannot ask polkit whether you may look at this: no such name"):
        await Authority(bus).permit(SOMEBODY, Action.INSPECT, {})
