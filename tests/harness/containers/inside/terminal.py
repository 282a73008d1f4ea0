"""Run a command on a terminal of its own and answer a question: `terminal.py WORD ANSWER COMMAND...`.

ANSWER is typed each time that WORD is shown ("": it never is). Says what the terminal shows, at once, and ends as the
command.
"""

from __future__ import annotations

import os
import pty
import select
import sys
import termios


def main() -> int:
    word, answer, *command = sys.argv[1:]
    pid, terminal = pty.fork()
    if pid == 0:
        os.execvp(command[0], command)  # noqa: S606 -- what it is for
    shown, seen = b"", 0
    while True:
        try:
            more = os.read(terminal, 4096)
        except OSError:  # EIO: nobody has the other end open
            break
        if not more:
            break
        shown += more
        sys.stdout.write(more.decode(errors="replace").replace("\r\n", "\n"))
        sys.stdout.flush()
        if word and (at := shown.find(word.encode(), seen)) >= 0:
            seen = at + len(word)
            # Who asks for a secret throws away what was typed before it has switched the echo off.
            while termios.tcgetattr(terminal)[3] & termios.ECHO:
                select.select([], [], [], 0.01)
            os.write(terminal, answer.encode() + b"\n")
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


if __name__ == "__main__":
    sys.exit(main())
