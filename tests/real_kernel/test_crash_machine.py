"""The installed service: killed and started anew by systemd, restarted while it is at work, and without power."""

from __future__ import annotations

import json

import pytest

from tests.harness.machines.inside import words
from tests.harness.setups import units
from tests.harness.setups.crash import JOURNAL, condition
from tests.harness.setups.guest import ctl, drivers, path_of, start_switch, state, wait_prop
from tests.harness.setups.tracer import inject
from tests.harness.virtual_machines.hardware import AUDIO_DRIVER, DISPLAY_DRIVER, GPU, GPU_AUDIO, SINGLE_GPU
from tests.harness.virtual_machines.machine import Machine

AWAY = ["vfio-pci", "vfio-pci"]
HOME = [DISPLAY_DRIVER, AUDIO_DRIVER]
FUNCTIONS = (GPU, GPU_AUDIO, SINGLE_GPU)

# From outside: strace has the main thread, which alone writes the journal, when that has a tracer.
KILL_AT_A_WRITE = f"""\
setsid strace -qq -o /dev/null -P {JOURNAL}/0000_01_00_0.new -P {JOURNAL}/0000_01_00_0.spare -e trace=rename \
    -e inject=rename:signal=KILL:when=6 -p {{pid}} </dev/null >/dev/null 2>&1 &
"""

# Whoever stops or starts the service meanwhile.
ASK_ON_AND_ON = """\
object="org.gpuswitch1 {path} org.gpuswitch1.Gpu"
until [ -e /run/enough ]; do
    for method in ToVfio ToHost; do
        switch=$(busctl call $object $method 'a{{sv}}' 0) && eval busctl --timeout=100 call $object Wait $switch
    done
done >/dev/null 2>&1
"""


def there_and_back(machine: Machine, *gpus: str) -> str:
    """Have all of vfio loaded, which stays so; gives the condition of the host."""
    for gpu in gpus:
        ctl(machine, f"to-vfio {gpu}")
        ctl(machine, f"to-host {gpu}")
    return condition(machine, *FUNCTIONS)


def test_systemd_starts_what_was_killed_in_a_switch(machine: Machine) -> None:
    before = there_and_back(machine, GPU)
    for number, way in enumerate(("to-vfio", "to-host"), start=1):
        pid = units.main_pid(machine, "gpuswitchd")
        machine.sh(KILL_AT_A_WRITE.format(pid=pid))
        machine.do(words.await_text, f"/proc/{pid}/status", "^TracerPid:\t[1-9]")
        assert ctl(machine, f"{way} {GPU}", check=False).status != 0
        units.await_shown(machine, "gpuswitchd", "NRestarts", number)
        units.await_active(machine, "gpuswitchd")
        assert (state(machine), drivers(machine, GPU, GPU_AUDIO)) == ("host", HOME)
        assert condition(machine, *FUNCTIONS) == before
        ctl(machine, f"to-vfio {GPU}")
        assert drivers(machine, GPU, GPU_AUDIO) == AWAY


@pytest.mark.campaign
def test_restarted_at_work_over_and_over(machine: Machine) -> None:
    before = there_and_back(machine, GPU, SINGLE_GPU)
    asking = [machine.start(ASK_ON_AND_ON.format(path=path_of(gpu)), timeout=300) for gpu in (GPU, SINGLE_GPU)]
    for gpu in (GPU, SINGLE_GPU, GPU):
        wait_prop(machine, gpu, "State", lambda state: "taching" in state)
        units.restart(machine, "gpuswitchd")
        assert units.show(machine, "gpuswitchd", "Result") == "success"
    machine.sh("touch /run/enough")
    for job in asking:
        job.wait(check=False)
    for gpu in (GPU, SINGLE_GPU):
        ctl(machine, f"to-host {gpu}")
        assert state(machine, gpu) == "host"
    assert condition(machine, *FUNCTIONS) == before
    assert machine.sh(f"ls {JOURNAL}").stdout == ""
    assert units.show(machine, "gpuswitchd", "NRestarts") == 0


def history(machine: Machine) -> list[tuple[str, str]]:
    """The finished switches, newest first: id and result."""
    told = json.loads(ctl(machine, "history --json").stdout)
    return [(entry["id"], entry["result"]) for entry in told["switches"]]


def test_a_power_cut_in_a_switch(machine: Machine) -> None:
    before = there_and_back(machine, GPU)
    kept = history(machine)
    assert [result for _, result in kept] == ["done", "done"]
    # The worker stops as it unbinds the display, and so the switch stands still there.
    inject(machine, GPU, f"/sys/bus/pci/drivers/{DISPLAY_DRIVER}/unbind", "signal=STOP:when=1")
    start_switch(machine, GPU, "ToVfio")
    machine.do(words.await_gone, f"/sys/bus/pci/devices/{GPU}/driver")
    assert machine.sh(f"ls {JOURNAL}/*.json").status == 0

    machine.cut_power()
    machine.wait_until_up()
    assert (state(machine), drivers(machine, GPU, GPU_AUDIO)) == ("host", HOME)
    assert machine.sh(f"ls {JOURNAL}", check=False).stdout == ""
    assert history(machine) == kept
    ctl(machine, f"to-vfio {GPU}")
    assert drivers(machine, GPU, GPU_AUDIO) == AWAY
    ctl(machine, f"to-host {GPU}")
    assert condition(machine, *FUNCTIONS) == before
