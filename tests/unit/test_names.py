"""Whose names a report finds in what the kernel, systemd and the service write."""

from __future__ import annotations

import pytest

from gpuswitch.cli.names import names_in, uids_in


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("NVRM: Xid (PCI:0000:01:00): 31, pid=4242, name=secret game.exe, Ch 00000008", "secret game.exe"),
        ("NVRM: Xid (PCI:0000:01:00): 31, pid=4242, name=secretgame.exe, Ch 00000008", "secretgame"),
        ("NVRM: Xid (PCI:0000:01:00): 13, pid='4242', name=secretgame", "secretgame"),
        ("amdgpu: Process secretgame pid 4242 thread secretgame:cs0 pid 4250", "secretgame"),
        ("amdgpu:  Process information: process secretgame pid 4242 thread worker:cs0 pid 4250", "worker:cs0"),
        ("i915 0000:00:02.0: [drm] GPU HANG: ecode 9:1:85dffffb, in secretapp [4321]", "secretapp"),
        ("xe: Timedout job: seqno=1, flags=0x0 in secret app [4321]", "secret app"),
        ("nouveau: fifo: fault 01 on channel 2 [007f9c1000 secretgame[4321]] subc 0", "secretgame"),
        ("secretgame[4321]: segfault at 8 ip 00007f", "secretgame"),
        ("CPU: 3 PID: 1234 Comm: secretgame Tainted: P", "secretgame"),
        ('audit: pid=1 comm="secretgame" exe="/usr/games/hidden"', "secretgame"),
        ('audit: pid=1 comm="secretgame" exe="/usr/games/hidden"', "hidden"),
        ('"text": "audit: comm=\\"secretgame\\" x"', "secretgame"),
        ("INFO: task secretgame:4242 blocked for more than 120 seconds.", "secretgame"),
        ("Out of memory: Killed process 4242 (secretgame) total-vm:1kB", "secretgame"),
        ("secretgame (pid 4242, uid 1000)", "secretgame"),
        ("secretgame (pids 4242, 4243, user jdoe) has /dev/dri/card1 open", "secretgame"),
        ("secretgame (pids 4242, 4243, user jdoe) has /dev/dri/card1 open", "jdoe"),
        ("x (pid 4242, session 2 of jdoe) has /dev/dri/card1 open", "jdoe"),
        ("x (pid 4242, app.service of jdoe) has", "jdoe"),
        ("stop it: systemctl --user --machine=jdoe@ stop app.service", "jdoe"),
        ("systemctl --user --machine='EXAMPLE\\jdoe'@ stop app.service", "jdoe"),
        ("user 1500000 (jdoe) may not switch GPUs", "jdoe"),
        ("New session 2 of user jdoe.", "jdoe"),
        ("pam_unix(sudo:session): session opened for user jdoe@example.org(uid=1500000)", "jdoe"),
        ('"user": "jdoe"', "jdoe"),
        ("0000:01:00.0 belongs to the virtual machine payroll: shut that down first", "payroll"),
        ("it belongs to the virtual machine my payroll, which is about to open it", "my payroll"),
        ("the service itself, for the virtual machine payroll", "payroll"),
        ("the virtual machine payroll is done with 0000:01:00.0, which stays", "payroll"),
        ("libvirt is not there to clear up after my payroll: virtqemud.service is started", "my payroll"),
        ("clear up after payroll", "payroll"),
        ("0000:01:00.0 belongs to process secret project x (pid 5): end that first", "secret project x"),
        ("shut that down first: virsh shutdown 'my payroll'; ", "my payroll"),
        ("shut that down first: virsh shutdown payroll; ", "payroll"),
        ("machine-qemu\\x2d1\\x2dpayroll\\x2dtwo.scope", "payroll-two"),
        ('"unit": "machine-qemu\\\\x2d1\\\\x2dpayroll\\\\x2dtwo.scope"', "payroll-two"),
    ],
)
def test_a_name_is_found(text: str, name: str) -> None:
    assert name in [each for _kind, each in names_in(text)]
    assert name in [each for _kind, each in names_in(f"one line\n{text}\nand another")]


@pytest.mark.parametrize(
    "text",
    [
        "user 1500000 (:1.42) may not switch GPUs: polkit says no to org.gpuswitch1.switch",
        "it is a virtual machine: shut it down (libvirt: virsh list, then virsh shutdown NAME)",
        "virtqemud (pid 812), gpuswitchd (pid 9, uid 0), Xorg[812]: x, kworker/u8:1 (pid 3)",
        "gpu[0000:01:00.0].members[2]: is a member already",
        "the virtual machine that has it",
        "libvirt cannot be had to clear up after it: it goes on without",
        "vfio-pci 0000:01:00.0: enabling device (0000 -> 0003)",
        "CPU: 3 PID: 1234 Comm: kworker/3:1 Not tainted 6.12",
    ],
)
def test_what_is_nobodys_name_is_none(text: str) -> None:
    assert list(names_in(text)) == []


def test_user_numbers_that_a_text_names() -> None:
    text = (
        'x (pid 7, uid 1500000), "uid": 60001, user@1234.service, user-1235.slice, user 1500001 (:1.2), uid=0, uid 999'
    )
    assert uids_in(text) == {1500000, 60001, 1234, 1235, 1500001}


@pytest.mark.parametrize("text", ["x", "/x", "[a1 x", "machine-qemu-1-", "the virtual machine ", "process x "])
def test_a_long_line_is_read_as_well(text: str) -> None:
    """What takes time by the square of a line's length would stand still at one."""
    assert "end" in [name for _kind, name in names_in(f"{text * 4000} end (pid 12)")]
