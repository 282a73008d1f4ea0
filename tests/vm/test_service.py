"""gpuswitchd as a service of a real systemd, on a real system bus."""

from __future__ import annotations

from tests.machines.inside import words
from tests.vm import units
from tests.vm.guest import configure, ctl, ctl_inside, drivers, prop, snapshot, start_switch, state
from tests.vm.rig.hardware import AUDIO_DRIVER, DISPLAY_DRIVER, GPU, GPU_AUDIO, SINGLE_GPU
from tests.vm.rig.machine import Machine
from tests.vm.stage.tracer import inject


def show(machine: Machine, field: str) -> str:
    return str(units.show(machine, "gpuswitchd", field))


def test_it_runs_under_systemd_with_a_watchdog(machine: Machine) -> None:
    assert show(machine, "Type") == "notify"
    assert show(machine, "ActiveState") == "active"
    assert show(machine, "WatchdogUSec") != "0"
    assert int(show(machine, "WatchdogTimestampMonotonic")) > 0


def test_the_bus_starts_it_when_somebody_asks(machine: Machine) -> None:
    units.stop(machine, "gpuswitchd")
    assert GPU in ctl_inside(machine, "list").stdout
    assert show(machine, "ActiveState") == "active"


def test_anyone_may_look_and_root_may_switch(machine: Machine) -> None:
    look = machine.sh(f"setpriv --reuid=nobody --regid=nogroup --clear-groups gpuswitchctl status {GPU}")
    assert "host" in look.stdout
    before = snapshot(machine)
    refused = machine.sh(
        f"setpriv --reuid=nobody --regid=nogroup --clear-groups gpuswitchctl to-vfio {GPU}", check=False
    )
    assert refused.status == 4
    assert snapshot(machine) == before


def test_a_restart_leaves_a_gpu_on_vfio_and_remembers_its_home(machine: Machine) -> None:
    before = snapshot(machine)
    ctl(machine, f"to-vfio {GPU}")
    units.restart(machine, "gpuswitchd")
    assert state(machine) == "vfio"
    assert prop(machine, GPU, "HostDriver") == DISPLAY_DRIVER
    ctl(machine, f"to-host {GPU}")
    assert snapshot(machine).replace("vfio\n", "", 1) == before.replace("vfio\n", "", 1)


def test_a_gpu_that_was_on_vfio_before_the_service_started(machine: Machine) -> None:
    """Nobody saw its host driver: the one module whose aliases fit it is it, by the kernel's own tables."""
    machine.sh(
        f"""systemctl stop gpuswitchd; modprobe vfio-pci; cd /sys/bus/pci
        for f in {GPU} {GPU_AUDIO}; do echo vfio-pci >devices/$f/driver_override; done
        for f in {GPU_AUDIO} {GPU}; do echo $f >devices/$f/driver/unbind; echo $f >drivers_probe; done
        systemctl start gpuswitchd"""
    )
    assert state(machine) == "vfio"
    ctl(machine, f"to-host {GPU}")
    assert drivers(machine, GPU, GPU_AUDIO) == [DISPLAY_DRIVER, AUDIO_DRIVER]
    overrides = machine.sh(f"cat /sys/bus/pci/devices/{GPU}/driver_override").stdout
    assert overrides == "(null)\n"


def test_killed_in_the_middle_of_a_switch_it_brings_the_gpu_home(machine: Machine) -> None:
    """The journal says what is owed, and the new daemon pays before it says READY.

    The worker is stopped, from outside, as it unbinds the display; so the signal comes in the middle for sure.
    """
    before = snapshot(machine)
    inject(machine, GPU, f"/sys/bus/pci/drivers/{DISPLAY_DRIVER}/unbind", "signal=STOP:when=1")
    start_switch(machine, GPU, "ToVfio")
    machine.do(words.await_gone, f"/sys/bus/pci/devices/{GPU}/driver")
    # systemd must not start the next one before the unbind is over.
    machine.push("[Service]\nRestart=no\n", "/run/systemd/system/gpuswitchd.service.d/once.conf")
    machine.sh("systemctl daemon-reload; systemctl kill -s KILL gpuswitchd; systemctl stop gpuswitchd")
    machine.sh("pkill -CONT -f '[w]orker_main'; while pgrep -f '[w]orker_main' >/dev/null; do :; done")
    assert drivers(machine, GPU, GPU_AUDIO) == ["", ""]

    units.start(machine, "gpuswitchd")
    assert state(machine) == "host"
    assert drivers(machine, GPU, GPU_AUDIO) == [DISPLAY_DRIVER, AUDIO_DRIVER]
    assert snapshot(machine).replace("vfio\n", "", 1) == before.replace("vfio\n", "", 1)
    ctl(machine, f"to-vfio {GPU}")


def test_a_faulty_configuration_is_refused_and_the_old_one_stays(machine: Machine) -> None:
    configure(machine, f'[[gpu]]\naddress = "{SINGLE_GPU}"\nname = "spare"\n')
    assert prop(machine, SINGLE_GPU, "Name") == "spare"
    machine.push("[deadlines]\nunbnd = 3\n", "/etc/gpuswitch/conf.d/typo.toml")
    assert machine.sh("systemctl reload gpuswitchd", check=False).status != 0
    refused = machine.sh("busctl call org.gpuswitch1 /org/gpuswitch1 org.gpuswitch1.Manager Reload", check=False)
    assert refused.status != 0
    for part in ("typo.toml", "unbnd", "unbind"):
        assert part in refused.stderr
    assert prop(machine, SINGLE_GPU, "Name") == "spare"
    machine.sh("systemctl restart gpuswitchd", check=False)
    assert show(machine, "ExecMainStatus") == "2"
    assert "typo.toml" in machine.sh("journalctl -u gpuswitchd -n 5 -o cat").stdout


def test_a_second_daemon_is_turned_away(machine: Machine) -> None:
    second = machine.sh("gpuswitchd", check=False)
    assert second.status == 1
    assert "another gpuswitchd" in second.stderr
    assert state(machine) == "host"


def test_metrics_tell_where_a_gpu_is(machine: Machine) -> None:
    ctl(machine, f"to-vfio {SINGLE_GPU}")
    read = r"exec 3<>/dev/tcp/127.0.0.1/9752; printf 'GET /metrics HTTP/1.0\r\n\r\n' >&3; cat <&3"
    text = machine.sh(f'bash -c "{read}"').stdout
    assert f'gpuswitch_gpu_state{{gpu="{SINGLE_GPU}",state="vfio"}} 1.0' in text
    assert f'gpuswitch_switches_total{{gpu="{SINGLE_GPU}",result="done",target="vfio"}} 1.0' in text
