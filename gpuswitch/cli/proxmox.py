"""`setup proxmox`: virtual machines of Proxmox VE ask for their GPUs by a hookscript; and back.

It shows what it would do, asks, puts the script on a storage that has snippets, and has `qm` name it in the machines
that get a managed GPU. What is on this node it sees as the doctor does; of GPUs it asks the service.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

from gpuswitch.cli.asking import agree, refuse_unasked
from gpuswitch.cli.client import Gpu, Service
from gpuswitch.cli.failures import CtlError
from gpuswitch.cli.kept_files import STATE, KeptFiles
from gpuswitch.cli.other_programs import run
from gpuswitch.cli.output import as_json, clean, line, write
from gpuswitch.cli.simulated import tell_of_another_machine
from gpuswitch.cli.translate import _
from gpuswitch.doctor.looks.proxmox import SCRIPT, machines, place_of, template
from gpuswitch.doctor.machine import Files, Machine
from gpuswitch.doctor.seen import ProxmoxMachine
from gpuswitch.errors import Failed, InvalidArgument, NotAuthorized


class _Planned(NamedTuple):
    """What is to be done. `before`: each machine with its GPUs; `volume` lies at `place`; `sets` get that volume."""

    machines: Mapping[ProxmoxMachine, Sequence[Gpu]]
    volume: str
    place: Path
    script: bytes
    writes: bool
    sets: Sequence[ProxmoxMachine]

    @property
    def changes(self) -> bool:
        return self.writes or bool(self.sets)

    @property
    def commands(self) -> list[list[str]]:
        return [["qm", "set", each.vmid, "--hookscript", self.volume] for each in self.sets]


def setup(args: Namespace, machine: Machine | None = None, state: Path = STATE) -> int:
    """Ask, show, and do it.

    Raises:
        CtlError: nothing was changed; or the text says what was, and what was not.
    """
    if machine is None:
        tell_of_another_machine(args.bus, writes=not args.dry_run)
    machine = machine or Machine()
    files = Files(machine)
    _refuse_what_makes_no_sense(args, machine, files)
    with closing(Service.connect(args.bus)) as service:
        gpus = [gpu for gpu in service.gpus() if gpu.properties["Managed"]]
    planned = _planned(args, files, gpus)
    if not args.json:
        _tell(planned)
    if planned.changes and not args.dry_run:
        if not args.yes:
            agree(_("Do this? [y/N] "))
        _do(planned, files, KeptFiles(state))
    if args.json:
        as_json(_record(args, planned))
    elif args.dry_run:
        line(_("nothing is changed: this was a dry run"))
    elif planned.changes:
        line(_("done; to take it back: {command}", command="gpuswitchctl setup undo"))
    return 0


def take_back(kept: KeptFiles, machine: Machine) -> list[str]:
    """Take the script that is about to be removed from the machines that have it: without it they would not start.

    One that was there before is only put back, and stays theirs. What was run, a command each.

    Raises:
        CtlError: a machine still has it; the text says which, and nothing else is changed.
    """
    done = []
    for name, command in to_take_back(kept, machine).items():
        if (fault := run(Files(machine), command)) is not None:
            text = _(
                "cannot take the hookscript from {machine}: {why}; it stays, and so does all that setup "
                "wrote: {command}",
                machine=name,
                why=fault,
                command=" ".join(command),
            )
            raise CtlError.of(Failed, text)
        done.append(" ".join(command))
    return done


def to_take_back(kept: KeptFiles, machine: Machine) -> dict[str, list[str]]:
    """What `take_back` would run, by the name of the machine.

    Raises:
        CtlError: as that.
    """
    scripts = [file for file in kept.added() if file.name == SCRIPT]
    if not scripts:
        return {}
    files = Files(machine)
    _refuse_those_of_other_nodes(files)
    return {
        each.name: ["qm", "set", each.vmid, "--delete", "hookscript"]
        for each in machines(files)
        if each.hookscript and Path(machine.path(place_of(files, each.hookscript))) in scripts
    }


# What makes no sense -------------------------------------------------------------------------------------------------


def _refuse_what_makes_no_sense(args: Namespace, machine: Machine, files: Files) -> None:
    if not files.program("pveversion"):
        text = _("cannot set up Proxmox VE: this is no node of it, there is no pveversion")
        raise CtlError.of(InvalidArgument, text)
    if not machine.as_root:
        text = _("cannot read /etc/pve: it takes root: {command}", command="sudo gpuswitchctl setup proxmox")
        raise CtlError.of(NotAuthorized, text)
    refuse_unasked(args, "gpuswitchctl setup proxmox --help")


def _refuse_those_of_other_nodes(files: Files) -> None:
    """On a storage that nodes share they have it, too, and `qm` is for those of this node."""
    for node in files.names("/etc/pve/nodes"):
        if node == _node():
            continue
        for place in files.below([f"/etc/pve/nodes/{node}/qemu-server"], ".conf"):
            if f"/{SCRIPT}\n" in files.text(place).partition("\n[")[0] + "\n":
                vmid = place.rpartition("/")[2].removesuffix(".conf")
                text = _(
                    "cannot take the script away: VM {vmid} of the node {node} may have it, too; run there: {command}",
                    vmid=vmid,
                    node=node,
                    command=f"qm set {vmid} --delete hookscript",
                )
                raise CtlError.of(Failed, text)


def _node() -> str:
    import os  # noqa: PLC0415 -- for who asks

    return os.uname().nodename.partition(".")[0]


# What is to be done --------------------------------------------------------------------------------------------------


def _planned(args: Namespace, files: Files, gpus: Sequence[Gpu]) -> _Planned:
    known = list(machines(files))
    chosen = {each: _gpus_of(each, gpus) for each in _chosen(args.vmids, known, gpus)}
    if not (source := template(files)):
        raise CtlError.of(Failed, _("cannot find {program}; install gpuswitch anew", program=SCRIPT))
    for each in chosen:
        _refuse_unfit(each, source)
    volume = _volume(args.storage, chosen, files)
    place = place_of(files, volume)
    if not place.startswith("/"):
        raise CtlError.of(Failed, _("cannot tell where {volume} lies: no answer from pvesm", volume=volume))
    script = files.text(source)
    writes = files.text(place) != script or not files.executable(place)
    sets = [each for each in chosen if each.script != "ours" and each.hookscript != volume]
    return _Planned(chosen, volume, Path(files.machine.path(place)), script.encode(), writes, sets)


def _chosen(vmids: Sequence[str], known: Sequence[ProxmoxMachine], gpus: Sequence[Gpu]) -> list[ProxmoxMachine]:
    if vmids:
        by_number = {each.vmid: each for each in known}
        for vmid in vmids:
            if vmid not in by_number:
                there = ", ".join(by_number) or _("none")
                text = _("this node has no virtual machine {vmid}; there are: {names}", vmid=vmid[:40], names=there)
                raise CtlError.of(InvalidArgument, text)
        return list({vmid: by_number[vmid] for vmid in vmids}.values())
    if not gpus:
        text = _("no GPU is managed, so no machine needs a hookscript; first: {command}", command="gpuswitchctl setup")
        raise CtlError.of(InvalidArgument, text)
    found = [each for each in known if _gpus_of(each, gpus)]
    if not found:
        text = _(
            "no virtual machine of this node has a managed GPU; give one to it: {command}",
            command=f"qm set VMID --hostpci0 {gpus[0].address[:-2]},pcie=1",
        )
        raise CtlError.of(InvalidArgument, text)
    return found


def _gpus_of(machine: ProxmoxMachine, gpus: Sequence[Gpu]) -> list[Gpu]:
    return [gpu for gpu in gpus if machine.gets(each[0] for each in gpu.properties["Functions"])]


def _refuse_unfit(machine: ProxmoxMachine, source: str) -> None:
    if machine.fault:
        text = _("cannot set up {machine}: {why}; nothing is changed", machine=machine.name, why=machine.fault)
        raise CtlError.of(Failed, text)
    if machine.script == "foreign":
        text = _(
            "cannot set the hookscript of {machine}: it has another one, {volume}; have that one run ours first, by a "
            "line of its own: {line}; nothing is changed",
            machine=machine.name,
            volume=machine.hookscript,
            line=f'sh {source} "$1" "$2" || exit',
        )
        raise CtlError.of(Failed, text)


def _volume(storage: str, chosen: Mapping[ProxmoxMachine, object], files: Files) -> str:
    """Where one of the machines has it already, else on this storage, else on `local`, else on the first one."""
    if not storage and (has := [each.hookscript for each in chosen if each.hookscript.endswith(f"/{SCRIPT}")]):
        return has[0]
    said = files.asked("pvesm", "status", "--content", "snippets")
    rows = [row.split() for row in (said or "").splitlines()[1:]]
    fit = [row[0] for row in rows if len(row) > 2 and row[2] == "active"]
    if storage and storage not in fit:
        there = ", ".join(fit) or _("none")
        text = _("the storage {name} takes no snippets; those that do: {names}", name=storage[:80], names=there)
        raise CtlError.of(InvalidArgument, text)
    if not fit:
        text = _(
            "no storage of this node takes snippets, where hookscripts lie; to have one take them: {command}",
            command=f"pvesm set local --content {_content_of_local(files)},snippets",
        )
        raise CtlError.of(Failed, text)
    name = storage or ("local" if "local" in fit else fit[0])
    return f"{name}:snippets/{SCRIPT}"


def _content_of_local(files: Files) -> str:
    """What `local` takes now (/etc/pve/storage.cfg): `pvesm set` replaces all of it."""
    section = ""
    for each in files.lines("/etc/pve/storage.cfg"):
        words = each.split(None, 1)
        if each[:1].strip():
            section = each
        elif section == "dir: local" and words[:1] == ["content"]:
            return words[-1].strip()
    return "iso,vztmpl,backup"


# What is said and done -----------------------------------------------------------------------------------------------


def _tell(planned: _Planned) -> None:
    for machine, gpus in planned.machines.items():
        named = ", ".join(gpu.title for gpu in gpus) or _("no managed GPU")
        if machine in planned.sets:
            line(_("{machine}: {gpus}", machine=machine.name, gpus=named))
        else:
            line(_("{machine}: {gpus}; it has the hookscript already", machine=machine.name, gpus=named))
    if not planned.changes:
        line(_("nothing is to be done: {file} is of this version", file=planned.place))
        return
    if planned.writes:
        line(_("{file} is to be written, executable: the script that asks for the GPUs", file=planned.place))
    if planned.commands:
        line(_("these commands are to be run:"))
    for command in planned.commands:
        write(f"  {clean(' '.join(command))}")


def _do(planned: _Planned, files: Files, kept: KeptFiles) -> None:
    """The script first: a machine that names one which is not there does not start."""
    if planned.writes:
        kept.write({planned.place: planned.script}, mode=0o755)
    for machine, command in zip(planned.sets, planned.commands, strict=True):
        if (fault := run(files, command)) is not None:
            text = _(
                "cannot set the hookscript of {machine}: {why}; what came before is done; once that is "
                "mended: {command}",
                machine=machine.name,
                why=fault,
                command="gpuswitchctl setup proxmox",
            )
            raise CtlError.of(Failed, text)


def _record(args: Namespace, planned: _Planned) -> dict[str, Any]:
    """docs/json.md has the form."""
    return {
        "path": str(planned.place),
        "volume": planned.volume,
        "changed": planned.changes and not args.dry_run,
        "dry_run": args.dry_run,
        "machines": [
            {
                "vmid": int(machine.vmid),
                "name": machine.name,
                "gpus": [gpu.address for gpu in gpus],
                "hookscript": machine.hookscript,
                "sets": machine in planned.sets,
            }
            for machine, gpus in planned.machines.items()
        ],
        "commands": [" ".join(command) for command in planned.commands],
    }
