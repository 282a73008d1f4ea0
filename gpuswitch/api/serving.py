"""Method calls from others: who calls, what is called, and an answer in every case.

This is ours and not the library's, which sends tracebacks to the caller, or no answer at all to a call that was
cancelled. Here, whatever goes wrong, the caller gets an error with a name and one sentence.
"""

import asyncio
import inspect
import logging
from collections.abc import Callable
from contextvars import ContextVar
from functools import partial

from gpuswitch.api.connection import Connection, Message, MessageFlag
from gpuswitch.api.interface import Interface, Member
from gpuswitch.api.signatures import pack, plain
from gpuswitch.api.standard import StandardError, Tree, below
from gpuswitch.errors import Failed, GpuswitchError

logger = logging.getLogger(__name__)

_call: ContextVar[Message] = ContextVar("_call")


def caller() -> str:
    """The unique bus name of whoever called the method that is being served. Raises LookupError outside of one."""
    return str(_call.get().sender)


def caller_may_be_asked() -> bool:
    """Whether the caller allows that polkit asks for a password. Raises LookupError outside of a method."""
    return bool(_call.get().flags & MessageFlag.ALLOW_INTERACTIVE_AUTHORIZATION)


class Server:
    """Serves calls to the objects in `tree`; `everywhere` makes the interfaces of a path that only leads to objects."""

    def __init__(self, connection: Connection, tree: Tree, everywhere: Callable[[str], list[Interface]]) -> None:
        self._connection = connection
        self._tree = tree
        self._everywhere = everywhere
        self._tasks: set[asyncio.Task[object]] = set()

    async def stop(self) -> None:
        """Cancel the calls that are still served; each is answered with an error."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def serve(self, message: Message) -> None:
        """Run the method that `message` calls, and answer now or, if it is async, when it returns."""
        token = _call.set(message)
        try:
            interface, method = self._find(message)
            result = method.function(interface, *(plain(argument) for argument in message.body))
            if inspect.iscoroutine(result):
                task = asyncio.create_task(result)
                self._tasks.add(task)
                task.add_done_callback(partial(self._finish, message, method))
            else:
                self._answer(message, method, result)
        except Exception as error:  # noqa: BLE001 -- whatever it was: it is logged, and the caller gets an answer
            self._answer_error(message, error)
        finally:
            _call.reset(token)

    def _finish(self, message: Message, method: Member, task: asyncio.Task[object]) -> None:
        self._tasks.discard(task)
        try:
            self._answer(message, method, task.result())
        except asyncio.CancelledError:
            self._answer_error(message, Failed(f"cannot finish {method.name}: it was cancelled"))
        except Exception as error:  # noqa: BLE001 -- whatever it was: it is logged, and the caller gets an answer
            self._answer_error(message, error)

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
