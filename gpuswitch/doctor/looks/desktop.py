"""What draws on the screen of this machine: its display manager, and the session that is in front."""

from __future__ import annotations

from dataclasses import dataclass

from gpuswitch.doctor.looks import units
from gpuswitch.doctor.machine import Files
from gpuswitch.model.desktop import DISPLAY_MANAGER, DISPLAY_MANAGERS

SEAT = "seat0"
_OF_A_LOGIN = "login"
"""The PAM service of a text console (login(1)): who came so has started the desktop by hand, if there is one."""
_PLASMA = ("kde", "plasma")
_OUTLIVED = ("gdm", "gdm3", "plasmalogin", "sddm")
"""Display managers whose sessions were seen to stay when they end."""


@dataclass(frozen=True, slots=True)
class Session:
    """A session of logind. `type`: x11, wayland, tty, mir, unspecified; `desktop`: as XDG has it, often ""; `service`:
    the PAM service that it began with (org.freedesktop.login1(5)).
    """

    id: str
    user: str = ""
    type: str = ""
    desktop: str = ""
    service: str = ""
    greeter: bool = False


@dataclass(frozen=True, slots=True)
class Desktop:
    """`manager`: the unit to stop, "" without a display manager; `is_really`: the unit that it is."""

    manager: str = ""
    is_really: str = ""
    session: Session | None = None

    @property
    def started_by_hand(self) -> bool:
        """Whether no display manager has begun what is on the screen: none comes back with one, either."""
        return not self.manager or (self.session is not None and self.session.service == _OF_A_LOGIN)

    @property
    def may_outlive_its_manager(self) -> bool:
        """Whether stopping the display manager may leave a session that has the GPU open."""
        words = f"{self.session.desktop} {self.session.service}".casefold() if self.session else ""
        return (
            self.started_by_hand
            or self.is_really.removesuffix(".service") in _OUTLIVED
            or any(each in words for each in _PLASMA)
        )


def look(files: Files) -> Desktop:
    manager, is_really = _manager(files)
    return Desktop(manager, is_really, _session(files))


def _manager(files: Files) -> tuple[str, str]:
    """The unit to stop, and what that is: the alias, else a known one that runs; "" where there is neither."""
    known = units.look(files, (DISPLAY_MANAGER, *DISPLAY_MANAGERS)) or {}
    if (alias := known.get(DISPLAY_MANAGER)) is not None and alias.found:
        return DISPLAY_MANAGER, alias.id
    return next(((name, unit.id) for name, unit in known.items() if unit.active), ("", ""))


def _session(files: Files) -> Session | None:
    """The one in front at the first seat; None where there is none, or no seat, or no logind."""
    seat = _values(files.asked("loginctl", "show-seat", SEAT, "--property=ActiveSession"))
    if not (name := seat.get("ActiveSession", "")):
        return None
    values = _values(
        files.asked("loginctl", "show-session", name, "--property=Name", "--property=Type", "--property=Desktop",
                    "--property=Service", "--property=Class")
    )  # fmt: skip
    return Session(
        id=name,
        user=values.get("Name", ""),
        type=values.get("Type", ""),
        desktop=values.get("Desktop", ""),
        service=values.get("Service", ""),
        greeter=values.get("Class") == "greeter",
    )


def _values(said: str | None) -> dict[str, str]:
    return dict(line.partition("=")[::2] for line in (said or "").splitlines())
