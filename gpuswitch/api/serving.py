"""Method calls from others: who calls, what is called, whether they may, and an answer in every case.

This is ours and not the library's, which sends tracebacks to the caller, or no answer at all to a call that was
cancelled. Here, whatever goes wrong, the caller gets an error with a name and one sentence.

A call that may take a while belongs to a user, who can have `MOST_CALLS` under way, and ends when its caller leaves the
bus, unless it was let through and outlives that (`Member.outlives`).
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Final, Protocol

from gpuswitch.api.connection import Connection, Message, MessageFlag
from gpuswitch.api.interface import Interface, Member
from gpuswitch.api.signatures import pack, plain
from gpuswitch.api.standard import StandardError, Tree, below
from gpuswitch.api.users import Users
from gpuswitch.errors import Failed, GpuswitchError, NotAuthorized

logger = logging.getLogger(__name__)

MOST_CALLS: Final = 64
"""Calls of one user, root excepted, that are under way at once, over all connections."""
MOST_UNKNOWN: Final = 16
"""Calls of one connection that wait until the bus has told whose it is."""

GONE: Final = "you have left the bus"

_caller: ContextVar[Caller] = ContextVar("_caller")


@dataclass(frozen=True, slots=True)
class Caller:
    """Whoever called: the unique name of the connection, its user, and whether that allows that a person is asked."""

    name: str
    user: int
    may_be_asked: bool


def caller() -> Caller:
    """Whoever called the method that is being served. Raises LookupError outside of one that waits."""
    return _caller.get()


class Authority(Protocol):
    """Says who may do what (`gpuswitch.api.authority`)."""

    async def permit(self, caller: Caller, action: str, about: Mapping[str, str]) -> None:
        """Return if the caller may; raises GpuswitchError if not."""


@dataclass(eq=False)
class Call:
    """One that may take a while. `begun`: it was let through, and the method runs."""

    message: Message
    method: Member
    task: asyncio.Task[object] | None = None
    begun: bool = False


@dataclass
class Connected:
    """A connection that has calls under way. `user` is None, and it is asked for, until the bus has told.

    `gone`: it has left the bus. What it had sent before may come later than that.
    """

    calls: set[Call] = field(default_factory=set)
    user: int | None = None
    asking: asyncio.Task[None] | None = None
    gone: bool = False


class Server:
    """Serves calls to the objects in `tree`; `everywhere` makes the interfaces of a path that only leads to objects.

    `watch_names`: have a function called with the name of each connection that leaves the bus; None: no longer.
    """

    def __init__(
        self,
        connection: Connection,
        tree: Tree,
        everywhere: Callable[[str], list[Interface]],
        users: Users,
        watch_names: Callable[[Callable[[str], None] | None], None],
    ) -> None:
        self.authority: Authority | None = None
        """While there is none, nobody may do what not everybody may."""
        self._connection = connection
        self._tree = tree
        self._everywhere = everywhere
        self._users = users
        self._watch_names = watch_names
        self._connected: dict[str, Connected] = {}
        self._of_user: Counter[int] = Counter()

    async def stop(self) -> None:
        """Cancel the calls that are still served; each is answered with an error."""
        tasks = []
        for connected in self._connected.values():
            tasks += [call.task for call in connected.calls if call.task]
            tasks += [connected.asking] if connected.asking else []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def serve(self, message: Message) -> None:
        """Run the method that `message` calls, and answer now or, if that may take a while, when it returns."""
        try:
            interface, method = self._find(message)
            if method.action or method.waits:
                self._begin(Call(message, method))
            else:
                self._answer(message, method, method.function(interface, *_arguments(message)))
        except Exception as error:  # noqa: BLE001 -- whatever it was: it is logged, and the caller gets an answer
            self._answer_error(message, error)

    # Calls that may take a while

    def _begin(self, call: Call) -> None:
        """Run it, once it is known whose it is. Raises StandardError where they have too many already."""
        name = str(call.message.sender)
        if not self._connected:
            self._watch_names(self._left)
        connected = self._connected.setdefault(name, Connected())
        if connected.gone:
            raise Failed(f"cannot serve {call.method.name}: {GONE}")
        user = connected.user
        if user is None:
            if len(connected.calls) >= MOST_UNKNOWN:
                raise StandardError(
                    "LimitsExceeded", f"cannot serve more than {MOST_UNKNOWN} of your calls at once yet"
                )
            connected.calls.add(call)
            if connected.asking is None:
                connected.asking = asyncio.create_task(self._identify(name, connected))
            return
        self._check(user)
        connected.calls.add(call)
        self._run(call, connected, user)

    async def _identify(self, name: str, connected: Connected) -> None:
        """Ask the bus whose connection this is, and run what it has called meanwhile."""
        user: int | None = None
        why = "it was cancelled"
        try:
            user = connected.user = await self._users.of(name)
            if connected.gone:
                user, why = None, GONE
        except GpuswitchError as error:
            why = f"nobody knows who you are: {error}"
        finally:
            connected.asking = None
            for call in list(connected.calls):
                try:
                    if user is None:
                        raise Failed(f"cannot finish {call.method.name}: {why}")
                    self._check(user)
                    self._run(call, connected, user)
                except (GpuswitchError, StandardError) as error:
                    connected.calls.discard(call)
                    self._answer_error(call.message, error)
            self._forget(name, connected)

    def _check(self, user: int) -> None:
        if user and self._of_user[user] >= MOST_CALLS:
            raise StandardError("LimitsExceeded", f"cannot serve more than {MOST_CALLS} calls of one user at once")

    def _run(self, call: Call, connected: Connected, user: int) -> None:
        message = call.message
        who = Caller(str(message.sender), user, bool(message.flags & MessageFlag.ALLOW_INTERACTIVE_AUTHORIZATION))
        self._of_user[user] += 1
        call.task = asyncio.create_task(self._work(call, who))
        call.task.add_done_callback(lambda task: self._finish(call, connected, user, task))

    async def _work(self, call: Call, who: Caller) -> object:
        """What the method returns, once its caller has been allowed all that it needs.

        An answer may take long: the object may be gone by then, or the configuration another. So all is looked at
        again after each.
        """
        _caller.set(who)
        granted: set[str] = set()
        while True:
            interface, method = self._find(call.message)
            arguments = _arguments(call.message)
            missing = next((each for each in interface.actions(method, arguments) if each not in granted), None)
            if missing is None:
                break
            if self.authority is None:
                raise NotAuthorized(f"nobody may {missing} here")
            await self.authority.permit(who, missing, interface.about(method, arguments))
            granted.add(missing)
        call.begun = True
        result = method.function(interface, *arguments)
        return await result if method.waits else result

    def _finish(self, call: Call, connected: Connected, user: int, task: asyncio.Task[object]) -> None:
        connected.calls.discard(call)
        self._of_user[user] -= 1
        if not self._of_user[user]:
            del self._of_user[user]
        self._forget(str(call.message.sender), connected)
        try:
            self._answer(call.message, call.method, task.result())
        except asyncio.CancelledError:
            self._answer_error(call.message, self._why_cancelled(call))
        except Exception as error:  # noqa: BLE001 -- whatever it was: it is logged, and the caller gets an answer
            self._answer_error(call.message, error)

    def _why_cancelled(self, call: Call) -> Exception:
        try:
            self._find(call.message)
        except StandardError as error:  # what it was about is gone
            return error
        return Failed(f"cannot finish {call.method.name}: it was cancelled")

    def _forget(self, name: str, connected: Connected) -> None:
        if not connected.calls and connected.asking is None and self._connected.get(name) is connected:
            del self._connected[name]
            if not self._connected:
                self._watch_names(None)

    @property
    def calls(self) -> int:
        """How many are under way."""
        return sum(len(connected.calls) for connected in self._connected.values())

    def called_by(self, name: str) -> list[str]:
        """The methods that calls of this connection are under way to."""
        connected = self._connected.get(name)
        return [call.method.name for call in connected.calls] if connected else []

    def object_gone(self, path: str) -> None:
        """There is none there any more: whoever is being asked whether a call of it may go on need not answer."""
        for connected in self._connected.values():
            for call in connected.calls:
                if call.task and call.message.path == path and not call.begun:
                    call.task.cancel()

    def _left(self, name: str) -> None:
        """This connection is gone: nobody waits for what it has called."""
        if connected := self._connected.get(name):
            connected.gone = True
            for call in connected.calls:
                if call.task and not (call.begun and call.method.outlives):
                    call.task.cancel()

    # What is called, and the answer

    def _find(self, message: Message) -> tuple[Interface, Member]:
        """The method that `message` calls. Raises StandardError if there is none or it takes other arguments."""
        interfaces = self._interfaces_at(message.path)
        candidates = [each for each in interfaces if message.interface in (each.dbus_name, None)]
        if not candidates:
            raise StandardError("UnknownInterface", f"{message.path} has no interface {message.interface}")
        for each in candidates:  # the interface may be left out (specification, Message Types): the first match serves
            if method := each.methods.get(message.member):
                break
        else:
            raise StandardError("UnknownMethod", f"{message.path} has no method {message.member}")
        if message.signature != method.signature:
            raise StandardError("InvalidArgs", f'{method.name} takes "{method.signature}", not "{message.signature}"')
        return each, method

    def _interfaces_at(self, path: str) -> list[Interface]:
        if path in self._tree:
            return list(self._tree[path].values())
        if path == "/" or below(self._tree, path):
            return self._everywhere(path)
        raise StandardError("UnknownObject", f"there is no object {path}")

    def _answer(self, message: Message, method: Member, result: object) -> None:
        body = [pack(method.result, result)] if method.result else []
        self._send(message, Message.new_method_return(message, method.result, body))

    def _answer_error(self, message: Message, error: Exception) -> None:
        if not isinstance(error, (GpuswitchError, StandardError)):
            logger.error("%s, called by %s, failed", message.member, message.sender, exc_info=error)
            error = Failed(f"cannot serve {message.member}: an error inside gpuswitchd, see its log")
        self._send(message, Message.new_error(message, error.dbus_name, str(error)))

    def _send(self, message: Message, answer: Message) -> None:
        if not message.flags & MessageFlag.NO_REPLY_EXPECTED:
            self._connection.send(answer)


def _arguments(message: Message) -> list[object]:
    return [plain(argument) for argument in message.body]
