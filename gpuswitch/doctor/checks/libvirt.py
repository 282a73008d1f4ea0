"""Of libvirt, and of what keeps its hook from its work."""

from __future__ import annotations

from collections.abc import Iterator

from gpuswitch.doctor import remedies
from gpuswitch.doctor.findings import Said, ok, problem, warning
from gpuswitch.doctor.looks.libvirt import HOOKS, OWN
from gpuswitch.doctor.looks.units import LIBVIRT
from gpuswitch.doctor.seen import Seen
from gpuswitch.sentence import Sentence

_HOOK_FOLDERS = (6, 5, 0)
"""Since when libvirt runs what lies in qemu.d (docs/hooks.rst)."""


def version(seen: Seen) -> Iterator[Said]:
    found = seen.libvirt.version
    if found is None:
        yield ok(Sentence("libvirt is not installed"))
        return
    text = ".".join(map(str, found[:2]))
    if found < _HOOK_FOLDERS:
        yield problem(
            Sentence(
                "libvirt {version} runs no hooks of {folder}: no virtual machine gets a GPU",
                version=text,
                folder="qemu.d",
            ),
            Sentence("install libvirt 6.5 or later"),
        )
    else:
        daemons = [name for name in LIBVIRT if seen.unit(name).active]
        yield ok(
            Sentence("libvirt {version}, {daemon} runs", version=text, daemon=daemons[0])
            if daemons
            else Sentence("libvirt {version}, started when it is asked", version=text)
        )


def hook(seen: Seen) -> Iterator[Said]:
    if seen.libvirt.version is None:
        return
    own = seen.libvirt.own
    if any(each.what == OWN for each in seen.unseen):
        return
    again, commands = remedies.put_hook(seen.system, packaged=seen.installation.packaged)
    if own is None:
        yield problem(
            Sentence("the hook is missing: {path}; no virtual machine gets a GPU by itself", path=OWN), again, commands
        )
        return
    if not own.wants:
        yield problem(
            Sentence("{path} is not the hook of gpuswitch: no virtual machine gets a GPU by itself", path=OWN),
            Sentence("give it another name; then {again}", again=again),
            (f"mv -n {OWN} {HOOKS}/qemu.d/60-other", *commands),
        )
        return
    if not own.executable:
        yield problem(
            Sentence("the hook is not executable, so libvirt passes it over: {path}", path=OWN),
            Sentence("make it so"),
            (f"chmod 0755 {OWN}",),
        )
        return
    if not own.wanted_there:
        yield problem(
            Sentence("the hook needs {file}, which is not there: no virtual machine starts", file=own.wants),
            *remedies.install_again(seen.system, packaged=seen.installation.packaged),
        )
        return
    if deaf := _deaf(seen):
        yield warning(
            Sentence("{daemon} was started before this hook came, and may know of none", daemon=deaf),
            Sentence("have it look again"),
            (f"systemctl reload {deaf}",),
        )
    else:
        yield ok(Sentence("the hook is installed, and libvirt runs it"))


def _deaf(seen: Seen) -> str:
    """The daemon that found no hook for QEMU when it started, and was not told to look again ("" none).

    virHookCheck (src/util/virhook.c) is called at the start and at a reload. A reload changes the state of the unit.
    """
    own = seen.libvirt.own
    for name in LIBVIRT:
        since = seen.unit(name).changed
        if own is None or not seen.unit(name).active or not since:
            continue
        hooks = [own, *seen.libvirt.others]
        if not any(each.executable and each.changed < since + 1 for each in hooks):
            return name
    return ""


def access(seen: Seen) -> Iterator[Said]:
    """SELinux, AppArmor: what the hook may do is what libvirt's daemon may."""
    if seen.libvirt.version is None:
        return
    system = seen.system
    if system.selinux_enforcing and system.selinux_hooks_unconfined is False:
        yield warning(
            Sentence(
                "SELinux is enforcing and confines hooks: ours may not reach the service (virt_hooks_unconfined is off)"
            ),
            Sentence("let them run unconfined"),
            ("setsebool -P virt_hooks_unconfined on",),
        )
    elif system.selinux_enforcing and system.selinux_hooks_unconfined is None:
        # Debian's policy labels hooks as settings, which virtd_t may not execute; and then no machine starts.
        yield warning(
            Sentence(
                "SELinux is enforcing, and its policy has no switch for hooks: libvirt may not be allowed to run ours, "
                "and starts no machine then"
            ),
            Sentence("look for what was denied; docs/libvirt.md says what to allow"),
            ("ausearch -m avc,user_avc -ts boot",),
        )
    elif system.selinux_enforcing:
        yield ok(Sentence("SELinux is enforcing, and lets hooks run"))
    elif system.apparmor:
        own = seen.libvirt.own
        if own is not None and own.wants and not own.wants.startswith(("/usr/", "/etc/libvirt/hooks/")):
            yield warning(
                Sentence("AppArmor's profile of libvirt may keep the hook from {file}", file=own.wants),
                *_below_usr(seen),
            )
        else:
            yield ok(Sentence("AppArmor lets libvirt's hooks run"))
    else:
        yield ok(Sentence("neither SELinux nor AppArmor confines libvirt's hooks"))


def _below_usr(seen: Seen) -> tuple[Sentence, tuple[str, ...]]:
    # A package's hook is below /usr, so this one is left from before; NixOS has no other place than its store.
    if seen.installation.packaged or seen.system.family == "nixos":
        return remedies.put_hook(seen.system, packaged=True)
    return (
        Sentence("install gpuswitch below {folder}, in its sources", folder="/usr"),
        ("make install PREFIX=/usr/local",),
    )
