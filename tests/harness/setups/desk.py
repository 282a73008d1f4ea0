"""A person at the machine."""

from __future__ import annotations

import re
import shlex

from tests.harness.machines.errors import Result
from tests.harness.machines.inside import words
from tests.harness.setups import units
from tests.harness.setups.programs import PLACE, card, install
from tests.harness.virtual_machines.machine import Machine

USER = "tester"

SAYS = "/run/setups-says"
"""A fifo, while a word waits: the shell of who logs in writes the id of its session there, a compositor its READY=1."""

PROFILE = f"""\
if [ -p {SAYS} ]; then echo "$XDG_SESSION_ID" >{SAYS}; fi
"""

# A unit that systemd does not know yet is there at once; one that it knows would have to be read anew. A person who is
# logged out has to log in again.
AUTOLOGIN = f"""\
set -e
mkfifo -m 666 {SAYS}
sed -e 's|^ExecStart=.*|ExecStart=-/sbin/agetty --autologin {USER} --noclear %I linux|' -e '/^Restart/d' \
    -e 's|^\\[Unit\\]$|&\\nConflicts=getty@%i.service\\nAfter=getty@%i.service|' \
    /usr/lib/systemd/system/getty@.service >/run/systemd/system/autologin@.service
systemctl start --no-block autologin@tty1
read -r session <{SAYS}
rm {SAYS}
echo $session
"""

TYPE = """\
import fcntl, os, sys, termios
terminal = os.open(sys.argv[1], os.O_RDWR | os.O_NOCTTY)
for key in sys.argv[2] + "\\n":
    fcntl.ioctl(terminal, termios.TIOCSTI, key.encode())
"""

DISPLAY_MANAGER = """\
[Unit]
Description=A display manager
After=systemd-user-sessions.service

[Service]
Type=notify
Restart=always
ExecStart={place}/display_manager.py {arguments}
{more}
[Install]
Alias=display-manager.service
"""

GREETER = f"""\
ExecStartPre=+{PLACE}/display_manager.py --front 7
User={USER}
PAMName=login
TTYPath=/dev/tty7
StandardInput=tty
Environment=XDG_SESSION_TYPE=wayland XDG_SESSION_CLASS=greeter
"""


def login(machine: Machine) -> str:
    """The user tester logs in on the terminal in front; returns the id of the session, when its shell runs."""
    machine.push(PROFILE, "/etc/profile.d/setups.sh")
    return machine.sh(AUTOLOGIN).stdout.strip()


def type_line(machine: Machine, line: str) -> None:
    """Type a line on the keyboard of the terminal where the user has logged in."""
    machine.sh(f"python3 -c {shlex.quote(TYPE)} /dev/tty1 {shlex.quote(line)}")


def as_user(machine: Machine, command: str) -> Result:
    """Run a command as the user, who has logged in, with the bus of the user's service manager."""
    identity = f"--reuid={USER} --regid={USER} --init-groups"
    return machine.sh(f"setpriv {identity} env XDG_RUNTIME_DIR=/run/user/$(id -u {USER}) sh -c {shlex.quote(command)}")


def start_audio(machine: Machine) -> str:
    """Start PipeWire for the user, who has logged in; returns WirePlumber's pid, when it has every sound card open."""
    as_user(machine, "systemctl --user start wireplumber")
    pid = as_user(machine, "systemctl --user show -P MainPID wireplumber").stdout.strip()
    nodes = machine.sh("echo /dev/snd/controlC*").stdout.split()
    await_nodes(machine, pid, "all", *nodes)
    return pid


def await_nodes(machine: Machine, pid: str, wanted: str, *nodes: str) -> None:
    """Wait until a process has "all" of these nodes open, or "none"."""
    machine.sh(f"{install(machine, 'await_nodes.py')} {pid} {wanted} {' '.join(nodes)}")


def start_display_manager(machine: Machine, gpu: str, *, greeter: bool = False) -> str:
    """Enable and start fake-dm.service, which is display-manager.service, on a GPU; returns its pid.

    It is an X server of root's own on terminal 7; or, as greeter, a compositor in a session of its own there.
    """
    install(machine, "display_manager.py")
    arguments = card(gpu) if greeter else f"{card(gpu)} 7"
    text = DISPLAY_MANAGER.format(place=PLACE, arguments=arguments, more=GREETER if greeter else "")
    machine.push(text, "/etc/systemd/system/fake-dm.service")
    # as systemctl enables it
    machine.do(words.link, "fake-dm.service", "/etc/systemd/system/display-manager.service")
    units.start(machine, "fake-dm.service")
    return units.main_pid(machine, "fake-dm.service")


def start_compositor(machine: Machine, gpu: str) -> str:
    """The user, who has logged in, types the name of a compositor; returns its pid, when it has the GPU."""
    install(machine, "display_manager.py")
    machine.sh(f"mkfifo -m 666 {SAYS}")
    type_line(machine, f"{PLACE}/display_manager.py {card(gpu)} >{SAYS}")
    machine.sh(f"read -r ready <{SAYS}; rm {SAYS}; test $ready = READY=1")
    return machine.sh(f"pgrep -xu {USER} display_manager").stdout.strip()


def terminal_in_front(machine: Machine) -> str:
    """The virtual terminal that the screen and the keyboard belong to: "tty1"."""
    return machine.read("/sys/class/tty/tty0/active").strip()


def terminal_mode(machine: Machine, number: int) -> str:
    """The mode of a virtual terminal, KDGETMODE of ioctl_console(2): "graphics" or "text"."""
    ask = f"import fcntl; print(fcntl.ioctl(open('/dev/tty{number}'), 0x4B3B, bytes(4))[0])"
    return {"0": "text", "1": "graphics"}[machine.sh(f'python3 -c "{ask}"').stdout.strip()]


def frame_buffer(machine: Machine, gpu: str) -> int:
    """The number of the frame buffer of a GPU that has one."""
    [names] = machine.do(words.look, [f"/sys/bus/pci/devices/{gpu}/graphics"])
    assert names is not None
    return int(names.removeprefix("fb"))


def show_terminal_on(machine: Machine, number: int, buffer: int) -> None:
    """Map a virtual terminal to frame buffer fbN: FBIOPUT_CON2FBMAP, uapi/linux/fb.h."""
    move = f"fcntl.ioctl(open('/dev/fb{buffer}'), 0x4610, struct.pack('2I', {number}, {buffer}))"
    machine.sh(f'python3 -c "import fcntl, struct; {move}"')


def session_fields(machine: Machine, session: str) -> dict[str, str]:
    """What logind knows of a session, by loginctl's names: Class, Active, Scope, ..."""
    return dict(re.findall(r"^(\w+)=(.*)$", machine.sh(f"loginctl show-session {session}").stdout, re.MULTILINE))
