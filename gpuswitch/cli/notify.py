"""`gpuswitchctl notify`: tells a desktop when a switch ends or needs somebody. Run in the user's own session."""

from __future__ import annotations

from argparse import Namespace

from jeepney import DBusAddress, MessageType, new_method_call
from jeepney.io.blocking import DBusConnection, open_dbus_connection

from gpuswitch.cli.client import ANSWER_SECONDS, BAD_ADDRESS, CANNOT_CONNECT, Gpu, Service
from gpuswitch.cli.failures import CtlError
from gpuswitch.cli.follow import StepChange, Waiting
from gpuswitch.cli.output import clean, clock, problem
from gpuswitch.cli.records import state_label
from gpuswitch.cli.translate import _, recognized, state_word
from gpuswitch.cli.watching import Watching
from gpuswitch.errors import EXIT_UNREACHABLE

_NOTIFICATIONS = DBusAddress(
    "/org/freedesktop/Notifications", "org.freedesktop.Notifications", "org.freedesktop.Notifications"
)
_LOW, _NORMAL, _CRITICAL = 0, 1, 2
"""Urgency levels, by the Desktop Notifications Specification."""
_BY_THE_DESKTOP = -1
"""When it expires."""


def notify(service: Service, args: Namespace) -> int:
    """Until it is ended, or either bus is lost."""
    Watching(service, args.gpus, _Notifier(_session_bus())).for_ever()
    return 0


def _session_bus() -> DBusConnection:
    try:
        return open_dbus_connection("SESSION", auth_timeout=ANSWER_SECONDS)
    except (*CANNOT_CONNECT, *BAD_ADDRESS) as error:
        reason = getattr(error, "strerror", None) or error
        if isinstance(error, KeyError):  # as jeepney raises it
            reason = _("the variable {variable} is not set", variable=error.args[0])
        text = _("cannot connect to the bus of this session: {reason}; run this in a desktop's session", reason=reason)
        raise CtlError(text, EXIT_UNREACHABLE, name="Unreachable") from error


class _Notifier:
    """One notification for each GPU, which the next one about it replaces."""

    def __init__(self, connection: DBusConnection) -> None:
        self._connection = connection
        self._shown: dict[str, int] = {}
        self._first = set[str]()
        self._complained = False

    def service(self, text: str, *, running: bool) -> None:
        """Switches that are cut short are told of when it is there again: they end then."""

    def state(self, gpu: Gpu) -> None:
        state = gpu.properties["State"]
        # How it was when this began is no news.
        if gpu.path in self._first and state in {"failed", "wedged"}:
            self._show(
                gpu,
                _("{gpu} is {state}", gpu=_name(gpu), state=state_word(state)),
                gpu.properties["Reason"],
                _CRITICAL,
            )
        self._first.add(gpu.path)

    def under_way(self, gpu: Gpu, change: StepChange, waiting: Waiting | None) -> None:  # noqa: ARG002 -- nobody needs it
        """Somebody may have to do something about it, whenever that was begun."""
        if waiting is not None and waiting.until:
            self.waits(gpu, "", waiting)

    def lasts(self, gpu: Gpu, switch: str, change: StepChange) -> None:
        """Nobody has to do anything about it."""

    def gone(self, gpu: Gpu) -> None:
        self._first.discard(gpu.path)

    def step(self, gpu: Gpu, switch: str, change: StepChange) -> None:
        """Nothing that anybody has to do anything about."""

    def waits(self, gpu: Gpu, _switch: str, waiting: Waiting) -> None:
        self._show(
            gpu,
            _("{gpu} waits until {time}", gpu=_name(gpu), time=clock(waiting.until)),
            waiting.what,
            _NORMAL,
        )

    def finished(self, gpu: Gpu, _switch: str, result: str, reason: str) -> None:
        if result == "done":
            self._show(gpu, _("{gpu} is {state} now", gpu=_name(gpu), state=state_label(gpu.properties)), reason, _LOW)
        else:
            urgency = _CRITICAL if result in {"failed", "wedged"} else _NORMAL
            self._show(
                gpu, _("The switch of {gpu} is {result}", gpu=_name(gpu), result=state_word(result)), reason, urgency
            )

    def _show(self, gpu: Gpu, summary: str, body: str, urgency: int) -> None:
        sentences = "\n".join(map(_plain, recognized(body).splitlines()))
        hints = {"urgency": ("y", urgency), "desktop-entry": ("s", "gpuswitch")}
        actions: list[str] = []
        texts = "video-display", clean(summary), sentences
        arguments = ("gpuswitch", self._shown.get(gpu.path, 0), *texts, actions, hints, _BY_THE_DESKTOP)
        message = new_method_call(_NOTIFICATIONS, "Notify", "susssasa{sv}i", arguments)
        try:
            reply = self._connection.send_and_get_reply(message, timeout=ANSWER_SECONDS)
        except TimeoutError:
            self._complain(_("the desktop did not answer"))
        except OSError as error:
            text = _("the bus of this session is lost: {reason}", reason=error.strerror or error)
            raise CtlError(text, EXIT_UNREACHABLE, name="Unreachable") from error
        else:
            if reply.header.message_type is MessageType.error:
                self._complain(str(reply.body[0]) if reply.body else _("the desktop shows no notifications"))
            else:
                self._shown[gpu.path] = int(reply.body[0])

    def _complain(self, why: str) -> None:
        """Once: a desktop that shows none now may do so later."""
        if not self._complained:
            problem(_("cannot show a notification: {why}", why=why))
        self._complained = True


def _name(gpu: Gpu) -> str:
    known = gpu.properties
    return str(known["Name"] or known["Model"] or known["Address"])


def _plain(text: str) -> str:
    """Without markup, which a body may have."""
    return clean(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
