"""Everything at once, in any order: the witness sees no invariant broken, all is answered, and all comes home."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Coroutine
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from gpuswitch.config.settings import Config, GpuConfig
from gpuswitch.errors import GpuswitchError, KernelError
from gpuswitch.gpu.actor import Actor
from gpuswitch.host.simulated.faults import Delay, Errno, Fault, Hang, Operation, Silent
from gpuswitch.host.simulated.scenarios import PERSISTENCED, SCENARIOS
from gpuswitch.model.address import PciAddress
from gpuswitch.model.policy import Busy, Options
from gpuswitch.model.states import State
from tests.harness.simulated.clock import VirtualClockLoop
from tests.harness.simulated.harness import Harness, Witness, config

GPUS = tuple(PciAddress.parse(f"0000:{number}1:00.0") for number in (1, 2, 3))
LONGER_THAN_ALL_DEADLINES = 1000.0
_EVENTS = (
    *("request", "request", "request", "plan"),
    *("fault", "fault", "fault", "release"),
    *("look", "unplug", "vm", "end", "members", "open", "open", "close"),
)
_OPERATIONS: tuple[Operation, ...] = (
    "capture",
    "load",
    "keep_awake",
    "set_power_control",
    "set_override",
    "unbind",
    "probe",
    "hold_group",
    "release_group",
    "unload",
    "scan",
    "signal",
    "stop_unit",
    "start_unit",
    "inhibit",
    "release_inhibitor",
    "persistence",
    "consoles",
)
_OPTIONS = {1: Options(), 2: Options(wait_seconds=20), 3: Options(busy=Busy.TERMINATE)}
_FAULTS = ("errno", "hang", "short", "long", "silent")

events = st.lists(
    st.tuples(
        st.sampled_from(_EVENTS),
        st.sampled_from(GPUS),
        st.sampled_from([State.VFIO, State.HOST]),
        st.sampled_from(_OPERATIONS),
        st.sampled_from(_FAULTS),
        st.integers(1, 3),
        st.sampled_from([0, 0, 0.5, 6, 50]),
    ),
    min_size=10,
    max_size=40,
)
Event = tuple[str, PciAddress, State, Operation, str, int, float]


@dataclass
class Storm:
    """What is under way."""

    harness: Harness
    asked: list[asyncio.Task[None]] = field(default_factory=list)
    hangs: list[Hang] = field(default_factory=list)
    pulled: set[str] = field(default_factory=set)

    async def happens(self, event: Event) -> None:
        what, gpu, target, operation, fault, nth, pause = event
        actor = self.actor(gpu)
        match what:
            case "request":
                self.ask(actor.request(target, _OPTIONS[nth]))
            case "plan":
                self.ask(actor.plan(target))
            case "fault":
                self.harness.host.faults.add(self.fault(fault, operation), operation=operation, nth=nth)
            case "release":
                for hang in self.hangs:
                    hang.release()
            case "look":
                self.harness.fleet.look()
            case "members":
                table = GpuConfig(gpu, managed=True, members=GPUS[:nth])
                self.harness.fleet.reconfigure(Config(gpus=(table,)))
            case _:
                self.others_do(what, gpu, actor)
        await asyncio.sleep(pause)

    def others_do(self, what: str, gpu: PciAddress, actor: Actor) -> None:
        program = f"program on {gpu}"
        if what == "end":
            self.harness.machine.end(str(gpu))
        elif what == "close":
            self.harness.machine.end(program)
        elif what == "open" and not actor.state.moving:
            # Once a switch has looked for the last time, nobody can keep it from meeting who opens it then.
            with suppress(KernelError):
                self.harness.machine.open(gpu, program, "nvidia")
        elif what == "vm":
            with suppress(KernelError):
                self.harness.machine.start_vm(str(gpu), actor.gpu.functions)
        elif gpu.slot_name not in self.pulled:
            self.pulled.add(gpu.slot_name)
            self.ask(self.harness.machine.unplug(gpu.slot_name))

    def actor(self, gpu: PciAddress) -> Actor:
        """Whose the function is; anybody, where it was pulled and nobody misses it."""
        actors = list(self.harness.fleet.actors.values())
        return next((actor for actor in actors if gpu in {actor.gpu.address, *actor.gpu.functions}), actors[0])

    def ask(self, question: Coroutine[object, object, object]) -> None:
        async def answered() -> None:
            with suppress(GpuswitchError, KernelError):
                await question

        self.asked.append(asyncio.create_task(answered()))

    def fault(self, word: str, operation: Operation) -> Errno | Hang | Delay | Silent:
        faults: dict[str, Fault] = {"short": Delay(1), "long": Delay(45), "silent": Silent(), "errno": Errno(5)}
        if operation == "signal":
            return Errno(1)
        if word == "hang":
            self.hangs.append(Hang())
            return self.hangs[-1]
        # No other operation says that it worked when it did not.
        return faults[word if word != "silent" or operation in {"probe", "unbind"} else "errno"]

    async def calms_down(self) -> None:
        """The kernel returns, the VMs end, the cards are put back, and everything is asked home."""
        self.harness.host.faults.clear()
        for hang in self.hangs:
            hang.release()
        for gpu in GPUS:
            self.harness.machine.end(str(gpu))
            self.harness.machine.end(f"program on {gpu}")
        if self.pulled:
            # nvidia's daemon never lets go of a card that is pulled: its administrator restarts it.
            self.harness.machine.units.stop(PERSISTENCED)
        await asyncio.wait([*self.asked, asyncio.create_task(asyncio.sleep(LONGER_THAN_ALL_DEADLINES))])
        for slot in self.pulled:
            self.harness.replug(slot)
        self.harness.machine.units.settle(PERSISTENCED, "active")
        for _ in GPUS:
            self.harness.fleet.reconfigure(config())
            for actor in list(self.harness.fleet.actors.values()):
                await self.harness.switch(actor, State.HOST)


async def rage(story: list[Event], directory: Path) -> None:
    faults: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: faults.append(context))
    harness = await Harness.start(SCENARIOS["server"](), directory, config())
    before = harness.snapshot()
    storm = Storm(harness)
    for event in story:
        await storm.happens(event)
    await storm.calms_down()
    assert {actor.state for actor in harness.fleet.actors.values()} == {State.HOST}
    # Whatever was forgone, the next service puts right.
    harness = await harness.again()
    for answered in storm.asked:
        answered.result()
    assert (faults, Witness.broken) == ([], [])
    assert (harness.snapshot(), harness.pages) == (before, [])
    assert {actor.state for actor in harness.fleet.actors.values()} == {State.HOST}


# The same stories each run; a story that fails is told as it is, since making it shorter takes minutes.
@settings(derandomize=True, deadline=None, max_examples=100, phases=[Phase.explicit, Phase.generate])
@given(story=events)
def test_all_comes_home(story: list[Event]) -> None:
    with (
        tempfile.TemporaryDirectory() as directory,
        asyncio.Runner(loop_factory=VirtualClockLoop) as runner,
    ):
        runner.run(rage(story, Path(directory)))
