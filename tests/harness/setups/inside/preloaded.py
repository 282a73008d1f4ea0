"""Programs of the tests that are there at once: forked from a process that has imported them.

    preloaded.py FOLDER MODULE...

Run with the service's own Python. A line of JSON in the fifo FOLDER/ask is what to run: `[NUMBER, MODULE, ARGUMENTS,
INPUT]`. Its module's main() has these arguments, and INPUT on its standard input; what it says is in FOLDER/NUMBER.out
and .err, and in .status what it has ended with.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import sys
import traceback
from pathlib import Path
from types import ModuleType


class Preloaded:
    def __init__(self, folder: Path, modules: list[str]) -> None:
        self._folder = folder
        self._modules = {name: importlib.import_module(name) for name in modules}

    def serve(self) -> None:
        # Else each program would copy all of it as soon as it looks for garbage.
        gc.freeze()
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        # Also for writing: it does not end between two who ask.
        with os.fdopen(os.open(self._folder / "ask", os.O_RDWR)) as asked:
            (self._folder / "ready").touch()
            for line in asked:
                number, name, arguments, text = json.loads(line)
                if os.fork() == 0:
                    os.setsid()
                    self._see_to(number, self._modules[name], arguments, text)
                    os._exit(0)

    def _see_to(self, number: int, module: ModuleType, arguments: list[str], text: str) -> None:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        pid = os.fork()
        if pid == 0:
            self._redirect(number, text)
            sys.argv = [module.__name__, *arguments]
            os._exit(run(module))
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        (self._folder / f"{number}.status").write_text(f"{status}\n")

    def _redirect(self, number: int, text: str) -> None:
        given = os.memfd_create("input")
        os.write(given, text.encode())
        os.lseek(given, 0, os.SEEK_SET)
        os.dup2(given, 0)
        for descriptor, name in enumerate(("out", "err"), start=1):
            os.dup2(os.open(self._folder / f"{number}.{name}", os.O_WRONLY | os.O_CREAT), descriptor)


def run(module: ModuleType) -> int:
    """What a program ends with, where Python would run it."""
    status = 1
    try:
        status = int(module.main() or 0)
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else 1
    except BaseException:  # noqa: BLE001 -- whatever it is: said as Python says it
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    return status


if __name__ == "__main__":
    Preloaded(Path(sys.argv[1]), sys.argv[2:]).serve()
