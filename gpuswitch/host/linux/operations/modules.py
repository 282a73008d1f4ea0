"""Operations that a tool does for us: modules by kmod's programs, nvidia's persistence mode by nvidia-smi."""

import errno
import os

from gpuswitch.host.linux.operations.files import OperationError, checked_address, checked_name, contents, is_name, last

_LONGEST_OUTPUT = 65536
_ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"}
# How people say in modprobe.d that a module must not be loaded, where a `blacklist` line is not strong enough.
_NEVER = frozenset({"true", "false", ":"})


class Modules:
    """`tools`: the folders that may have the programs, joined by colons."""

    def __init__(self, sysfs: str, tools: str) -> None:
        self._sysfs = sysfs
        self._tools = tools.split(":")

    def candidates(self, address: str) -> list[str]:
        """Modules for the function's modalias, as `modprobe` itself resolves it, minus vfio's and barred ones.

        Each is followed by what is loaded before it, in one string: `nvidia_drm drm nvidia nvidia_modeset`.

        `modprobe -R` looks an alias up and prints every match, blacklisted or not: it returns before the flag of `-b`
        is used (insmod_insert in kmod's tools/modprobe.c). `-D -b` shows what a load would do, and obeys both.
        """
        modalias = self._modalias(address)
        if not modalias.startswith("pci:") or not modalias[4:].isalnum():
            raise OperationError(errno.EINVAL, address, f"its modalias {modalias!r} is not a PCI alias")
        status, lines = self._run(address, "modprobe", "-R", modalias)
        if status:
            if _not_found(lines):
                return []
            raise _kmod_failure(address, "modprobe", status, lines)
        found = [line for line in lines if is_name(line) and "vfio" not in line]
        loads = {name: self._load_of(address, name) for name in dict.fromkeys(found)}
        return [" ".join([name, *needs]) for name, needs in loads.items() if needs is not None]

    def loadable(self, by_name: str, *modules: str) -> list[str]:
        """Those that are installed, and that modprobe's configuration does not bar.

        `by_name` 1: those that `modprobe MODULE` finds, by a file, an alias, or an install command.
        """
        if by_name == "1":
            return [module for module in modules if self._is_installed(checked_name(module))]
        return [module for module in modules if self._load_of(module, checked_name(module)) is not None]

    def load(self, module: str) -> list[str]:
        """`modprobe MODULE`, unless it is there already."""
        checked_name(module)
        if self._state(module) == "live":
            return []
        status, lines = self._run(module, "modprobe", module)
        if status:
            raise _kmod_failure(module, "modprobe", status, lines)
        return []

    def unload(self, module: str) -> list[str]:
        """`rmmod MODULE`, if it is there; a module that is built in has no state.

        `modprobe -r` would go on to the modules that it depends on.
        """
        checked_name(module)
        if not self._state(module):
            return []
        status, lines = self._run(module, "rmmod", module)
        if status and self._state(module):
            raise _kmod_failure(module, "rmmod", status, lines)
        return []

    def persistence(self, address: str) -> list[str]:
        """1 where it is on, 0 where it is off; nothing where there is no nvidia-smi."""
        if self._found("nvidia-smi") is None:
            return []
        answer = self._nvidia_smi(address, "--query-gpu=persistence_mode", "--format=csv,noheader")
        modes = {"Enabled": "1", "Disabled": "0"}
        if answer not in modes:
            raise OperationError(errno.EIO, address, f"nvidia-smi says {answer!r}")
        return [modes[answer]]

    def set_persistence(self, address: str, on: str) -> list[str]:
        self._nvidia_smi(address, "-pm", on)
        return []

    def _modalias(self, address: str) -> str:
        device = f"{self._sysfs}/bus/pci/devices/{checked_address(address)}"
        modalias = contents(f"{device}/modalias")
        if not modalias:
            raise OperationError(errno.ENODEV, address, "it is not on the PCI bus")
        return modalias

    def _state(self, module: str) -> str:
        return contents(f"{self._sysfs}/module/{module.replace('-', '_')}/initstate")

    def _is_installed(self, module: str) -> bool:
        status, lines = self._run(module, "modprobe", "-D", module)
        return not (status and _not_found(lines)) and not any(_is_bar(line) for line in lines)

    def _load_of(self, subject: str, module: str) -> list[str] | None:
        """What a load of this module loads before it; None: nothing would be loaded.

        An install command is run instead of a load, of this module or of one before it, and names neither.
        """
        status, lines = self._run(subject, "modprobe", "-D", "-b", module)
        before: list[str] = []
        commands = False
        for line in [] if status else lines:
            if _is_bar(line):
                return None
            kind, _, rest = line.strip().partition(" ")
            name = last(rest.split(" ")[0])
            commands = commands or kind == "install"
            if kind not in {"insmod", "builtin"}:
                continue
            name = name.partition(".ko")[0].replace("-", "_")
            if name == module:
                return before
            before.append(name)
        return before if commands else None

    def _nvidia_smi(self, address: str, *arguments: str) -> str:
        """The first line that it says; its errors begin with their cause, too."""
        status, lines = self._run(address, "nvidia-smi", "-i", checked_address(address), *arguments)
        said = next((line.strip() for line in lines if line.strip()), "it said nothing")
        if status:
            raise OperationError(errno.EIO, address, f"nvidia-smi ended with status {status}: {said}")
        return said

    def _found(self, program: str) -> str | None:
        return next((path for tools in self._tools if os.access(path := f"{tools}/{program}", os.X_OK)), None)

    def _run(self, subject: str, program: str, *arguments: str) -> tuple[int, list[str]]:
        """Exit status and output lines. The output goes to memory, so that nobody who keeps it open is waited for."""
        path = self._found(program)
        if path is None:
            raise OperationError(errno.ENOENT, subject, f"there is no {program} in {':'.join(self._tools)}")
        output = os.memfd_create(program)
        try:
            actions = [
                (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0),
                (os.POSIX_SPAWN_DUP2, output, 1),
                (os.POSIX_SPAWN_DUP2, output, 2),
            ]
            pid = os.posix_spawn(path, [program, *arguments], _ENVIRONMENT, file_actions=actions)
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            return status, os.pread(output, _LONGEST_OUTPUT, 0).decode(errors="replace").splitlines()
        finally:
            os.close(output)


def _not_found(lines: list[str]) -> bool:
    return bool(lines) and "not found in directory" in lines[-1]


def _is_bar(line: str) -> bool:
    """Whether it is a command that is run instead of a load, and loads nothing."""
    kind, _, rest = line.strip().partition(" ")
    return kind == "install" and last(rest.split(" ")[0]) in _NEVER


def _kmod_failure(subject: str, program: str, status: int, lines: list[str]) -> OperationError:
    """They end with 1 whatever went wrong; the last line ends with the kernel's own words, or says what they saw."""
    said = lines[-1] if lines else "it said nothing"
    words = said.rpartition(": ")[2]
    number = next((n for n in errno.errorcode if os.strerror(n) == words), errno.EIO)
    if _not_found(lines):
        number = errno.ENOENT
    elif " is in use" in said:
        # What rmmod looked up before it asked the kernel (check_module_inuse in tools/rmmod.c), which says EAGAIN.
        number = errno.EAGAIN
    return OperationError(number, subject, f"{program} ended with status {status}: {said}")
