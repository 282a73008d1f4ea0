"""The daemon's place on a real bus, as others see it."""

import asyncio
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import jeepney
import pytest

from gpuswitch.api.bus import Bus
from gpuswitch.api.connection import Message
from gpuswitch.api.interface import Interface, dbus_method, dbus_property, dbus_signal
from gpuswitch.api.serving import caller
from gpuswitch.api.signatures import Str, StrPair, StrTripleArray, UInt32, UInt32Array, Values, ValuesArray
from gpuswitch.api.standard import is_below
from gpuswitch.errors import Busy
from tests.harness.buses.private import PrivateBus
from tests.harness.service.peers import Peer, PeerError

ROOT = "/org/example1"
GPU = "/org/example1/gpu/a"
INTERFACE = "org.example1.Gpu"
PROPERTIES = "org.freedesktop.DBus.Properties"
SEE_LOG = "an error inside gpuswitchd, see its log"
MANAGER = "org.freedesktop.DBus.ObjectManager"


class Gpu(Interface, name=INTERFACE):
    """One of everything that an interface can have, and of everything that can go wrong in it."""

    def __init__(self) -> None:
        self.driver_now: str | None = "nvidia"
        self.gate = asyncio.Event()

    @dbus_property
    def state(self) -> Str:
        return "host"

    @dbus_property
    def driver(self) -> Str:
        if self.driver_now is None:
            raise OSError("/sys/secret is gone")
        return self.driver_now

    @dbus_property
    def owner(self) -> StrPair:
        return ("", "")

    @dbus_property
    def functions(self) -> StrTripleArray:
        return [("0000:01:00.0", "vga", "nvidia"), ("0000:01:00.1", "audio", "")]

    @dbus_property
    def iommu_groups(self) -> UInt32Array:
        return [14, 15]

    @dbus_property
    def switch(self) -> Values:
        return {"id": "1", "step": 3, "steps": ["a", "b"], "reason": {"pid": 7}}

    @dbus_method()
    def plan(self, target: Str, options: Values) -> ValuesArray:
        return [{"target": target, **options}, {"busy": True, "took": 0.5}]

    @dbus_method()
    async def wait(self) -> Str:
        await self.gate.wait()
        return caller().name

    @dbus_method()
    async def may_be_asked(self) -> Str:
        return str(caller().may_be_asked)

    @dbus_method()
    def refuse(self) -> None:
        raise Busy("0000:01:00.0 is open in pid 7")

    @dbus_method()
    def stumble(self) -> None:
        raise OSError("/sys/secret is gone")

    @dbus_method()
    async def stumble_later(self) -> None:
        raise OSError("/sys/secret is gone")

    @dbus_method()
    def lie(self) -> UInt32:
        return -1

    @dbus_method()
    async def give_up(self) -> None:
        raise asyncio.CancelledError

    @dbus_signal
    def step_changed(self, switch: Str, index: UInt32) -> None:
        """Two arguments."""


@pytest.fixture
async def gpu(bus: Bus, peer: Peer) -> Gpu:
    gpu = Gpu()
    bus.export(ROOT, manages=True)
    bus.export(GPU, gpu)
    # Once the bus has answered, what it told of this is past: nobody who begins to listen later hears it.
    await peer.call(bus.name, ROOT, f"{MANAGER}.GetManagedObjects")
    return gpu


# Values


async def test_a_method_takes_and_gives_plain_values(bus: Bus, peer: Peer, gpu: Gpu) -> None:
    options = {"busy": ("s", "wait"), "stop_units": ("as", ["a.service"]), "wait_seconds": ("u", 5)}
    steps = await peer.call(bus.name, GPU, f"{INTERFACE}.Plan", "sa{sv}", "vfio", options)
    assert steps == [
        {"target": ("s", "vfio"), "busy": ("s", "wait"), "stop_units": ("as", ["a.service"]), "wait_seconds": ("x", 5)},
        {"busy": ("b", True), "took": ("d", 0.5)},
    ]


async def test_properties_are_read_one_by_one_and_all_at_once(bus: Bus, peer: Peer, gpu: Gpu) -> None:
    expected: dict[str, Any] = {
        "State": ("s", "host"),
        "Driver": ("s", "nvidia"),
        "Owner": ("(ss)", ("", "")),
        "Functions": ("a(sss)", [("0000:01:00.0", "vga", "nvidia"), ("0000:01:00.1", "audio", "")]),
        "IommuGroups": ("au", [14, 15]),
        "Switch": (
            "a{sv}",
            {"id": ("s", "1"), "step": ("x", 3), "steps": ("as", ["a", "b"]), "reason": ("a{sv}", {"pid": ("x", 7)})},
        ),
    }
    assert await peer.call(bus.name, GPU, f"{PROPERTIES}.GetAll", "s", INTERFACE) == expected
    for name, value in expected.items():
        assert await peer.call(bus.name, GPU, f"{PROPERTIES}.Get", "ss", INTERFACE, name) == value


async def test_a_signal_comes_from_its_object_with_its_arguments(bus: Bus, peer: Peer, gpu: Gpu) -> None:
    async with peer.hear(bus.name) as heard:
        gpu.step_changed("1", index=2)
        signal = await heard.get()
    assert described(signal) == (GPU, INTERFACE, "StepChanged", ("1", 2))


async def test_changed_properties_are_told_with_their_values(bus: Bus, peer: Peer, gpu: Gpu) -> None:
    async with peer.hear(bus.name) as heard:
        gpu.emit_properties_changed("State", "Driver")
        signal = await heard.get()
    values = {"State": ("s", "host"), "Driver": ("s", "nvidia")}
    assert described(signal) == (GPU, PROPERTIES, "PropertiesChanged", (INTERFACE, values, []))


async def test_a_changed_property_that_cannot_be_read_is_told_as_invalidated(bus: Bus, peer: Peer, gpu: Gpu) -> None:
    gpu.driver_now = None
    async with peer.hear(bus.name) as heard:
        gpu.emit_properties_changed("State", "Driver")
        signal = await heard.get()
    assert signal.body == (INTERFACE, {"State": ("s", "host")}, ["Driver"])


async def test_one_property_that_cannot_be_read_does_not_hide_the_others(bus: Bus, peer: Peer, gpu: Gpu) -> None:
    gpu.driver_now = None
    values = await peer.call(bus.name, GPU, f"{PROPERTIES}.GetAll", "s", INTERFACE)
    assert sorted(values) == ["Functions", "IommuGroups", "Owner", "State", "Switch"]
    objects = await peer.call(bus.name, ROOT, f"{MANAGER}.GetManagedObjects")
    assert sorted(objects[GPU][INTERFACE]) == sorted(values)


# Errors


@pytest.mark.parametrize(
    ("method", "error"),
    [
        ("Refuse", "org.gpuswitch1.Error.Busy: 0000:01:00.0 is open in pid 7"),
        ("Stumble", f"org.gpuswitch1.Error.Failed: cannot serve Stumble: {SEE_LOG}"),
        ("StumbleLater", f"org.gpuswitch1.Error.Failed: cannot serve StumbleLater: {SEE_LOG}"),
        ("Lie", f"org.gpuswitch1.Error.Failed: cannot serve Lie: {SEE_LOG}"),
        ("GiveUp", "org.gpuswitch1.Error.Failed: cannot finish GiveUp: it was cancelled"),
        ("Dance", f"org.freedesktop.DBus.Error.UnknownMethod: {GPU} has no method Dance"),
        ("Plan", 'org.freedesktop.DBus.Error.InvalidArgs: Plan takes "sa{sv}", not ""'),
    ],
)
async def test_what_goes_wrong_in_a_call_is_answered_in_one_sentence(
    bus: Bus, peer: Peer, gpu: Gpu, method: str, error: str
) -> None:
    with pytest.raises(PeerError) as raised:
        await peer.call(bus.name, GPU, f"{INTERFACE}.{method}")
    assert str(raised.value) == error


async def test_the_log_explains_what_the_caller_is_not_told(
    bus: Bus, peer: Peer, gpu: Gpu, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(PeerError):
        await peer.call(bus.name, GPU, f"{INTERFACE}.Stumble")
    assert f"Stumble, called by {peer.name}, failed" in caplog.text
    assert "OSError: /sys/secret is gone" in caplog.text


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (("/elsewhere", f"{INTERFACE}.Plan"), "UnknownObject"),
        ((GPU, "org.example1.Other.Plan"), "UnknownInterface"),
        ((GPU, f"{PROPERTIES}.Get", "ss", INTERFACE, "Colour"), "UnknownProperty"),
        ((GPU, f"{PROPERTIES}.Get", "ss", "org.example1.Other", "State"), "UnknownInterface"),
        ((GPU, f"{PROPERTIES}.Set", "ssv", INTERFACE, "State", ("s", "vfio")), "PropertyReadOnly"),
        ((GPU, f"{PROPERTIES}.Set", "ssv", INTERFACE, "Colour", ("s", "red")), "UnknownProperty"),
    ],
)
async def test_what_is_not_there_is_refused_by_its_standard_name(
    bus: Bus, peer: Peer, gpu: Gpu, call: tuple[Any, ...], error: str
) -> None:
    with pytest.raises(PeerError) as raised:
        await peer.call(bus.name, *call)
    assert raised.value.name == f"org.freedesktop.DBus.Error.{error}"


async def test_calls_still_served_are_answered_when_we_leave(bus: Bus, peer: Peer, gpu: Gpu) -> None:
    waiting = asyncio.create_task(peer.call(bus.name, GPU, f"{INTERFACE}.Wait"))
    for _ in range(2):  # the first may be sent before the task has run, the second comes after it
        await peer.call(bus.name, GPU, "org.freedesktop.DBus.Peer.Ping")
    await bus.close()
    with pytest.raises(PeerError, match=r"org.gpuswitch1.Error.Failed: cannot finish Wait: it was cancelled"):
        await waiting


# Who calls


async def test_each_method_knows_its_own_caller(bus: Bus, peer: Peer, gpu: Gpu, private_bus: PrivateBus) -> None:
    async with Peer.on(private_bus.address) as other:
        calls = [
            asyncio.create_task(each.call(bus.name, GPU, f"{INTERFACE}.Wait")) for each in (peer, other, other, peer)
        ]
        for each in (peer, other):  # a connection keeps the order, so after this all four are being served
            await each.call(bus.name, GPU, "org.freedesktop.DBus.Peer.Ping")
        gpu.gate.set()
        assert await asyncio.gather(*calls) == [peer.name, other.name, other.name, peer.name]


async def test_outside_of_a_method_there_is_no_caller(bus: Bus, gpu: Gpu) -> None:
    bus._server.serve(Message(sender=":1.7", path=GPU, interface=INTERFACE, member="Plan", serial=1))
    with pytest.raises(LookupError):
        caller()


@pytest.mark.parametrize("interactive", [True, False])
async def test_a_method_knows_whether_its_caller_may_be_asked(
    bus: Bus, peer: Peer, gpu: Gpu, interactive: bool
) -> None:
    answer = await peer.call(bus.name, GPU, f"{INTERFACE}.MayBeAsked", interactive=interactive)
    assert answer == str(interactive)


# The standard interfaces


async def test_the_machine_id_can_be_asked_for_again(bus: Bus, peer: Peer, gpu: Gpu) -> None:
    ids = [await peer.call(bus.name, GPU, "org.freedesktop.DBus.Peer.GetMachineId") for _ in range(2)]
    of_this_machine = Path("/etc/machine-id").read_text().strip()  # noqa: ASYNC240 -- a line
    assert ids == [of_this_machine] * 2


async def test_a_call_may_leave_out_the_interface(bus: Bus, peer: Peer, gpu: Gpu) -> None:
    assert await peer.call(bus.name, GPU, "MayBeAsked") == "False"
    await peer.call(bus.name, GPU, "Ping")


async def test_a_manager_tells_of_what_comes_and_goes_below_it(bus: Bus, peer: Peer, gpu: Gpu) -> None:
    async with peer.hear(bus.name) as heard:
        bus.unexport(GPU)
        bus.export(GPU, gpu)
        bus.export("/elsewhere", Gpu())
        bus.unexport("/elsewhere")
        bus.unexport(GPU)
        gone, come, gone_again = await heard.get(), await heard.get(), await heard.get()
    assert described(gone) == described(gone_again) == (ROOT, MANAGER, "InterfacesRemoved", (GPU, [INTERFACE]))
    assert described(come)[:3] == (ROOT, MANAGER, "InterfacesAdded")
    assert come.body[0] == GPU
    assert come.body[1][INTERFACE]["State"] == ("s", "host")


@pytest.mark.parametrize(
    ("path", "root", "expected"),
    [("/a/b", "/a", True), ("/a", "/", True), ("/a", "/a", False), ("/", "/", False), ("/ab", "/a", False)],
)
def test_a_path_below_another(path: str, root: str, expected: bool) -> None:
    assert is_below(path, root) is expected


async def test_only_the_root_knows_all_objects(bus: Bus, peer: Peer, gpu: Gpu) -> None:
    objects = await peer.call(bus.name, ROOT, f"{MANAGER}.GetManagedObjects")
    assert [*objects] == [GPU]
    assert [*objects[GPU]] == [INTERFACE]
    with pytest.raises(PeerError, match=f"UnknownInterface: {GPU} has no interface {MANAGER}"):
        await peer.call(bus.name, GPU, f"{MANAGER}.GetManagedObjects")


async def test_introspection_leads_from_the_top_to_the_objects(bus: Bus, peer: Peer, gpu: Gpu) -> None:
    path, seen = "/", []
    while children := (await introspect(bus, peer, path)).findall("node"):
        path = path.rstrip("/") + "/" + children[0].attrib["name"]
        seen.append(path)
    assert seen == ["/org", "/org/example1", "/org/example1/gpu", GPU]


async def test_introspection_shows_names_and_types(bus: Bus, peer: Peer, gpu: Gpu) -> None:
    node = await introspect(bus, peer, GPU)
    [interface] = [each for each in node.findall("interface") if each.attrib["name"] == INTERFACE]
    members = {
        each.attrib["name"]: [(arg.get("direction"), arg.get("name"), arg.get("type")) for arg in each.iterfind("arg")]
        for each in interface
    }
    assert members["Plan"] == [("in", "target", "s"), ("in", "options", "a{sv}"), ("out", None, "aa{sv}")]
    assert members["StepChanged"] == [(None, "switch", "s"), (None, "index", "u")]
    [functions] = interface.findall("property[@name='Functions']")
    assert functions.attrib == {"name": "Functions", "type": "a(sss)", "access": "read"}


async def test_an_object_is_exported_once(bus: Bus, gpu: Gpu) -> None:
    with pytest.raises(ValueError, match=f"cannot export {GPU}: it is exported already"):
        bus.export(GPU, Gpu())
    with pytest.raises(ValueError, match=f"cannot export {INTERFACE} at /b: it is exported at {GPU}"):
        bus.export("/b", gpu)


def described(signal: jeepney.Message) -> tuple[Any, ...]:
    fields = signal.header.fields
    named = (jeepney.HeaderFields.path, jeepney.HeaderFields.interface, jeepney.HeaderFields.member)
    return (*(fields[name] for name in named), signal.body)


async def introspect(bus: Bus, peer: Peer, path: str) -> ET.Element:
    return ET.fromstring(await peer.call(bus.name, path, "org.freedesktop.DBus.Introspectable.Introspect"))  # noqa: S314 -- our own
