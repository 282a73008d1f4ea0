"""Who a process is, where the names of users come from a directory in the network."""

from __future__ import annotations

import os
import pwd
from threading import Event

import pytest

from gpuswitch.host.linux.scanning import identity
from gpuswitch.host.linux.scanning.identity import who


@pytest.fixture
def folder() -> int:
    """Our own, in /proc."""
    return os.open(f"/proc/{os.getpid()}", os.O_PATH | os.O_DIRECTORY)


def user(folder: int) -> str:
    found = who(folder)
    assert found is not None
    return found.user


def test_a_directory_that_does_not_answer_costs_the_name_alone(monkeypatch: pytest.MonkeyPatch, folder: int) -> None:
    """It is asked once, and heard when it answers after all."""
    name, asked, answers = pwd.getpwuid(os.getuid()).pw_name, [], Event()
    real = pwd.getpwuid

    def slow(uid: int) -> pwd.struct_passwd:
        asked.append(uid)
        answers.wait()
        return real(uid)

    monkeypatch.setattr(identity, "_NAME_SECONDS", 0.01)
    monkeypatch.setattr(pwd, "getpwuid", slow)
    assert [user(folder), user(folder)] == [str(os.getuid())] * 2
    assert asked == [os.getuid()]
    answers.set()
    identity._asked[os.getuid()].join()
    monkeypatch.setattr(identity, "_NAME_SECONDS", 60)
    assert user(folder) == name
    os.close(folder)


def test_a_user_whom_nobody_knows_is_a_number(monkeypatch: pytest.MonkeyPatch, folder: int) -> None:
    def unknown(uid: int) -> pwd.struct_passwd:
        raise KeyError(uid)

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    assert user(folder) == str(os.getuid())
    os.close(folder)
